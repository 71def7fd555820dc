"""The data that a run trains and validates on: documents -> tokenizer -> windows, or the examples of a task."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from etils import epath

from opt_jax.data.corpus import Corpus
from opt_jax.data.tokenizers import read_tokenizer, tokenizer_from_bytes, tokenizer_to_bytes, train_tokenizer
from opt_jax.data.tokens import Tokens
from opt_jax.data.windows import Windows
from opt_jax.parallel import agreement
from opt_jax.text.tokenizer import OPTTokenizer
from opt_jax.training import finetuning
from opt_jax.training.metrics import say
from opt_jax.training.setup import Setup
from opt_jax.training.step import TrainState, make_eval_step, place_batch
from opt_jax.training.tasks.common import Batches, make_predict_step


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The data of a run, the same on all processes.

    Attributes:
      tokenizer: the tokenizer.
      training: gives the batch of each step.
      held_out: the data for the validation loss; None if there are too few.
      task: the task of --task (see `tasks.common`); None in pretraining.
      summary: a line for the log.
      tokens_per_step: with a task, the mean.
      sample_from: the tokens whose beginning is the prompt of the sample; None with a task.
    """

    tokenizer: OPTTokenizer
    training: Windows | Batches
    held_out: Windows | Batches | None
    task: Any
    summary: str
    tokens_per_step: int
    sample_from: Tokens | None

    def record(self) -> dict[str, dict[str, Any]]:
        """The sections of the run record (run.json) that describe the data."""
        return {
            "data": self.training.description(),
            "held-out data": self.held_out.description() if self.held_out else {},
        }


def open_data(setup: Setup, saved_tokenizer: epath.Path | None) -> TrainingData:
    """The data of the run, the same on all processes.

    Args:
      saved_tokenizer: the directory of a resumed run's tokenizer; None for a new run.

    Raises:
      ValueError: data, tokenizer and model do not go together, or the processes have different data.
      FileNotFoundError: there is no such data.
    """
    options, config = setup.options, setup.config
    corpus = None
    if options.task is None:
        corpus = Corpus(
            options.data, options.validation_data, bool(options.mixture), options.skip_bad_records, options.text_key
        )
    # All processes use the tokenizer of process 0.
    choose = partial(_choose_tokenizer, setup, corpus, saved_tokenizer)
    tokenizer = tokenizer_from_bytes(agreement.from_first(lambda: tokenizer_to_bytes(choose())))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, but the model's vocabulary ends at {config.vocab_size}: "
            "choose another --tokenizer or --model"
        )
    data = _task_data(setup, tokenizer) if corpus is None else _pretraining_data(setup, tokenizer, corpus)
    record = data.record()
    agreement.check_same(record["data"] | {f"held-out {name}": v for name, v in record["held-out data"].items()})
    return data


def _choose_tokenizer(setup: Setup, corpus: Corpus | None, saved: epath.Path | None) -> OPTTokenizer:
    options = setup.options
    if saved is not None:
        return read_tokenizer(saved)
    if options.tokenizer or setup.checkpoint:
        return OPTTokenizer.from_pretrained(options.tokenizer or str(setup.checkpoint))
    assert corpus is not None  # a task has a checkpoint or a tokenizer
    size = options.vocab_size or setup.config.vocab_size
    if not corpus.training:
        raise ValueError("--data is tokenised already: name the tokenizer that did it with --tokenizer")
    say(f"training a tokenizer of {size} entries on {sum(map(len, corpus.training)) / 1e6:.1f}M characters")
    return train_tokenizer(corpus.training, size)


def _task_data(setup: Setup, tokenizer: OPTTokenizer) -> TrainingData:
    task = finetuning.make_task(setup.options, tokenizer, setup.seq_len, setup.mesh.shape["tensor"])
    return TrainingData(
        tokenizer=tokenizer,
        training=task.training,
        held_out=task.held_out,
        task=task,
        summary=task.summary(),
        tokens_per_step=round(setup.options.batch_size * task.training.lengths.mean()),
        sample_from=None,
    )


def _pretraining_data(setup: Setup, tokenizer: OPTTokenizer, corpus: Corpus) -> TrainingData:
    options, seq_len = setup.options, setup.seq_len
    streams, held_out_streams = corpus.tokens(tokenizer)
    make_windows = partial(
        Windows,
        seq_len=seq_len,
        batch_size=options.batch_size,
        vocab_size=setup.config.vocab_size,
        separator=tokenizer.bos_token_id if options.pack == "segments" else None,
    )
    training = make_windows(streams, seed=options.seed, weights=options.mixture or None)
    held_out_streams = [stream for stream in held_out_streams if len(stream) > seq_len]
    if options.validation_data and not held_out_streams:
        raise ValueError(
            f"--validation-data: too short for one sequence of {seq_len} tokens: take more, or a smaller --seq-len"
        )
    held_out = make_windows(held_out_streams) if held_out_streams else None
    return TrainingData(
        tokenizer=tokenizer,
        training=training,
        held_out=held_out,
        task=None,
        summary=corpus.summary(training.tokens, held_out.tokens if held_out else 0),
        tokens_per_step=options.batch_size * seq_len,
        sample_from=(held_out_streams or streams)[0],
    )


def make_validation(setup: Setup, data: TrainingData) -> Callable[[TrainState], dict[str, float] | float | None]:
    """A function that measures a training state on the held-out data.

    It returns the mean loss per token in nats; with a task, a dictionary of its measures; None if no data are held out.
    """
    options = setup.options
    make_step = make_predict_step if data.task else make_eval_step
    eval_step = make_step(setup.shardings.full_model, setup.mesh)
    place = partial(place_batch, batch_size=options.batch_size, accumulate=1, mesh=setup.mesh)

    def validate(state: TrainState) -> dict[str, float] | float | None:
        held_out = data.held_out
        if data.task:
            return data.task.evaluate(lambda rows: eval_step(state.full_model, place(rows)))
        if held_out is None:
            return None
        assert isinstance(held_out, Windows)
        count = max(1, min(options.eval_batches, held_out.count // options.batch_size))
        batches = (place(partial(held_out.batch, i)) for i in range(count))
        sums, counts = zip(*(jax.device_get(eval_step(state.full_model, batch)) for batch in batches), strict=True)
        return float(sum(sums) / sum(counts))

    return validate
