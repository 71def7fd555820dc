"""The compiled functions of plain decoding: the prefill, and the loop that appends tokens. Token ids only, no text."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from opt_jax.generation import sampling
from opt_jax.generation.processors import History
from opt_jax.generation.sampling import SamplingOptions
from opt_jax.model.cache import KVCache
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.outputs import CausalLMOutput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FlatModel:
    """A flattened model: its leaves, and the tree structure that makes a model of them.

    A compiled function flattens its arguments at each call. For the modules of 24 layers that takes 3 ms, which can be
    longer than a decoding step on an accelerator. A FlatModel is flattened already.
    """

    leaves: Sequence[Any]
    structure: Any = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, model: OPTForCausalLM) -> "FlatModel":
        return cls(*jax.tree.flatten(model))

    def model(self) -> OPTForCausalLM:
        return jax.tree.unflatten(self.structure, self.leaves)


Model = OPTForCausalLM | FlatModel
# Of loops. XLA's code for a CPU has vectors of 256 bits unless asked for more. With 512, where the processor has them,
# the product of a matrix and one row reads memory up to 10 % faster (docs/performance.md). Others ignore the option.
COMPILER_OPTIONS = {"xla_cpu_prefer_vector_width": 512}


def as_module(model: Model) -> OPTForCausalLM:
    return model.model() if isinstance(model, FlatModel) else model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts in the form that compiled code takes, padded on the left."""

    ids: Int[Any, "B T"] | None  # the tokens that the prefill reads; None: it reads `embeds`
    mask: Bool[Any, "B T"]
    tokens: Int[Any, "B W"]  # all tokens before the new ones: the prefix and the prompts
    lengths: Int[Any, " B"]  # number of real tokens in `tokens`
    prefix: KVCache | None = None
    matched: Int[Any, " B"] | None = None  # state of `SamplingOptions.stop_strings` after the prompt
    embeds: Float[Any, "B T P"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of each new token and of the n most likely ones."""

    chosen: Float[Array, "R N"]
    top_ids: Int[Array, "R N n"]
    top: Float[Array, "R N n"]

    @classmethod
    def empty(cls, rows: tuple[int, ...], columns: int, top: int) -> "TokenLogprobs":
        chosen, shape = (*rows, columns), (*rows, columns, top)
        return cls(jnp.zeros(chosen, jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    def record(self, logits: Float[Array, "R V"], token: Int[Array, " R"], column: Int[Array, " R"]) -> "TokenLogprobs":
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        top, ids = lax.top_k(logprobs, self.top.shape[-1])
        return TokenLogprobs(
            chosen=_write(self.chosen, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], column),
            top_ids=_write(self.top_ids, ids, column),
            top=_write(self.top, top, column),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state between two steps. The last token of each row is not in the cache yet.

    Columns of `tokens` are not those of the cache: the new tokens of every row begin at column `width` of `tokens`,
    right after the prompt.
    """

    cache: KVCache
    tokens: Int[Array, "R L"]
    token: Int[Array, " R"]  # the last token; a pad if the row ended in an earlier step
    prompt_lengths: Int[Array, " R"]
    lengths: Int[Array, " R"]  # new tokens of each row, its end token included
    stopped: Bool[Array, " R"]  # True: ended by an end token, stop sequence or stop string
    step: Int[Array, ""]  # number of steps so far
    logprobs: TokenLogprobs | None
    matched: Int[Array, " R"] | None  # state of `SamplingOptions.stop_strings` after the last token
    width: int = dataclasses.field(metadata=dict(static=True))

    def history(self) -> History:
        columns, end = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None], self.width + self.lengths
        valid = (columns >= self.width - self.prompt_lengths[:, None]) & (columns < end[:, None])
        return History(self.tokens, valid, end, self.lengths)

    def ended(self, options: SamplingOptions) -> Bool[Array, " R"]:
        return self.stopped | (self.lengths >= options.max_new_tokens)


class Report(NamedTuple):
    """What the host reads after a call. These are copies, because the next call donates the state."""

    tokens: Int[Array, "R n"]  # the last tokens of each row
    lengths: Int[Array, " R"]  # new tokens of each row so far
    ended: Bool[Array, " R"]


