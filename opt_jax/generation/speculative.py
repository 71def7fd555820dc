"""Speculative decoding: k tokens of each row are drafted cheaply, and one step of the model verifies all of them.

Drafts come from a smaller model (the assistant) or from earlier tokens of the row (prompt lookup). The results are
those of the model alone: the same tokens in greedy decoding, the same distribution in sampling
(Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Chen et al. 2023, https://arxiv.org/abs/2302.01318).

Every step writes k + 1 columns of the cache for all rows. Each row then accepts a number of drafts. The next step
writes right after the last column that any row keeps. Columns before it that a row does not keep are holes, which
attention masks. When the cache has no columns left, the compiled loop ends, and `compact` removes the holes.

Shapes: R rows, V tokens in the vocabulary, L columns, k drafts, n positions (k + 1 in a step of the model).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from opt_jax.generation import sampling
from opt_jax.generation.drafts import Drafts
from opt_jax.generation.engines import NewTokens, PlainEngine, Slots, new_tokens, place_rows
from opt_jax.generation.loop import DecodeState, FlatModel, Model, Report, as_module
from opt_jax.generation.processors import History
from opt_jax.generation.request import Request
from opt_jax.generation.sampling import SamplingOptions
from opt_jax.model.cache import KVCache
from opt_jax.model.heads import OPTForCausalLM

_DRAFT, _ACCEPT, _CORRECT = range(3)  # the purposes for which a row draws random numbers in a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculation:
    """The state between two steps."""

    state: DecodeState
    cache: KVCache | None  # the assistant's cache, without the last two tokens of each row
    drafted: Int[Array, " R"]  # number of drafted tokens that the model has verified
    accepted: Int[Array, " R"]  # number of these that became new tokens
    full: Bool[Array, ""]  # whether `compact` must remove holes before the next step

    def with_caches(self, change: Callable[[KVCache], KVCache]) -> "Speculation":
        cache, state = self.cache, self.state
        state = dataclasses.replace(state, cache=change(state.cache))
        return dataclasses.replace(self, state=state, cache=None if cache is None else change(cache))


class DraftingEngine(PlainEngine):
    """The engine for speculative decoding: each step of the model gives up to k + 1 tokens of each row."""

    def __init__(self, model: FlatModel, request: Request, drafts: Drafts, rows: int):
        """`rows`: the number of rows that run at a time."""
        super().__init__(model, request, drafts.more_columns(rows), drafts.count + 1)
        self._drafts = drafts

    def begin(self, jobs: np.ndarray) -> tuple[Slots, Report]:
        slots, report = super().begin(jobs)
        copies = self.request.copies if len(jobs) == self.jobs else 1
        return dataclasses.replace(slots, state=self._start(slots.state, copies)), report

    def advance(self, slots: Slots, steps: int, enough: int) -> tuple[Slots, Report]:
        speculation = slots.state
        if np.asarray(speculation.full):
            speculation = compact(speculation)
        speculation, report = advance(
            self.model,
            self._drafts,
            speculation,
            slots.options,
            np.int32(steps),
            np.int32(enough),
            do_sample=self.request.do_sample,
        )
        return dataclasses.replace(slots, state=speculation), report

    def place_state(self, state: Any, jobs: np.ndarray, places: np.ndarray) -> Any:
        return _place(state, self._start(self.new_rows(jobs), 1), places, count=self._drafts.count)

    def results(self, slots: Slots) -> NewTokens:
        drafted, accepted = jax.device_get((slots.state.drafted, slots.state.accepted))
        return dataclasses.replace(new_tokens(slots.state.state), drafted=drafted, accepted=accepted)

    def cache_of(self, slots: Slots) -> KVCache:
        return slots.state.state.cache

    def _start(self, state: DecodeState, copies: int) -> Speculation:
        tokens, lengths = state.tokens, state.prompt_lengths
        return Speculation(state, *_begin(self._drafts, tokens, lengths, width=state.width, copies=copies))


# Compiled -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("width", "copies"))
def _begin(
    drafts: Drafts, tokens: Int[Array, "R L"], prompt_lengths: Int[Array, " R"], *, width: int, copies: int
) -> tuple[KVCache | None, Int[Array, " R"], Int[Array, " R"], Bool[Array, ""]]:
    """Initial fields of a `Speculation`. The assistant's cache holds all tokens of a prompt but the last."""
    zero, full = jnp.zeros_like(prompt_lengths), jnp.zeros((), bool)
    if drafts.assistant is None:
        return None, zero, zero, full
    ids, lengths = tokens[::copies, : width - 1], prompt_lengths[::copies]
    mask = jnp.arange(width - 1, dtype=jnp.int32)[None] >= width - lengths[:, None]
    assistant = as_module(drafts.assistant)
    cache = assistant.init_cache(ids.shape[0], tokens.shape[1], drafts.cache_dtype)
    cache = assistant.forward(ids, mask, cache=cache, logits_to_keep=1).cache
    cache = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0) if x.ndim and copies > 1 else x, cache)
    return cache, zero, zero, full


