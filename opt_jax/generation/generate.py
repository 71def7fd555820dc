"""Prompts to continuations: generation, streaming. Ids only, no text.

An engine (`engines.py`) does the work: `begin` reads the prompts and chooses the first token, `advance` makes steps
until told to stop. Here is the one loop on the host that runs an engine to its end, and the one that streams.
Prompts are padded on the left to a few fixed lengths, and batches to a few sizes (`bucket`), so that each is compiled
once per bucket of both and kind of decoding (which processors are on); everything else is a traced value.
"""

import dataclasses
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opt_jax.generation.beams import BeamEngine
from opt_jax.generation.config import GenerationConfig
from opt_jax.generation.drafts import Drafts, check_drafts
from opt_jax.generation.engines import Engine, NewTokens, PlainEngine
from opt_jax.generation.loop import FlatModel
from opt_jax.generation.request import Prefix, Request, check_batch_size, check_request, check_score
from opt_jax.generation.speculative import DraftingEngine
from opt_jax.model.cache import KVCache
from opt_jax.model.heads import OPTForCausalLM

_NO_LIMIT = 1 << 30  # steps


@dataclasses.dataclass(frozen=True, eq=False)
class GenerateOutput:
    """What `generate` returns. Indexing, iterating and `len` go to the rows, as with the tensor that HF returns.

    R = B * num_return_sequences; N: the new tokens of the longest row. Log-probabilities are the model's own, before
    temperature and all other processors (as OpenAI's), and NaN after a row's end.
    """

    sequences: np.ndarray  # int32 [R, T + N]: the prompts as given, then the new tokens, pads after the last one
    lengths: np.ndarray  # int32 [R]: number of new tokens, the end token included
    finish_reasons: list[str]  # "stop": at an end token, stop sequence or stop string; "length": as long as allowed
    logprobs: np.ndarray | None = None  # float32 [R, N]: of the new tokens (with `logprobs=n`)
    top_token_ids: np.ndarray | None = None  # int32 [R, N, n]: the most likely tokens, best first
    top_logprobs: np.ndarray | None = None  # float32 [R, N, n]: theirs
    sequences_scores: np.ndarray | None = None  # float32 [R]: of beams, which are sorted by it
    drafted: np.ndarray | None = None  # int32 [R]: with drafts: how many the model has looked at, in steps of the row
    accepted: np.ndarray | None = None  # int32 [R]: those of them that became new tokens (also behind a stop string)

    @property
    def acceptance_rate(self) -> float | None:
        """Drafted tokens that were accepted / drafted tokens that the model has looked at, of all rows; None: none."""
        if self.drafted is None or self.accepted is None or not self.drafted.any():
            return None
        return float(self.accepted.sum() / self.drafted.sum())

    def __getitem__(self, index: Any) -> Any:
        return self.sequences[index]

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.sequences)


def generate(
    model: OPTForCausalLM,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    cache: Prefix | None = None,
    assistant_model: OPTForCausalLM | None = None,
    batch_size: int | None = None,
    progress_bar: bool | None = None,
    **options: Any,
) -> GenerateOutput:
    """Continue each prompt until its end, all with one prefill and one compiled loop (HF `generate`).

    Args:
      input_ids: int [B, T], numpy, jax or nested lists, prompts of different lengths padded on the left; or a list of
        prompts of different lengths.
      attention_mask: [B, T], above 0 at real tokens. Default as in HF: ids other than `pad_token_id`, if that is not an
        end token; else all. None for a list of prompts of different lengths.
      cache: from `prefill`: what all the prompts begin with; it is not part of `input_ids`, nor of the output.
      assistant_model: a smaller model with the same tokenizer: it drafts `num_assistant_tokens` at a time, which
        `model` looks at in one step. The same tokens, or the same distribution, sooner (`speculative.py`).
      batch_size: rows at work at a time; a row that has ended makes room for the next prompt (continuous batching).
        The result is the same. Default: all rows at once.
      progress_bar: of rows that have ended, on stderr; default: with batch_size, on a terminal.
      generation_config: options; those of the checkpoint's `generation_config.json` fill what it leaves open.
      tokenizer: an `OPTTokenizer`, for `stop_strings`.
      **options: as in `GenerationConfig`; they win.

    Raises:
      ValueError: options that contradict each other or have no effect, prompts without a token or padded on the right,
        more positions than the model has or more keys and values than the devices have memory for, a stacked model (see
        `unstack_layers`), or one without LM head.
    """
    request = check_request(model, input_ids, attention_mask, generation_config, tokenizer, cache, options)
    return generate_requested(model, request, batch_size, progress_bar, assistant_model)


def generate_requested(
    model: OPTForCausalLM,
    request: Request,
    batch_size: int | None = None,
    progress_bar: bool | None = None,
    assistant_model: OPTForCausalLM | None = None,
) -> GenerateOutput:
    """What `generate` does once its arguments are checked."""
    check_batch_size(batch_size, progress_bar)
    engine = _engine(model, request, check_drafts(model, request, assistant_model), batch_size)
    shown = False if batch_size is None or progress_bar is None and batch_size >= engine.jobs else progress_bar
    return _output(request, _run(engine, min(batch_size or engine.jobs, engine.jobs), request, shown))