def read(model: OPTForCausalLM, prompts: Prompts, columns: int, cache_dtype: str | None) -> CausalLMOutput:
    """The last logits of the prompts, and a cache that holds them and has `columns` more columns."""
    batch, columns, prefix = len(prompts.mask), prompts.mask.shape[1] + columns, prompts.prefix
    cache = model.init_cache(batch, columns, cache_dtype) if prefix is None else prefix.extend(batch, columns)
    return model.forward(prompts.ids, prompts.mask, inputs_embeds=prompts.embeds, cache=cache, logits_to_keep=1)


@partial(jax.jit, static_argnames=("capacity", "do_sample", "copies", "logprobs", "cache_dtype"))
def begin(
    model: Model,
    prompts: Prompts,
    options: SamplingOptions,
    *,
    capacity: int,
    do_sample: bool,
    copies: int = 1,
    logprobs: int | None = None,
    cache_dtype: str | None = None,
) -> tuple[DecodeState, Report]:
    """The state after each prompt was read once and the first token of its `copies` rows was chosen.

    `capacity`: number of columns of the cache for new tokens.
    """
    model = as_module(model)
    out = read(model, prompts, capacity, cache_dtype)
    cache, tokens, lengths, matched, logits = jax.tree.map(
        lambda x: jnp.repeat(x, copies, axis=0) if x.ndim and copies > 1 else x,
        (out.cache, prompts.tokens, prompts.lengths, prompts.matched, out.logits[:, -1]),
    )
    rows, width = tokens.shape
    zero = jnp.zeros(rows, jnp.int32)
    state = DecodeState(
        cache=cache,
        tokens=jnp.pad(tokens, ((0, 0), (0, capacity))),
        token=zero,
        prompt_lengths=lengths,
        lengths=zero,
        stopped=zero > 0,
        step=jnp.zeros((), jnp.int32),
        logprobs=None if logprobs is None else TokenLogprobs.empty((rows,), capacity, logprobs),
        matched=matched,
        width=width,
    )
    return _report(_append(state, logits, options, do_sample), options)


@partial(jax.jit, static_argnames="do_sample", donate_argnames="state", compiler_options=COMPILER_OPTIONS)
def advance(
    model: Model,
    state: DecodeState,
    options: SamplingOptions,
    steps: Int[Array, ""],
    enough: Int[Array, ""],
    *,
    do_sample: bool,
) -> tuple[DecodeState, Report]:
    """The state after `steps` more steps, or fewer: the loop ends once `enough` rows have ended."""
    model, until = as_module(model), state.step + steps

    def step(state: DecodeState) -> DecodeState:
        out = model.forward(state.token[:, None], cache=state.cache.wrap().pin())
        return _append(dataclasses.replace(state, cache=out.cache), out.logits[:, -1], options, do_sample)

    def go_on(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < until) & (state.ended(options).sum(dtype=jnp.int32) < enough)

    state = lax.while_loop(go_on, step, dataclasses.replace(state, cache=state.cache.squeeze()))
    return _report(dataclasses.replace(state, cache=state.cache.unsqueeze()), options)


def _append(state: DecodeState, logits: Float[Array, "R V"], options: SamplingOptions, do_sample: bool) -> DecodeState:
    """The state with one more token in each row, and a pad as the token of rows that have ended."""
    ended, nowhere = state.ended(options), state.tokens.shape[1]
    token = sampling.choose(logits, state.history(), options, do_sample)
    token = jnp.where(ended, options.pad_token_id, token)
    column, records = jnp.where(ended, nowhere, state.lengths), state.logprobs
    state = dataclasses.replace(
        state,
        tokens=_write(state.tokens, token, jnp.where(ended, nowhere, state.width + state.lengths)),
        token=token,
        lengths=state.lengths + (~ended).astype(jnp.int32),
        step=state.step + 1,
        logprobs=None if records is None else records.record(logits, token, column),
    )
    stops, matched = sampling.stops(token, state.history(), state.matched, options)
    return dataclasses.replace(state, stopped=state.stopped | stops & ~ended, matched=matched)


def _report(state: DecodeState, options: SamplingOptions) -> tuple[DecodeState, Report]:
    return state, Report(state.token[:, None], jnp.copy(state.lengths), state.ended(options))


def _write(buffer: Array, new: Array, column: Int[Array, " R"]) -> Array:
    """`buffer` [R, L, ...] with `new[r]` written to column[r] of row r. A column outside [0, L) is dropped."""
    return buffer.at[jnp.arange(buffer.shape[0], dtype=jnp.int32), column].set(new.astype(buffer.dtype), mode="drop")