@partial(jax.jit, static_argnames="do_sample", donate_argnames="speculation")
def advance(
    model: Model,
    drafts: Drafts,
    speculation: Speculation,
    options: SamplingOptions,
    steps: Int[Array, ""],
    enough: Int[Array, ""],
    *,
    do_sample: bool,
) -> tuple[Speculation, Report]:
    """The state after `steps` more steps, or fewer: the loop ends once `enough` rows have ended or a cache is full."""
    until = speculation.state.step + steps

    def wanted(s: Speculation) -> Bool[Array, ""]:
        return (s.state.step < until) & (s.state.ended(options).sum(dtype=jnp.int32) < enough)

    step = partial(_step, as_module(model), drafts, options, do_sample)
    s = lax.while_loop(lambda s: wanted(s) & ~_is_full(s, drafts.count), step, speculation.with_caches(KVCache.squeeze))
    s = dataclasses.replace(s.with_caches(KVCache.unsqueeze), full=_is_full(s, drafts.count))
    columns = s.state.width + s.state.lengths[:, None] - jnp.arange(drafts.count + 1, 0, -1, dtype=jnp.int32)[None]
    last = jnp.take_along_axis(s.state.tokens, jnp.maximum(columns, 0), axis=1)
    return s, Report(last, jnp.copy(s.state.lengths), s.state.ended(options))


@partial(jax.jit, donate_argnums=0)
def compact(s: Speculation) -> Speculation:
    return s.with_caches(KVCache.compact)


def _is_full(s: Speculation, count: int) -> Bool[Array, ""]:
    """Whether a cache has too few columns left for one more step."""
    caches = [s.state.cache] if s.cache is None else [s.state.cache, s.cache]
    return jnp.array([cache.column + count >= cache.max_length for cache in caches]).any()


@partial(jax.jit, static_argnames="count", donate_argnames="s")
def _place(s: Speculation, new: Speculation, places: Int[Array, " r"], *, count: int) -> Speculation:
    """The state with row `places[i]` replaced by row i of `new`, as by `place_rows`.

    The write column may move forward first, so that all columns of the new rows fit before it. The columns that other
    rows skip become holes.
    """

    def put(x: Array, y: Array) -> Array:
        return x.at[places].set(y, mode="drop")

    def behind(cache: KVCache, other: KVCache) -> KVCache:
        return dataclasses.replace(cache, column=jnp.maximum(cache.column, other.column))

    state = dataclasses.replace(s.state, cache=behind(s.state.cache, new.state.cache))
    cache = s.cache
    if cache is not None and new.cache is not None:
        cache = behind(cache, new.cache).replace_rows(places, new.cache)
    s = Speculation(
        state=place_rows(state, new.state, places),
        cache=cache,
        drafted=put(s.drafted, new.drafted),
        accepted=put(s.accepted, new.accepted),
        full=s.full,
    )
    return dataclasses.replace(s, full=_is_full(s, count))


