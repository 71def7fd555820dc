"""The public functions of generation and the host loops that run an engine. Token ids only, no text.

An engine (`engines.py`) computes: `begin` reads the prompts and chooses the first token, `advance` makes more steps.
`_run` calls it until all jobs have ended; `_stream` yields the tokens of each step.
Prompts are padded on the left to a few fixed lengths, and batches to a few fixed sizes (`bucket`). A program is
compiled once for each pair of buckets and for each set of processors in use; all other values are traced.
"""

import dataclasses
from collections.abc import Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opt_jax.checkpoints import hf_scripts
from opt_jax.generation.beams import BeamEngine
from opt_jax.generation.config import GenerationConfig
from opt_jax.generation.drafts import Drafts, check_drafts
from opt_jax.generation.engines import Engine, NewTokens, PlainEngine, Slots
from opt_jax.generation.loop import FlatModel, Report
from opt_jax.generation.memory import default_cache_dtype
from opt_jax.generation.prompts import Prefix, continued
from opt_jax.generation.request import Request, check_batch_size, check_request, check_return_cache, check_score
from opt_jax.generation.speculative import DraftingEngine
from opt_jax.model.bfloat16 import with_cpu_products
from opt_jax.model.cache import KVCache
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.interventions import with_hooks
from opt_jax.parallel.mesh import mesh_of, turn_cache_off

_NO_LIMIT = 1 << 30  # a number of steps that no row reaches


