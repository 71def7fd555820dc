"""Prompts to continuations: generation, streaming. Ids only, no text.

Two compiled functions do the work (`loop.py`): `begin` reads the prompts and chooses the first token, `advance`
makes steps until told to stop. Prompts are padded on the left to a few fixed lengths, and batches to a few sizes
(`bucket`), so that each is compiled once per bucket of both and kind of decoding (which processors are on); everything
else is a traced value.
"""

import dataclasses
from collections.abc import Generator, Iterator
from functools import cache as memoize
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from opt_jax.generation import beams, continuous, loop, sampling, speculative
from opt_jax.generation.config import GenerationConfig
from opt_jax.generation.drafts import Drafts, check_drafts
from opt_jax.generation.loop import DecodeState, FlatModel, Model, NewTokens, new_tokens
from opt_jax.generation.memory import check_memory, device_memory
from opt_jax.generation.processors import History
from opt_jax.generation.request import (
    Prefix,
    Request,
    batch_bucket,
    bucket,
    check_batch_size,
    check_request,
    check_score,
    take_prompts,
)
from opt_jax.generation.sampling import SamplingOptions
from opt_jax.model.cache import KVCache
from opt_jax.model.heads import OPTForCausalLM

_CHECK_EVERY = 8  # steps between two looks for stop strings


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
    check_batch_size(batch_size, progress_bar, request)
    drafts = check_drafts(model, request, assistant_model)
    if drafts is not None:
        if batch_size is not None:
            raise ValueError(f"batch_size={batch_size} is not supported with drafts: leave one of them out")
        return _generate_with_drafts(FlatModel.of(model), request, drafts)
    if request.beams is not None:
        return _generate_with_beams(model, request, batch_size or len(request.input_ids))
    flat = FlatModel.of(model)
    if batch_size is not None and (batch_size < request.rows or progress_bar):
        _check_fits(flat, request, min(batch_size, request.rows), request.capacity)
        return output(request, continuous.generate(flat, request, min(batch_size, request.rows), progress_bar))
    sampling_options, (state, _, ended) = _start(flat, request)
    if request.stops is None:
        state, _, _ = _advance(flat, request, sampling_options, state, request.max_new_tokens)
    else:
        step = 1
        while not (np.asarray(ended) | _look(request, state)).all() and step < request.max_new_tokens:
            step = min(step + _CHECK_EVERY, request.max_new_tokens)
            state, _, ended = _advance(flat, request, sampling_options, state, step)
    return output(request, new_tokens(state))


def _check_fits(model: Model, request: Request, rows: int, new_columns: int, branches: int = 1) -> None:
    """ValueError unless the devices have the memory for so many rows at a time.

    branches: continuations of a row that are looked at together (beams, drafts): one distribution over the vocabulary
    each, and the columns that each of them sees.
    """
    columns = request.width + new_columns
    nbytes = columns * (request.column_bytes + branches) + branches * request.vocab_size * 4
    nbytes += request.capacity * (request.logprobs or 0) * 8  # token and value
    check_memory(rows * nbytes, device_memory(model), rows, request.given)


def _generate_with_drafts(model: FlatModel, request: Request, drafts: Drafts) -> GenerateOutput:
    options, (state, _, _) = _start(model, request, drafts)
    result = speculative.run(model, request, drafts, options, state)
    drafted, accepted = (np.asarray(x)[: request.rows] for x in (result.drafted, result.accepted))
    return dataclasses.replace(output(request, new_tokens(result.state)), drafted=drafted, accepted=accepted)


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


def _look(request: Request, state: DecodeState) -> np.ndarray:
    """Which rows have completed a stop string."""
    tokens, lengths = jax.device_get((state.tokens, state.lengths))
    return _padded(request.stops.look(tokens[: request.rows, state.width :], lengths[: request.rows]), len(tokens))


def output(request: Request, new: NewTokens) -> GenerateOutput:
    lengths, stopped = new.lengths[: request.rows], new.stopped[: request.rows]
    if request.stops is not None:
        stopped = stopped | (request.stops.lengths <= lengths)
        lengths = np.minimum(lengths, request.stops.lengths)
    shown = np.s_[: request.rows, : lengths.max()]
    ended = np.arange(lengths.max()) >= lengths[:, None]
    prompts = np.repeat(request.input_ids, request.copies, axis=0)
    tokens = np.where(ended, request.pad_token_id, new.tokens[shown]).astype(np.int32)
    result = GenerateOutput(
        sequences=np.concatenate([prompts, tokens], axis=1),
        lengths=lengths,
        finish_reasons=["stop" if stop else "length" for stop in stopped],
    )
    if new.logprobs is None:
        return result
    return dataclasses.replace(
        result,
        logprobs=np.where(ended, np.nan, new.logprobs.chosen[shown]),
        top_token_ids=new.logprobs.top_ids[shown],
        top_logprobs=np.where(ended[:, :, None], np.nan, new.logprobs.top[shown]),
    )