def _step(
    model: OPTForCausalLM, drafts: Drafts, options: SamplingOptions, do_sample: bool, s: Speculation
) -> Speculation:
    state, size = s.state, drafts.count + 1
    ended, columns = state.ended(options), jnp.arange(size, dtype=jnp.int32)[None]
    # Each step gives one token besides the accepted drafts, so a row with room for one more token needs no draft.
    wanted = jnp.where(ended, 0, jnp.clip(options.max_new_tokens - state.lengths - 1, 0, drafts.count))
    tokens, probabilities, wanted, cache = _propose(drafts, s, options, wanted, do_sample)

    mask = (columns <= wanted[:, None]) & ~ended[:, None]
    out = model.forward(jnp.concatenate([state.token[:, None], tokens], axis=1), mask, cache=state.cache)
    emitted, accepted = _verify(out.logits, state, tokens, probabilities, wanted, options, do_sample)
    stops, matched = _stops(state, emitted, options)
    stops &= columns <= accepted[:, None]
    new = jnp.where(stops.any(-1), jnp.argmax(stops, axis=-1).astype(jnp.int32), accepted) + 1
    new = jnp.where(ended, 0, new)

    assert out.cache is not None

    def last(x: Int[Array, "R n"]) -> Int[Array, " R"]:
        return jnp.take_along_axis(x, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0]

    state = dataclasses.replace(
        _written(state, out.logits, emitted, new),
        cache=out.cache.rewind(size, new),
        token=jnp.where(ended, options.pad_token_id, last(emitted)),
        lengths=state.lengths + new,
        stopped=state.stopped | (stops.any(-1) & ~ended),
        matched=None if matched is None else last(matched),  # (not used for rows that have ended)
        step=state.step + 1,
    )
    return dataclasses.replace(
        s,
        state=state,
        # The assistant's cache stays one token behind the model's.
        cache=None if cache is None else cache.rewind(size, new),
        drafted=s.drafted + wanted,
        accepted=s.accepted + jnp.minimum(accepted, new),
    )


def _written(
    state: DecodeState, logits: Float[Array, "R n V"], emitted: Int[Array, "R n"], new: Int[Array, " R"]
) -> DecodeState:
    """The state with the first `new[r]` emitted tokens of row r appended, and their log-probabilities recorded."""
    columns, nowhere = jnp.arange(emitted.shape[1], dtype=jnp.int32)[None], state.tokens.shape[1]
    column = jnp.where(columns < new[:, None], state.lengths[:, None] + columns, nowhere)
    records = state.logprobs
    if records is not None:
        records = lax.fori_loop(
            0, columns.size, lambda i, r: r.record(logits[:, i], emitted[:, i], column[:, i]), records
        )
    return dataclasses.replace(state, tokens=_put(state.tokens, emitted, state.width + column), logprobs=records)


def _stops(
    state: DecodeState, emitted: Int[Array, "R n"], options: SamplingOptions
) -> tuple[Bool[Array, "R n"], Int[Array, "R n"] | None]:
    """Which of the emitted tokens would end their row, and the state of the stop strings after each."""
    tokens = _put(state.tokens, emitted, _behind(state, emitted.shape[1]))
    history = _histories(state, tokens, 1 + jnp.arange(emitted.shape[1], dtype=jnp.int32))
    before, table = state.matched, options.stop_strings
    if before is not None and table is not None:
        follow = lambda matched, token: (table[matched, token].astype(jnp.int32), matched)  # noqa: E731
        before = lax.scan(follow, before, emitted.T)[1].T.reshape(-1)
    stops, matched = sampling.stops(emitted.reshape(-1), history, before, options)
    return stops.reshape(emitted.shape), None if matched is None else matched.reshape(emitted.shape)


# Drafts -------------------------------------------------------------------------------------------------------


def _propose(drafts: Drafts, s: Speculation, options: SamplingOptions, wanted: Int[Array, " R"], do_sample: bool):
    """Drafted tokens [R, k], their distributions [R, k, V] or None, their number [R], and the assistant's cache."""
    if drafts.assistant is None:
        tokens, counts = _look_up(s.state.history(), drafts.ngram, drafts.count)
        return tokens, None, jnp.minimum(wanted, counts), None
    tokens, probabilities, cache = _draft(drafts, s, options, wanted, do_sample)
    return tokens, probabilities, wanted, cache