def _engine(model: OPTForCausalLM, request: Request, drafts: Drafts | None, batch_size: int | None) -> Engine:
    if request.num_beams > 1:
        return BeamEngine(FlatModel.of(model), request)
    if drafts is not None:
        return DraftingEngine(FlatModel.of(model), request, drafts, min(batch_size or request.rows, request.rows))
    return PlainEngine(FlatModel.of(model), request)


def _run(engine: Engine, size: int, request: Request, progress_bar: bool | None) -> NewTokens:
    """All jobs of an engine, `size` of them at work at a time.

    A job that has ended makes room for the next one (continuous batching), if the engine can place one beside others.
    """
    jobs: np.ndarray = np.arange(engine.jobs)
    result: Any = None
    if engine.refills and size < len(jobs):  # long prompts first: the last to end are short, and neighbours as long
        jobs = np.argsort(-request.prompts.lengths.repeat(request.copies), kind="stable")
    batches = [jobs] if engine.refills else np.split(jobs, range(size, len(jobs), size))
    chunk = max(1, size // 8)  # prompts read at a time: few enough that slots hardly wait for each other
    with _progress(progress_bar) as bar:
        task = bar.add_task("generating", total=request.rows)
        for batch in batches:
            first, waiting = batch[:size], batch[size:].tolist()[::-1]
            slots, report = engine.begin(first)
            working = np.full(len(report.ended), -1)  # the job of each slot; -1: none
            working[: len(first)] = first
            while (working >= 0).any():
                enough = min(chunk, len(waiting)) or len(working)
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
    return result


def _collect(result: Any, engine: Engine, jobs: np.ndarray, slots: np.ndarray, new: NewTokens) -> Any:
    """A `NewTokens` of all jobs (None: not yet) with the rows of these slots written into it."""
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


def prefill(
    model: OPTForCausalLM, input_ids: Any, attention_mask: Any = None, *, cache_dtype: str | None = None
) -> Prefix:
    """Read the common beginning of many prompts once, for `generate(..., cache=)`.

    Args:
      input_ids, attention_mask: as in `generate`, of one row.
      cache_dtype: as in `GenerationConfig`, of all that goes on from the prefix.

    Raises:
      ValueError: as `generate`, for inputs; more than one row.
    """
    ids, mask, padded_ids, padded_mask = check_score(model, input_ids, attention_mask)
    if len(ids) > 1:
        raise ValueError(f"prefill reads one prefix, not {len(ids)} rows")
    GenerationConfig(cache_dtype=cache_dtype).check()
    return Prefix(ids[mask][None], _read_prefix(model, padded_ids, padded_mask, cache_dtype))


def stream(
    model: OPTForCausalLM,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    cache: Prefix | None = None,
    assistant_model: OPTForCausalLM | None = None,
    **options: Any,
) -> Generator[np.ndarray, None, None]:
    """The same tokens as they are made: an iterator of int32 [R], one for each step, pads for rows that have ended.

    Takes the arguments of `generate` but the last two, and raises the same errors, at once. Without drafts, the device
    works on the next token while the caller works with this one.
    """
    request = check_request(model, input_ids, attention_mask, generation_config, tokenizer, cache, options)
    if request.logprobs is not None or request.num_beams > 1:
        what = "logprobs" if request.num_beams == 1 else "beams, which are known at the end only,"
        raise ValueError(f"{what} are not streamed: use generate")
    return _stream(_engine(model, request, check_drafts(model, request, assistant_model), None), request)


def _stream(engine: Engine, request: Request) -> Generator[np.ndarray, None, None]:
    rows = request.rows
    new = np.full((rows, request.max_new_tokens), request.pad_token_id, np.int32)
    known, told = np.zeros(rows, np.int32), 0  # tokens in each row of `new`; steps that were yielded
    slots, report = engine.begin(np.arange(rows))
    while True:
        # The next step is dispatched before waiting for this one. It does nothing if all rows have ended.
        following = engine.advance(slots, 1, len(report.ended)) if told + 1 < request.max_new_tokens else None
        tokens, lengths, ended = (np.asarray(x)[:rows] for x in report)
        for row, count in enumerate(lengths - known):
            new[row, known[row] : lengths[row]] = tokens[row, tokens.shape[1] - count :]
        known = lengths
        ready = int(known.max() if ended.all() else known[~ended].min())
        for column in range(told, ready):
            yield new[:, column].copy()
        told = ready
        if ended.all() or following is None:
            return
        slots, report = following


# Compiled -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="cache_dtype")
def _read_prefix(
    model: OPTForCausalLM, ids: Int[Array, "1 T"], mask: Bool[Array, "1 T"], cache_dtype: str | None
) -> KVCache | None:
    cache = model.init_cache(ids.shape[0], ids.shape[1], cache_dtype)
    return model.forward(ids, mask, cache=cache, logits_to_keep=1).cache
