"""Prompts to continuations: prefill, the compiled decode loop, streaming, scoring. Ids only, no text.

Two compiled functions do the work: `_prefill` reads the prompts and chooses the first token, `_decode` makes steps
until told to stop. Prompts are padded on the left to a few fixed lengths (`bucket`), so that each is compiled once per
bucket, batch size and kind of decoding (which processors are on); everything else is a traced value.
"""

import dataclasses
from collections.abc import Generator, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from opt_jax import beams, processors, sampling
from opt_jax.cache import KVCache
from opt_jax.generation_config import GenerationConfig
from opt_jax.model import OPTForCausalLM
from opt_jax.processors import History
from opt_jax.request import Request, bucket, check_request, check_score
from opt_jax.sampling import SamplingOptions

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

    def __getitem__(self, index: Any) -> Any:
        return self.sequences[index]

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.sequences)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """What is recorded of each column of `DecodeState.tokens`."""

    chosen: Float[Array, "B L"]
    top_ids: Int[Array, "B L n"]
    top: Float[Array, "B L n"]

    def record(self, logits: Float[Array, "B V"], token: Int[Array, " B"], column: Int[Array, ""]) -> "TokenLogprobs":
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        top, ids = lax.top_k(logprobs, self.top.shape[-1])
        return TokenLogprobs(
            chosen=_write(self.chosen, jnp.take_along_axis(logprobs, token[:, None], axis=1), column),
            top_ids=_write(self.top_ids, ids[:, None], column),
            top=_write(self.top, top[:, None], column),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Between two steps. `tokens[:, c]` is the token of cache column c; the last one is not in the cache yet."""

    cache: KVCache
    tokens: Int[Array, "B L"]
    step: Int[Array, ""]  # new tokens so far
    done: Bool[Array, " B"]  # rows that have ended
    lengths: Int[Array, " B"]  # new tokens of each row, its end token included
    logprobs: TokenLogprobs | None

    def history(self) -> History:
        """While the next token is chosen: all tokens are in the cache."""
        return History(self.tokens, self.cache.valid, self.cache.column, self.step)


def generate(
    model: OPTForCausalLM,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> GenerateOutput:
    """Continue each prompt until its end, all with one prefill and one compiled loop (HF `generate`).

    Args:
      input_ids: int [B, T], numpy, jax or nested lists; prompts of different lengths padded on the left.
      attention_mask: [B, T], nonzero at real tokens. Default as in HF: ids other than `pad_token_id`, if that is not an
        end token; else all.
      generation_config: options; those of the checkpoint's `generation_config.json` fill what it leaves open.
      tokenizer: an `OPTTokenizer`, for `stop_strings`.
      **options: as in `GenerationConfig`; they win.

    Raises:
      ValueError: options that contradict each other or have no effect, prompts without a token or padded on the right,
        more positions than the model has, a stacked model (see `unstack_layers`), or one without LM head.
    """
    request = check_request(model, input_ids, attention_mask, generation_config, tokenizer, options)
    if request.beams is not None:
        return _generate_with_beams(model, request)
    state, _, done = _start(model, request)
    if request.stops is None:
        state, _, _ = _advance(model, request, state, request.max_new_tokens)
    else:
        step = 1
        while not request.stops.look(_new_tokens(request, state), np.asarray(done)) and step < request.max_new_tokens:
            step = min(step + _CHECK_EVERY, request.max_new_tokens)
            state, _, done = _advance(model, request, state, step)
    return _output(request, state)


def _output(request: Request, state: DecodeState) -> GenerateOutput:
    tokens, lengths, done, records = jax.device_get((state.tokens, state.lengths, state.done, state.logprobs))
    if request.stops is not None:
        lengths, done = np.minimum(lengths, request.stops.lengths), done | (request.stops.lengths <= lengths)
    columns = slice(request.width, request.width + int(lengths.max()))
    ended = np.arange(columns.stop - columns.start) >= lengths[:, None]
    new = np.where(ended, request.pad_token_id, tokens[:, columns])
    prompts = np.repeat(request.input_ids, request.copies, axis=0)
    output = GenerateOutput(
        sequences=np.concatenate([prompts, new.astype(np.int32)], axis=1),
        lengths=lengths,
        finish_reasons=["stop" if stopped else "length" for stopped in done],
    )
    if records is None:
        return output
    return dataclasses.replace(
        output,
        logprobs=np.where(ended, np.nan, records.chosen[:, columns]),
        top_token_ids=records.top_ids[:, columns],
        top_logprobs=np.where(ended[:, :, None], np.nan, records.top[:, columns]),
    )


def _generate_with_beams(model: OPTForCausalLM, request: Request) -> GenerateOutput:
    assert request.beams is not None
    eos = request.beams["eos_token_ids"]
    out = beams.beam_search(
        model, request.padded_ids, request.mask, max_new_tokens=request.max_new_tokens,
        num_return_sequences=request.copies, pad_token_id=request.pad_token_id, do_sample=request.do_sample,
        process=_beam_process(request.do_sample, len(eos) + 1 if request.do_sample else 1),
        process_options=request.options, capacity=bucket(request.max_new_tokens), cache_dtype=request.cache_dtype,
        **request.beams,
    )  # fmt: skip
    prompts = np.repeat(request.input_ids, request.copies, axis=0)
    last = out.sequences[np.arange(len(prompts)), request.width + out.lengths - 1]
    return GenerateOutput(
        sequences=np.concatenate([prompts, out.sequences[:, request.width :]], axis=1),
        lengths=out.lengths,
        finish_reasons=["stop" if token in eos else "length" for token in last.tolist()],
        sequences_scores=out.sequences_scores,
    )


@cache
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
    **options: Any,
) -> Generator[np.ndarray, None, None]:
    """The same tokens as they are made: an iterator of int32 [R], one for each step, pads for rows that have ended.

    Takes the arguments of `generate` and raises the same errors, at once. The device works on the next token while
    the caller works with this one.
    """
    request = check_request(model, input_ids, attention_mask, generation_config, tokenizer, options)
    if request.logprobs is not None or request.beams is not None:
        what = "logprobs" if request.beams is None else "beams, which are known at the end only,"
        raise ValueError(f"{what} are not streamed: use generate")
    return _stream(model, request)


def _stream(model: OPTForCausalLM, request: Request) -> Generator[np.ndarray, None, None]:
    following = _start(model, request)
    stops, new = request.stops, np.zeros((request.rows, 0), np.int32)
    for step in range(1, request.max_new_tokens + 1):
        state, token, done = following
        if step < request.max_new_tokens:  # dispatched before waiting for this token; does nothing if that was the last
            following = _advance(model, request, state, step + 1)
        token, done = np.asarray(token), np.asarray(done)
        if stops is not None:
            token = np.where(stops.lengths < step, request.pad_token_id, token).astype(np.int32)
            new = np.concatenate([new, token[:, None]], axis=1)
            stops.look(new, done)
            done = done | (stops.lengths <= step)
        yield token
        if done.all():
            return


def score(model: OPTForCausalLM, input_ids: Any, attention_mask: Any = None) -> np.ndarray:
    """The log-probability of each token given those before it, float32 [B, T], by one pass over all (teacher forcing).

    NaN at pads, and at a row's first token, which nothing predicts. What `generate(..., logprobs=0)` records of a
    token is what this says of it.

    Args:
      input_ids, attention_mask: as in `generate`, but pads may be anywhere.

    Raises:
      ValueError: as `generate`, for inputs.
    """
    ids, mask, padded_ids, padded_mask = check_score(model, input_ids, attention_mask)
    logprobs = np.asarray(_score(model, padded_ids, padded_mask))
    result = np.full(ids.shape, np.nan, np.float32)
    result[mask] = logprobs[padded_mask]  # the same tokens in the same order
    result[np.arange(len(ids)), mask.argmax(1)] = np.nan
    return result


# Compiled -----------------------------------------------------------------------------------------------------


def _start(model: OPTForCausalLM, request: Request):
    return _prefill(
        model, request.padded_ids, request.mask, request.options, cache_length=request.cache_length,
        do_sample=request.do_sample, copies=request.copies, logprobs=request.logprobs, cache_dtype=request.cache_dtype,
    )  # fmt: skip


def _advance(model: OPTForCausalLM, request: Request, state: DecodeState, until: int):
    return _decode(model, state, request.options, np.int32(until), do_sample=request.do_sample)


def _new_tokens(request: Request, state: DecodeState) -> np.ndarray:
    tokens, step = jax.device_get((state.tokens, state.step))
    return tokens[:, request.width : request.width + int(step)]


@partial(jax.jit, static_argnames=("cache_length", "do_sample", "copies", "logprobs", "cache_dtype"))
def _prefill(
    model: OPTForCausalLM,
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    options: SamplingOptions,
    *,
    cache_length: int,
    do_sample: bool,
    copies: int = 1,
    logprobs: int | None = None,
    cache_dtype: str | None = None,
) -> tuple[DecodeState, Int[Array, " R"], Bool[Array, " R"]]:
    """Read the prompts, once, and choose the first token of `copies` rows for each. Returns as `_decode`."""
    out = model.forward(ids, mask, cache=model.init_cache(ids.shape[0], cache_length, cache_dtype), logits_to_keep=1)
    assert out.cache is not None
    tokens = jnp.pad(ids, ((0, 0), (0, cache_length - ids.shape[1])))
    cache, tokens, logits = jax.tree.map(
        lambda x: jnp.repeat(x, copies, axis=0) if x.ndim and copies > 1 else x, (out.cache, tokens, out.logits[:, -1])
    )
    rows = tokens.shape[0]
    records = None
    if logprobs is not None:
        top = (*tokens.shape, logprobs)
        records = TokenLogprobs(jnp.zeros(tokens.shape), jnp.zeros(top, jnp.int32), jnp.zeros(top))
    state = DecodeState(
        cache, tokens, jnp.zeros((), jnp.int32), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32), records
    )
    return _report(_append(state, logits, options, do_sample))


@partial(jax.jit, static_argnames="do_sample", donate_argnames="state")
def _decode(
    model: OPTForCausalLM, state: DecodeState, options: SamplingOptions, until: Int[Array, ""], *, do_sample: bool
) -> tuple[DecodeState, Int[Array, " R"], Bool[Array, " R"]]:
    """Steps until there are `until` new tokens or every row has ended.

    Returns the state, for the next call to consume, and two arrays to keep: the last tokens, and which rows have ended.
    """

    def step(state: DecodeState) -> DecodeState:
        out = model.forward(_last_token(state), cache=state.cache)
        return _append(dataclasses.replace(state, cache=out.cache), out.logits[:, -1], options, do_sample)

    return _report(lax.while_loop(lambda s: (s.step < until) & ~s.done.all(), step, state))


def _append(state: DecodeState, logits: Float[Array, "R V"], options: SamplingOptions, do_sample: bool) -> DecodeState:
    """Choose a token for each row that goes on, a pad for the others."""
    token = sampling.choose(logits, state.history(), options, do_sample)
    token = jnp.where(state.done, options.pad_token_id, token)
    column, valid = state.cache.column, state.cache.valid
    tokens = _write(state.tokens, token[:, None], column)
    done = state.done | (token[:, None] == options.eos_token_ids).any(-1)
    if options.stop_sequences is not None:
        after = History(tokens, _write(valid, jnp.ones_like(done)[:, None], column), column + 1, state.step + 1)
        done |= processors.completes(after, options.stop_sequences)
    return DecodeState(
        cache=state.cache,
        tokens=tokens,
        step=state.step + 1,
        done=done,
        lengths=state.lengths + ~state.done,
        logprobs=None if state.logprobs is None else state.logprobs.record(logits, token, column),
    )


def _report(state: DecodeState) -> tuple[DecodeState, Int[Array, " R"], Bool[Array, " R"]]:
    return state, _last_token(state)[:, 0], jnp.copy(state.done)  # the state's own will be donated


def _last_token(state: DecodeState) -> Int[Array, "R 1"]:
    return lax.dynamic_slice_in_dim(state.tokens, state.cache.column, 1, axis=1)


def _write(buffer: Array, new: Array, column: Int[Array, ""]) -> Array:
    """`buffer` [R, L, ...] with `new` [R, 1, ...] in a column."""
    return lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), column, axis=1)


@jax.jit
def _score(model: OPTForCausalLM, ids: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Log-probability of each id given those before; the logits of a few columns at a time, for they are large."""
    hidden = model.model.forward(ids, mask).last_hidden_state
    batch, length = ids.shape
    size = min(length & -length, 128)

    def column(chunk):
        x, following = chunk
        logprobs = jax.nn.log_softmax(model.logits(x), axis=-1)
        return jnp.take_along_axis(logprobs, following[..., None], axis=-1)[..., 0]

    chunks = [
        jnp.moveaxis(x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0)
        for x in (hidden, jnp.roll(ids, -1, axis=1))
    ]
    return jnp.roll(jnp.moveaxis(lax.map(column, tuple(chunks)), 0, 1).reshape(batch, length), 1, axis=1)