def _look_up(history: History, ngram: Int[Array, ""], count: int) -> tuple[Int[Array, "R k"], Int[Array, " R"]]:
    """The tokens after an earlier occurrence of the row's last tokens, and their number.

    It takes the longest match of at most `ngram` tokens; among equally long ones the first, as in HF.
    """
    tokens, columns = history.tokens, jnp.arange(history.tokens.shape[1], dtype=jnp.int32)[None]

    def compare(i: Int[Array, ""], state: tuple[Any, Any]) -> tuple[Any, Any]:
        # Match the token i columns before each column with the row's i-th last token.
        agree, length = state
        before, known = (jnp.roll(x, i, axis=1) for x in (tokens, history.valid))
        last = jnp.take_along_axis(tokens, history.column[:, None] - i, axis=1)
        agree &= known & (columns >= i) & (before == last)
        return agree, length + agree.astype(jnp.int32)

    _, length = lax.fori_loop(1, ngram + 1, compare, (history.valid, jnp.zeros_like(tokens)))
    first = jnp.argmax(length, axis=1).astype(jnp.int32)
    counts = jnp.where(length.any(-1), jnp.minimum(history.column - first, count), 0)
    padded = jnp.pad(tokens, ((0, 0), (0, count)))
    return jnp.take_along_axis(padded, first[:, None] + jnp.arange(count, dtype=jnp.int32)[None], axis=1), counts


def _draft(drafts: Drafts, s: Speculation, options: SamplingOptions, wanted: Int[Array, " R"], do_sample: bool):
    """Tokens [R, k] that the assistant drafts, their distributions [R, k, V] (None if greedy), and its cache.

    It reads the last two tokens of each row first: its cache holds neither of them.
    """
    assert drafts.assistant is not None
    state, assistant, count = s.state, as_module(drafts.assistant), drafts.count
    end = state.width + state.lengths

    def choose(tokens: Int[Array, "R L"], logits: Float[Array, "R V"], i: Int[Array, ""]) -> tuple[Any, Any]:
        history = _histories(state, tokens, i[None])
        logits = sampling.process(logits, history, options, do_sample)
        if do_sample:
            return sampling.draw(logits, _keys(options, history.step, _DRAFT)), jax.nn.softmax(logits, axis=-1)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None

    def step(carry: tuple[Any, ...], i: Int[Array, ""]) -> tuple[Any, Any]:
        tokens, logits, cache = carry
        token, probabilities = choose(tokens, logits, i)
        out = assistant.forward(token[:, None], (i + 1 < wanted)[:, None], cache=cache)
        return (_put(tokens, token[:, None], (end + i)[:, None]), out.logits[:, -1], out.cache), (token, probabilities)

    last = jnp.take_along_axis(state.tokens, end[:, None] - jnp.array([[2, 1]], jnp.int32), axis=1)
    mask = jnp.broadcast_to(~state.ended(options)[:, None], last.shape)
    out = assistant.forward(last, mask, cache=s.cache, logits_to_keep=1)
    carry = state.tokens, out.logits[:, -1], out.cache
    (tokens, logits, cache), chosen = lax.scan(step, carry, jnp.arange(count - 1, dtype=jnp.int32))
    chosen = jax.tree.map(
        lambda x, y: jnp.moveaxis(jnp.concatenate([x, y[None]]), 0, 1),
        chosen,
        choose(tokens, logits, jnp.int32(count - 1)),
    )
    return *chosen, cache


def _verify(
    logits: Float[Array, "R n V"],
    state: DecodeState,
    drafts: Int[Array, "R k"],
    probabilities: Float[Array, "R k V"] | None,
    count: Int[Array, " R"],
    options: SamplingOptions,
    do_sample: bool,
) -> tuple[Int[Array, "R n"], Int[Array, " R"]]:
    """The accepted drafts of each row and one more token, and the number of accepted drafts.

    Tokens after these are padding. The logits of each position are processed as if all drafts before it had been
    accepted. `count`: the number of drafted tokens of each row; later columns of `drafts` are padding.
    """
    rows, size, vocab = logits.shape
    history = _histories(state, _put(state.tokens, drafts, _behind(state, size - 1)), jnp.arange(size, dtype=jnp.int32))
    processed = sampling.process(logits.reshape(-1, vocab), history, _repeated(options, rows, size), do_sample).reshape(
        logits.shape
    )
    real = jnp.arange(size - 1, dtype=jnp.int32)[None] < count[:, None]
    if do_sample:
        return _accept_or_correct(processed, state, drafts, probabilities, real, options)
    chosen = jnp.argmax(processed, axis=-1).astype(jnp.int32)
    return chosen, _leading(real & (drafts == chosen[:, :-1]))