@dataclasses.dataclass(frozen=True, eq=False)
class GenerateOutput:
    """What `generate` returns. Indexing, iteration and `len` act on `sequences`, as on the tensor that HF returns.

    `out["sequences"]` and other names of fields are an index, too.

    R = B * num_return_sequences rows; N: number of new tokens in the longest row. Log-probabilities are those of the
    model, before temperature and all other processors (as OpenAI's). After the end of a row they are NaN.
    """

    sequences: Int32[np.ndarray, "R T+N"]  #: the prompts as given, the new tokens, then pads
    lengths: Int32[np.ndarray, " R"]  #: number of new tokens, the end token included
    finish_reasons: list[str]  #: "stop": end token, stop sequence or stop string; "length": the maximum length
    stop_reasons: list[str | None] | None = None  #: with `stop_strings`: the one that ended the row; None: none of them
    #: With `logprobs=n`: log-probabilities of the new tokens, the n most likely tokens (best first), and theirs.
    logprobs: Float32[np.ndarray, "R N"] | None = None
    top_token_ids: Int32[np.ndarray, "R N n"] | None = None
    top_logprobs: Float32[np.ndarray, "R N n"] | None = None
    sequences_scores: Float32[np.ndarray, " R"] | None = None  #: with beams; the rows of a prompt are sorted by it
    #: With drafts: the number of drafted tokens that the model has verified, and of those that became new tokens.
    drafted: Int32[np.ndarray, " R"] | None = None
    accepted: Int32[np.ndarray, " R"] | None = None
    cache: Prefix | None = None  #: with `return_cache`: all tokens of each row, for the next call

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafted tokens / drafted tokens, over all rows; None without drafted tokens."""
        if self.drafted is None or self.accepted is None or not self.drafted.any():
            return None
        return float(self.accepted.sum() / self.drafted.sum())

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise hf_scripts.no_attribute("the result of generate", name, hf_scripts.GENERATED)

    def __getitem__(self, index: Any) -> Any:
        return getattr(self, index) if isinstance(index, str) else self.sequences[index]

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.sequences)


def generate(
    model: OPTForCausalLM,
    input_ids: Any = None,
    attention_mask: Any = None,
    *,
    inputs_embeds: Any = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    cache: Prefix | None = None,
    assistant_model: OPTForCausalLM | None = None,
    batch_size: int | None = None,
    progress_bar: bool | None = None,
    return_cache: bool = False,
    hooks: Any = None,
    **options: Any,
) -> GenerateOutput:
    """Prompts and their continuations: HF `generate`, with one prefill and one compiled loop.

    Args:
      model: the language model, with separate layers.
      input_ids: int [B, T], NumPy, JAX or nested lists, with shorter prompts padded on the left; or a list of prompts
        of different lengths. Prompts padded on the right are moved to the right end of their rows, with a warning.
      attention_mask: [B, T], above 0 at real tokens. The default is that of HF: real tokens are those that are not
        `pad_token_id`; all are, if that is an end token. Must be None for a list of prompts of different lengths.
      inputs_embeds: float [B, T, word_embed_proj_dim]: what the model reads instead of embeddings of `input_ids`. As in
        HF, without `input_ids` the result has new tokens only, and processors see no others; with them it begins with
        them. The default of attention_mask is then: all are real tokens.
      generation_config: options. An option that it leaves None comes from the checkpoint's `generation_config.json`.
      tokenizer: an `OPTTokenizer`; `stop_strings` need it.
      cache: what `prefill` returned for a common prefix of all prompts, or the `cache` of an earlier result, whose rows
        `input_ids` continue. These tokens are neither in `input_ids` nor in the output. After an earlier result
        `input_ids` may be left out.
      assistant_model: a smaller model with the same tokenizer, for speculative decoding: it drafts
        `num_assistant_tokens` tokens, and `model` verifies them in one step. The tokens, or with do_sample their
        distribution, are those without it (`speculative.py`).
      batch_size: the most rows that run at a time. When a row ends, the next one takes its place (continuous batching).
        The result is the same. Default: all rows at once.
      progress_bar: whether stderr shows how many rows have ended. Default: with batch_size, if stderr is a terminal.
      return_cache: whether the result has `cache`, from which another call can go on.
      hooks: interventions in `model` (`interventions.run_with_hooks`), in the prefill and in every step. The tokens of
        `cache` were read before, without them.
      **options: fields of `GenerationConfig`. They win over generation_config; None is the default, whatever other
        sources say.

    Returns:
      The sequences and what was recorded about them.

    Raises:
      ValueError: options that contradict each other or have no effect; a prompt without a token; more positions than
        the model has; more keys and values than the devices have memory for; a stacked model (see `unstack_layers`); or
        a model without LM head.
    """
    request = check_request(
        model, input_ids, attention_mask, generation_config, tokenizer, cache, options, inputs_embeds=inputs_embeds
    )
    model = hooked_model(model, hooks, request, batch_size, assistant_model)
    return generate_requested(model, request, batch_size, progress_bar, assistant_model, return_cache)


def generate_requested(
    model: OPTForCausalLM,
    request: Request,
    batch_size: int | None = None,
    progress_bar: bool | None = None,
    assistant_model: OPTForCausalLM | None = None,
    return_cache: bool = False,
) -> GenerateOutput:
    """The result of `generate` for checked arguments."""
    check_batch_size(batch_size, progress_bar)
    check_return_cache(request, return_cache, batch_size)
    engine = _engine(model, request, check_drafts(model, request, assistant_model), batch_size)
    shown = False if batch_size is None or progress_bar is None and batch_size >= engine.jobs else progress_bar
    new, slots = _run(engine, min(batch_size or engine.jobs, engine.jobs), request, shown)
    result = _output(request, new)
    if not return_cache:
        return result
    assert isinstance(engine, PlainEngine)
    cache = continued(request.prompts, request.copies, new.tokens, new.lengths, engine.cache_of(slots))
    return dataclasses.replace(result, cache=cache)


def hooked_model(
    model: OPTForCausalLM,
    hooks: Any,
    request: Request,
    batch_size: int | None,
    assistant_model: OPTForCausalLM | None,
) -> OPTForCausalLM:
    """The model with hooks. ValueError if they would mean something else than in the call of a model."""
    if hooks is None:
        return model
    hooked = with_hooks(model, hooks, request.rows // request.copies)
    edits = [edit for edits_of_key in hooked.model.hooks.edits.values() for edit in edits_of_key]
    of_rows = any(edit.rows is not None for edit in edits)
    if of_rows or any(np.ndim(x) > 2 and np.shape(x)[0] > 1 for x in jax.tree.leaves(edits)):
        for option, moves in (("batch_size", batch_size), ("num_return_sequences above 1", request.copies > 1)):
            if moves:
                what = "rows=" if of_rows else "a value for each row"
                raise ValueError(f"hooks with {what} cannot be combined with {option}: a step has other rows")
    drafts = check_drafts(model, request, assistant_model)
    if drafts is not None and any(edit.from_end for edit in edits):
        name = "prompt_lookup_num_tokens" if drafts.assistant is None else "assistant_model"
        raise ValueError(f"hooks with negative positions= cannot be combined with {name}: a step reads several tokens")
    return hooked


def _engine(model: OPTForCausalLM, request: Request, drafts: Drafts | None, batch_size: int | None) -> Engine:
    flat = FlatModel.of(with_cpu_products(model))
    if (mesh := mesh_of(flat.leaves[:1])) is not None:  # not of the model, which would be flattened once more
        turn_cache_off(list(mesh.devices.flat))
    if request.num_beams > 1:
        return BeamEngine(flat, request)
    if drafts is not None:
        return DraftingEngine(flat, request, drafts, min(batch_size or request.rows, request.rows))
    return PlainEngine(flat, request)


def _run(engine: Engine, size: int, request: Request, progress_bar: bool | None) -> tuple[NewTokens, Any]:
    """The new tokens of all jobs of an engine, of which at most `size` run at a time; and the last slots.

    If the engine supports `place`, a waiting job takes the slot of one that has ended (continuous batching). If not, a
    batch begins when all jobs of the one before have ended.
    """
    jobs: np.ndarray = np.arange(engine.jobs)
    result: Any = None
    slots: Any = None
    if engine.refills and size < len(jobs):  # longest first: prompts read together have similar lengths
        jobs = np.argsort(-request.prompts.lengths.repeat(request.copies), kind="stable")
    batches = [jobs] if engine.refills else np.split(jobs, range(size, len(jobs), size))
    chunk = max(1, size // 8)  # prompts read at a time; a free slot waits until there are so many
    with _progress(progress_bar) as bar:
        task = bar.add_task("generating", total=request.rows)
        for batch in batches:
            first, waiting = batch[:size], batch[size:].tolist()[::-1]
            slots, report = engine.begin(first)
            working = np.full(len(report.ended), -1)  # the running job of each slot; -1: no job
            working[: len(first)] = first
            while (working >= 0).any():
                enough = min(chunk, len(waiting)) or len(working)
                if request.max_new_tokens > 1:  # `begin` chose the first one; the step need not be compiled for it
                    slots, report = engine.advance(slots, _NO_LIMIT, enough)
                ended = np.asarray(report.ended) | (working < 0)
                if ended.sum() < enough:
                    continue
                done = np.flatnonzero(ended & (working >= 0))
                result = _collect(result, engine, working, done, engine.results(slots))
                bar.advance(task, len(done) * engine.rows_per_job)
                working, free = np.where(ended, -1, working), np.flatnonzero(ended)
                while waiting and len(free) >= min(chunk, len(waiting)):
                    places, free = free[: min(chunk, len(waiting))], free[chunk:]
                    working[places] = [waiting.pop() for _ in places]
                    slots = engine.place(slots, working[places], places, chunk)
    return result, slots


def _collect(result: Any, engine: Engine, jobs: np.ndarray, slots: np.ndarray, new: NewTokens) -> Any:
    """The `NewTokens` of all jobs, with the rows of `slots` written into it.

    Args:
      result: what the last call returned; None on the first call.
      engine: tells the number of rows.
      jobs: the job of each slot.
      slots: the slots whose jobs have ended.
      new: the rows of all slots.
    """
    count, each = engine.jobs * engine.rows_per_job, np.arange(engine.rows_per_job)
    if result is None:
        result = jax.tree.map(lambda x: np.zeros((count, *x.shape[1:]), x.dtype), new)
    into, rows = ((x[:, None] * len(each) + each).ravel() for x in (jobs[slots], slots))
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(new), strict=True):
        x[into] = y[rows]
    return result


def _progress(wanted: bool | None) -> Progress:
    console = Console(stderr=True)
    shown = console.is_terminal if wanted is None else wanted
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not shown)


def _output(request: Request, new: NewTokens) -> GenerateOutput:
    shown = np.s_[:, : new.lengths.max()]
    ended = np.arange(new.lengths.max()) >= new.lengths[:, None]
    prompts = np.repeat(request.input_ids, request.copies, axis=0)
    tokens = np.where(ended, request.pad_token_id, new.tokens[shown]).astype(np.int32)
    result = GenerateOutput(
        sequences=np.concatenate([prompts, tokens], axis=1),
        lengths=new.lengths,
        finish_reasons=["stop" if stop else "length" for stop in new.stopped],
        stop_reasons=_stop_reasons(request, new),
        sequences_scores=new.scores,
        drafted=new.drafted,
        accepted=new.accepted,
    )
    if new.logprobs is None:
        return result
    return dataclasses.replace(
        result,
        logprobs=np.where(ended, np.nan, new.logprobs.chosen[shown]),
        top_token_ids=new.logprobs.top_ids[shown],
        top_logprobs=np.where(ended[:, :, None], np.nan, new.logprobs.top[shown]),
    )


def _stop_reasons(request: Request, new: NewTokens) -> list[str | None] | None:
    """The stop string that ended each row."""
    if request.stops is None:
        return None
    rows = zip(new.tokens, new.lengths, new.stopped, strict=True)
    prompts = np.arange(len(new.tokens)) // request.copies
    return [
        request.stops.ending(prompt, row[:length].tolist())[0] if stopped else None
        for prompt, (row, length, stopped) in zip(prompts, rows, strict=True)
    ]


def prefill(
    model: OPTForCausalLM, input_ids: Any, attention_mask: Any = None, *, cache_dtype: str | None = None
) -> Prefix:
    """The keys and values of a common prefix of many prompts, for `generate(..., cache=)`.

    Args:
      model: the language model.
      input_ids: one row of `generate`'s input_ids.
      attention_mask: as in `generate`.
      cache_dtype: as in `GenerationConfig`. It holds for everything generated from the prefix.

    Raises:
      ValueError: more than one row, or inputs that `generate` would refuse.
    """
    ids, mask, padded_ids, padded_mask = check_score(model, input_ids, attention_mask)
    if len(ids) > 1:
        raise ValueError(f"prefill reads one prefix, not {len(ids)} rows")
    GenerationConfig(cache_dtype=cache_dtype).check()
    tokens = ids[mask][None]
    cache = _read_prefix(model, padded_ids, padded_mask, cache_dtype or default_cache_dtype(model))
    return Prefix(tokens, np.ones_like(tokens, bool), cache)


def stream(
    model: OPTForCausalLM,
    input_ids: Any = None,
    attention_mask: Any = None,
    *,
    inputs_embeds: Any = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    cache: Prefix | None = None,
    assistant_model: OPTForCausalLM | None = None,
    hooks: Any = None,
    **options: Any,
) -> Generator[np.ndarray, None, None]:
    """An iterator over the new tokens of `generate`: int32 [R] for each step, pads for rows that have ended.

    Takes the arguments of `generate` but batch_size, progress_bar and return_cache. Raises the same errors, at the call
    itself. After the first step the device computes the next one while the caller uses the tokens of this one.
    """
    request = check_request(
        model, input_ids, attention_mask, generation_config, tokenizer, cache, options, inputs_embeds=inputs_embeds
    )
    return stream_requested(hooked_model(model, hooks, request, None, assistant_model), request, assistant_model)


def stream_requested(
    model: OPTForCausalLM, request: Request, assistant_model: OPTForCausalLM | None = None
) -> Generator[np.ndarray, None, None]:
    """The result of `stream` for checked arguments."""
    if request.logprobs is not None or request.num_beams > 1:
        what = "logprobs" if request.num_beams == 1 else "beams, which are known only at the end,"
        raise ValueError(f"{what} are not streamed: use generate")
    engine = _engine(model, request, check_drafts(model, request, assistant_model), None)
    return _stream(engine, request, *engine.begin(np.arange(request.rows)))


def _stream(engine: Engine, request: Request, slots: Slots, report: Report) -> Generator[np.ndarray, None, None]:
    rows = request.rows
    new = np.full((rows, request.max_new_tokens), request.pad_token_id, np.int32)
    known, told = np.zeros(rows, np.int32), 0  # tokens in each row of `new`; columns that were yielded
    count = len(report.ended)
    while True:
        # Dispatch the next step before waiting for this one. It has no effect if all rows have ended. The first token
        # does not wait for it, because it may have to be compiled.
        last = told + 1 >= request.max_new_tokens
        following = None if last or not told else engine.advance(slots, 1, count)
        tokens, lengths, ended = (np.asarray(x)[:rows] for x in report)
        columns = lengths[:, None] + np.arange(-tokens.shape[1], 0)  # of the last tokens of each row
        row, i = np.nonzero(columns >= known[:, None])
        new[row, columns[row, i]], known = tokens[row, i], lengths
        ready = int(known.max() if ended.all() else known[~ended].min())
        for column in range(told, ready):
            yield new[:, column].copy()
        told = ready
        if last or ended.all():
            return
        slots, report = following or engine.advance(slots, 1, count)


# Compiled -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="cache_dtype")
def _read_prefix(
    model: OPTForCausalLM, ids: Int[Array, "1 T"], mask: Bool[Array, "1 T"], cache_dtype: str | None
) -> KVCache | None:
    cache = model.init_cache(ids.shape[0], ids.shape[1], cache_dtype)
    return model.forward(ids, mask, cache=cache, logits_to_keep=1).cache