def _generate_with_beams(model: OPTForCausalLM, request: Request, batch_size: int) -> GenerateOutput:
    """`batch_size` prompts after the other; filled up to a bucket with copies of the last one."""
    eos = request.beams["eos_token_ids"] if request.beams else []
    count, parts = len(request.input_ids), []
    for start in range(0, count, batch_size):
        rows = np.arange(start, min(start + batch_size, count))
        part = _search(model, request, _padded(rows, batch_bucket(len(rows))))
        parts.append([x[: len(rows) * request.copies] for x in (part.sequences, part.lengths, part.sequences_scores)])
    lengths, scores = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    tokens = np.full((request.rows, lengths.max()), request.pad_token_id, np.int32)
    for start, (sequences, *_) in zip(range(0, request.rows, batch_size * request.copies), parts, strict=True):
        new = sequences[:, request.width :][:, : lengths.max()]
        tokens[start : start + len(new), : new.shape[1]] = new
    last = tokens[np.arange(len(tokens)), lengths - 1]
    return GenerateOutput(
        sequences=np.concatenate([np.repeat(request.input_ids, request.copies, axis=0), tokens], axis=1),
        lengths=lengths,
        finish_reasons=["stop" if token in eos else "length" for token in last.tolist()],
        sequences_scores=scores,
    )


def _search(model: OPTForCausalLM, request: Request, rows: np.ndarray) -> beams.BeamOutput:
    options: dict[str, Any] = dict(request.beams or {})
    capacity = bucket(request.max_new_tokens)
    _check_fits(model, request, len(rows), options["num_beams"] * capacity, options["num_beams"])
    ends = max(1, len(options["eos_token_ids"]))  # HF: at least two tokens are kept where no token ends
    if options["seed"].ndim:
        options["seed"] = options["seed"][rows]
    return beams.beam_search(
        model,
        request.prompts.ids[rows],
        request.prompts.mask[rows],
        max_new_tokens=request.max_new_tokens,
        num_return_sequences=request.copies,
        pad_token_id=request.pad_token_id,
        do_sample=request.do_sample,
        process=_beam_process(request.do_sample, ends + 1 if request.do_sample else 1),
        process_options=request.options_of(np.arange(1)),
        capacity=capacity,
        cache_dtype=request.cache_dtype,
        first_row=int(rows[0]),
        **options,
    )


@memoize
def _beam_process(do_sample: bool, min_keep: int) -> beams.Process:
    """The processors for `beams.beam_search`: the same function for the same arguments, or each call would compile.

    min_keep: what HF's processors of sampling leave at least, so that there are beams left when one ends.
    """

    def process(options, log_probs, tokens, valid, column, step):
        return sampling.process(log_probs, History(tokens, valid, column, step), options, do_sample, min_keep)

    return process


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
    if request.logprobs is not None or request.beams is not None:
        what = "logprobs" if request.beams is None else "beams, which are known at the end only,"
        raise ValueError(f"{what} are not streamed: use generate")
    return _stream(FlatModel.of(model), request, check_drafts(model, request, assistant_model))


def _stream(model: FlatModel, request: Request, drafts: Drafts | None) -> Generator[np.ndarray, None, None]:
    if drafts is None:
        steps = _steps(model, request)
    else:
        options, (state, _, _) = _start(model, request, drafts)
        steps = speculative.steps(model, request, drafts, options, state)
    stops, new = request.stops, np.zeros((request.rows, request.max_new_tokens), np.int32)
    for step, (token, ended) in enumerate(steps, 1):
        token, ended = token[: request.rows], ended[: request.rows]
        if stops is not None:
            token = np.where(stops.lengths < step, request.pad_token_id, token).astype(np.int32)
            new[:, step - 1] = token
            ended = ended | stops.look(new, np.full(request.rows, step))
        yield token
        if ended.all():
            return


def _steps(model: FlatModel, request: Request) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of each step, and which rows have ended."""
    options, following = _start(model, request)
    for step in range(1, request.max_new_tokens + 1):
        state, token, ended = following
        if step < request.max_new_tokens:  # dispatched before waiting for this token; does nothing if that was the last
            following = _advance(model, request, options, state, step + 1)
        yield np.asarray(token), np.asarray(ended)


def _start(model: Model, request: Request, drafts: Drafts | None = None) -> tuple[SamplingOptions, loop.Report]:
    """The options of all rows, and what `begin` returns. Rows are filled up to a bucket, with copies of the last.

    On a GPU to two at least: XLA makes of a product with one row a multiplication of the whole matrix, which it writes
    to memory and adds up after that (`xla_gpu_enable_dot_strength_reduction`), and three kernels of each LayerNorm.
    """
    count = len(request.input_ids)
    rows = batch_bucket(2 if request.rows == 1 and _platform(model) == "gpu" else count)
    capacity = request.capacity_with(0 if drafts is None else drafts.spare(request.rows))
    _check_fits(model, request, rows * request.copies, capacity, 1 if drafts is None else drafts.count + 1)
    options = request.options_of(_padded(np.arange(request.rows), rows * request.copies))
    prompts = take_prompts(request.prompts, _padded(np.arange(count), rows))
    return options, loop.begin(
        model,
        prompts,
        options,
        capacity=capacity,
        copies=request.copies,
        do_sample=request.do_sample,
        logprobs=request.logprobs,
        cache_dtype=request.cache_dtype,
    )


def _advance(model: Model, request: Request, options: SamplingOptions, state: DecodeState, until: int) -> loop.Report:
    rows = np.int32(len(state.lengths))
    return loop.advance(model, state, options, np.int32(until), rows, do_sample=request.do_sample)


def _platform(model: Model) -> str:
    return next(iter(jax.tree.leaves(model)[0].devices())).platform


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    """Rows up to `size`, copies of the last one."""
    return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)], mode="edge")


# Compiled -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="cache_dtype")
def _read_prefix(
    model: OPTForCausalLM, ids: Int[Array, "1 T"], mask: Bool[Array, "1 T"], cache_dtype: str | None
) -> KVCache | None:
    cache = model.init_cache(ids.shape[0], ids.shape[1], cache_dtype)
    return model.forward(ids, mask, cache=cache, logits_to_keep=1).cache