def _accept_or_correct(
    logits: Float[Array, "R n V"],
    state: DecodeState,
    drafts: Int[Array, "R k"],
    probabilities: Float[Array, "R k V"] | None,
    real: Bool[Array, "R k"],
    options: SamplingOptions,
) -> tuple[Int[Array, "R n"], Int[Array, " R"]]:
    """The tokens of each row, and the number of accepted drafts.

    Accepts a draft from q with probability min(1, p / q). Replaces the first rejected one by a draw from max(p - q, 0),
    normalised. So each token is distributed as p (theorem 1 of Chen et al.). In prompt lookup, q is 1 at the draft.

    Args:
      logits: the model's, processed; p is their softmax.
      state: the state before the step.
      drafts: the drafted tokens.
      probabilities: q of each draft; None: prompt lookup.
      real: true at drafted tokens, false at padding.
      options: seeds of the rows.
    """
    p = jax.nn.softmax(logits, axis=-1)
    if probabilities is None:
        probabilities = jax.nn.one_hot(drafts, logits.shape[-1], dtype=logits.dtype)
    p_draft, q_draft = (jnp.take_along_axis(x, drafts[..., None], axis=-1)[..., 0] for x in (p[:, :-1], probabilities))
    options_of_drafts = _repeated(options, *drafts.shape)
    steps = state.lengths[:, None] + jnp.arange(drafts.shape[1], dtype=jnp.int32)[None]
    uniform = jax.vmap(partial(jax.random.uniform, dtype=p.dtype))
    chance = uniform(_keys(options_of_drafts, steps.reshape(-1), _ACCEPT)).reshape(drafts.shape)
    accepted = _leading(real & (chance * q_draft < p_draft))

    q = jnp.where(real[..., None], probabilities, 0)  # after the last draft, draw from p
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    p, q = (jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0] for x in (p, q))
    rest = jnp.maximum(p - q, 0)
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)  # p = q up to rounding
    correction = sampling.draw(jnp.log(rest), _keys(options, state.lengths + accepted, _CORRECT))
    drafts = jnp.pad(drafts, ((0, 0), (0, 1)))
    columns = jnp.arange(drafts.shape[1], dtype=jnp.int32)[None]
    return jnp.where(columns < accepted[:, None], drafts, correction[:, None]), accepted


# Helpers ------------------------------------------------------------------------------------------------------


def _histories(state: DecodeState, tokens: Int[Array, "R L"], ahead: Int[Array, " n"]) -> History:
    """Histories of R * n rows: row r * n + i is row r of the state with `ahead[i]` more tokens."""
    n = len(ahead)
    return dataclasses.replace(
        state,
        tokens=jnp.repeat(tokens, n, axis=0),
        prompt_lengths=jnp.repeat(state.prompt_lengths, n),
        lengths=(state.lengths[:, None] + ahead[None]).reshape(-1),
    ).history()


def _repeated(options: SamplingOptions, rows: int, n: int) -> SamplingOptions:
    """The options with each row repeated n times, for R * n rows."""
    names = ("seeds", "samples", "min_new_tokens", "max_new_tokens")
    return dataclasses.replace(
        options, **{name: jnp.repeat(jnp.broadcast_to(getattr(options, name), rows), n) for name in names}
    )


def _keys(options: SamplingOptions, step: Int[Array, " R"], purpose: int) -> Key[Array, " R"]:
    """A key for each row, step and purpose.

    Draws for positions after a rejected draft are discarded, and no result depends on them. Their keys are used again.
    """
    keys = sampling.row_keys(options.seeds, options.samples, step)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)


def _behind(state: DecodeState, n: int) -> Int[Array, "R n"]:
    """The first n columns after the last token."""
    return (state.width + state.lengths)[:, None] + jnp.arange(n, dtype=jnp.int32)[None]


def _put(buffer: Int[Array, "R L"], new: Int[Array, "R n"], columns: Int[Array, "R n"]) -> Int[Array, "R L"]:
    """`buffer` with new[r, i] written to columns[r, i] of row r. A column outside [0, L) is dropped."""
    return buffer.at[jnp.arange(buffer.shape[0], dtype=jnp.int32)[:, None], columns].set(new, mode="drop")


def _leading(x: Bool[Array, "R k"]) -> Int[Array, " R"]:
    """The number of leading true values in each row."""
    return jnp.cumprod(x, axis=1, dtype=jnp.int32).sum(-1, dtype=jnp.int32)
