"""Beam search and beam sampling: one prefill for each prompt, one compiled loop. Ids only, no text.

The meaning is that of HF `GenerationMixin._beam_search` (transformers v5; before 5.24 it did not sort what it drew).
The cache is not: there beams are rows of the cache, copied at every step. Here a row of the cache belongs to a prompt:
its columns hold the prompt once and then, for every step, the token of each beam. Which columns a beam descends from is
a table of booleans (`KVCache.branch`), and this table is the attention mask. Beams change places by reordering the
table; keys and values stay where they were written, and each is read once for all the beams of a prompt.

B prompts, N beams of each, M columns for new tokens, V tokens in the vocabulary.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from opt_jax.generation import sampling
from opt_jax.generation.engines import NewTokens, Slots, check_fits, padded
from opt_jax.generation.loop import FlatModel, Model, Prompts, Report, TokenLogprobs, as_module
from opt_jax.generation.processors import History
from opt_jax.generation.request import Request, batch_bucket, bucket, take_prompts
from opt_jax.generation.sampling import SamplingOptions
from opt_jax.model.cache import KVCache

_NEVER = -1e9  # HF's score of what must not be chosen: finite, since sums of it are compared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """What the compiled search is told. Every value but the static ones is traced: other values compile nothing."""

    sampling: SamplingOptions  # for all beams; seeds and samples are not used
    length_penalty: Float[Array, ""]  # scores are divided by length ** length_penalty
    keys: Key[Array, " B"] | None  # draw candidates at random; None: take the best
    early_stopping: bool | Literal["never"] = dataclasses.field(metadata=dict(static=True))
    # What HF's processors of sampling leave at least, so that there are beams left when one ends.
    min_keep: int = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """N sequences of new tokens for each prompt, best first."""

    tokens: Int[Array, "B N M"]
    scores: Float[Array, "B N"]  # running: sum of log-probabilities; finished: the final score
    lengths: Int[Array, "B N"]  # 0: none yet
    stopped: Bool[Array, "B N"]  # ended by an end token, stop sequence or stop string
    matched: Int[Array, "B N"] | None  # state of `SamplingOptions.stop_strings` behind the last token
    logprobs: TokenLogprobs | None  # [B, N, M] and [B, N, M, n]

    def select(self, index: Int[Array, "B n"]) -> "_Beams":
        return jax.tree.map(lambda x: _take(x, index), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """Between two steps. The last token of a running beam is not in the cache yet."""

    cache: KVCache
    prompts: Int[Array, "B W"]  # real tokens last
    prompt_lengths: Int[Array, " B"]
    running: _Beams
    finished: _Beams
    step: Int[Array, ""]  # new tokens so far
    done: Bool[Array, " B"]  # prompts whose finished beams are final


class BeamEngine:
    """The most likely continuations of each prompt, found by following the `num_beams` best ones at every step.

    A job is a prompt, whose rows are its `num_return_sequences` best continuations. All prompts of a batch are at the
    same step, so none can be placed beside others that have begun.
    """

    refills = False

    def __init__(self, model: FlatModel, request: Request):
        self._model, self._request = model, request
        self.jobs, self.rows_per_job = len(request.input_ids), request.copies

    def begin(self, jobs: np.ndarray) -> tuple[Slots, Report]:
        request = self._request
        jobs = padded(jobs, batch_bucket(len(jobs)))
        capacity = bucket(request.max_new_tokens)
        check_fits(self._model, request, len(jobs), request.num_beams * capacity, request.num_beams)
        options = self.options_of(jobs)
        state, report = _begin(
            self._model,
            take_prompts(request.prompts, jobs),
            options,
            num_beams=request.num_beams,
            capacity=capacity,
            logprobs=request.logprobs,
            cache_dtype=request.cache_dtype,
        )
        return Slots(state, options, jobs), report

    def options_of(self, jobs: np.ndarray) -> BeamOptions:
        request, given = self._request, self._request.given
        ends = int((np.asarray(request.options.eos_token_ids) < request.vocab_size).sum())
        return BeamOptions(
            sampling=request.options_of(np.arange(1)),
            length_penalty=jax.device_put(np.float32(1 if given.length_penalty is None else given.length_penalty)),
            keys=self._keys(jobs) if request.do_sample else None,
            early_stopping=given.early_stopping or False,
            min_keep=1 + max(1, ends) if request.do_sample else 1,  # HF: two at least where no token ends
        )

    def _keys(self, jobs: np.ndarray) -> Key[Array, " B"]:
        """One seed: what prompt i draws depends on it and on i. A seed for each prompt: on its seed alone."""
        seeds = np.asarray(self._request.options.seeds)[jobs * self._request.copies]
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        if np.ndim(self._request.given.seed) > 0:
            return keys
        return jax.vmap(jax.random.fold_in)(keys, jnp.asarray(jobs, jnp.int32))

    def advance(self, slots: Slots, steps: int, enough: int) -> tuple[Slots, Report]:
        state, report = advance(self._model, slots.state, slots.options, np.int32(steps), np.int32(enough))
        return dataclasses.replace(slots, state=state), report

    def place(self, slots: Slots, jobs: np.ndarray, places: np.ndarray, size: int) -> Slots:
        raise NotImplementedError("beams of other prompts are at another step")

    def results(self, slots: Slots) -> NewTokens:
        count, finished = self.rows_per_job, jax.device_get(slots.state.finished)
        best = jax.tree.map(lambda x: x[:, :count].reshape(-1, *x.shape[2:]), finished)
        return NewTokens(best.tokens, best.lengths, best.stopped, best.logprobs, scores=best.scores)


# Compiled -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("num_beams", "capacity", "logprobs", "cache_dtype"))
def _begin(
    model: Model,
    prompts: Prompts,
    options: BeamOptions,
    *,
    num_beams: int,
    capacity: int,
    logprobs: int | None,
    cache_dtype: str | None,
) -> tuple[BeamState, Report]:
    """Read the prompts and choose the first token of each beam. capacity: M."""
    model, (batch, length) = as_module(model), prompts.ids.shape
    if prompts.prefix is None:
        cache = model.init_cache(batch, length + num_beams * capacity, cache_dtype)
    else:
        cache = prompts.prefix.extend(batch, prompts.prefix.max_length + length + num_beams * capacity)
    out = model.forward(prompts.ids, prompts.mask, cache=cache, logits_to_keep=1)
    assert out.cache is not None
    state = new_state(prompts, out.cache.branch(num_beams), options, num_beams, capacity, logprobs)
    logits = jnp.broadcast_to(out.logits, (batch, num_beams, out.logits.shape[-1]))
    return _report(add_tokens(state, logits, options))


@partial(jax.jit, donate_argnames="state")
def advance(
    model: Model, state: BeamState, options: BeamOptions, steps: Int[Array, ""], enough: Int[Array, ""]
) -> tuple[BeamState, Report]:
    """Make `steps` steps, or fewer if `enough` prompts are done before."""
    model, until = as_module(model), state.step + steps

    def step(state: BeamState) -> BeamState:
        token = lax.dynamic_index_in_dim(state.running.tokens, state.step - 1, axis=2, keepdims=False)
        positions = jnp.broadcast_to(state.cache.next_position[:, None], token.shape)
        out = model.forward(token, position_ids=positions, cache=state.cache)
        assert out.cache is not None
        return add_tokens(dataclasses.replace(state, cache=out.cache), out.logits, options)

    def go_on(state: BeamState) -> Bool[Array, ""]:
        return (state.step < until) & (state.done.sum(dtype=jnp.int32) < enough)

    return _report(lax.while_loop(go_on, step, state))


def new_state(
    prompts: Prompts, cache: KVCache, options: BeamOptions, num_beams: int, capacity: int, logprobs: int | None
) -> BeamState:
    """Before the first token. cache: of the prompts, branched."""
    shape, matched, records = (len(prompts.ids), num_beams), prompts.matched, None
    if matched is not None:
        matched = jnp.broadcast_to(matched[:, None], shape)
    if logprobs is not None:
        one, top = (*shape, capacity), (*shape, capacity, logprobs)
        records = TokenLogprobs(jnp.zeros(one, jnp.float32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32))
    # All the beams of a prompt begin as one: the first counts, the others must not repeat it.
    first = jnp.where(jnp.arange(num_beams) == 0, 0.0, _NEVER).astype(jnp.float32)
    running = _Beams(
        tokens=jnp.full((*shape, capacity), options.sampling.pad_token_id, jnp.int32),
        scores=jnp.broadcast_to(first, shape),
        lengths=jnp.zeros(shape, jnp.int32),
        stopped=jnp.zeros(shape, bool),
        matched=matched,
        logprobs=records,
    )
    return BeamState(
        cache=cache,
        prompts=prompts.tokens,
        prompt_lengths=prompts.lengths,
        running=running,
        finished=dataclasses.replace(running, scores=jnp.full(shape, _NEVER, jnp.float32)),
        step=jnp.zeros((), jnp.int32),
        done=jnp.zeros(shape[0], bool),
    )


def _report(state: BeamState) -> tuple[BeamState, Report]:
    """Of the best running beams, in the place of rows."""
    token = lax.dynamic_index_in_dim(state.running.tokens[:, 0], state.step - 1, axis=1)
    return state, Report(token, jnp.copy(state.running.lengths[:, 0]), jnp.copy(state.done))


def add_tokens(state: BeamState, logits: Float[Array, "B N V"], options: BeamOptions) -> BeamState:
    """The state with one more token of each beam: candidates, which of them go on, which are finished."""
    beams, vocabulary = logits.shape[1:]
    eos, penalty = options.sampling.eos_token_ids, options.length_penalty
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    totals = _processed(state, log_probs, options) + state.running.scores[:, :, None]
    totals = totals.reshape(len(totals), -1)

    # So many that `beams` of them are left to go on if each beam proposes all the end tokens.
    most = min((1 + eos.size) * beams, totals.shape[1])
    count = jnp.maximum(2, 1 + (eos < vocabulary).sum(dtype=jnp.int32)) * beams
    index = _candidates(totals, most, count, options.keys, state.step)
    candidates = _grown(state, index, _take(totals, index), log_probs, options.sampling)
    most_new = options.sampling.max_new_tokens[0]  # the same for all
    ends = candidates.stopped | (candidates.lengths >= most_new)

    # Ended ones stay behind, unless there are no others; the best `beams` candidates only may finish (HF's rules).
    counted = jnp.arange(most, dtype=jnp.int32)[None] < count
    going_on = jnp.where(counted, candidates.scores + jnp.where(ends, _NEVER, 0.0), -jnp.inf)
    scores, chosen = lax.top_k(going_on, beams)
    running = dataclasses.replace(candidates.select(chosen), scores=scores)
    finished = _finish(state.finished, candidates, ends & ~state.done[:, None], penalty)

    best_length = length = state.step + 1
    if options.early_stopping == "never":
        best_length = jnp.where(penalty > 0, most_new, length)
    done = state.done | ~_can_improve(running, finished, best_length, penalty)
    done |= (ends | ~counted).all(1)
    if options.early_stopping is True:
        done |= (finished.lengths > 0).all(1)
    cache = state.cache.select(_take(index // vocabulary, chosen))
    return dataclasses.replace(state, cache=cache, running=running, finished=finished, step=length, done=done)


def _grown(
    state: BeamState,
    index: Int[Array, "B C"],
    scores: Float[Array, "B C"],
    log_probs: Float[Array, "B N V"],
    options: SamplingOptions,
) -> _Beams:
    """The candidates, longer by a token than the beams that they continue. index: beam * V + token."""
    parent, token = index // log_probs.shape[-1], index % log_probs.shape[-1]
    beams, step = state.running.select(parent), state.step
    tokens = lax.dynamic_update_slice_in_dim(beams.tokens, token[:, :, None], step, axis=2)
    matched = None if beams.matched is None else beams.matched.reshape(-1)
    stopped, matched = sampling.stops(token.reshape(-1), _history(state, tokens, step + 1), matched, options)
    records = beams.logprobs
    if records is not None:
        top, ids = (_take(x, parent) for x in lax.top_k(log_probs, records.top.shape[-1]))
        chosen = _take(log_probs.reshape(len(log_probs), -1), index)
        write = partial(lax.dynamic_update_slice_in_dim, start_index=step, axis=2)
        records = TokenLogprobs(
            chosen=write(records.chosen, chosen[:, :, None]),
            top_ids=write(records.top_ids, ids[:, :, None]),
            top=write(records.top, top[:, :, None]),
        )
    return _Beams(
        tokens=tokens,
        scores=scores,
        lengths=jnp.full_like(index, step + 1),
        stopped=stopped.reshape(index.shape),
        matched=None if matched is None else matched.reshape(index.shape),
        logprobs=records,
    )


def _history(state: BeamState, tokens: Int[Array, "B n M"], step: Int[Array, ""]) -> History:
    """Of B * n rows, `step` new tokens each."""
    (batch, n, capacity), width = tokens.shape, state.prompts.shape[1]
    prompts, lengths = (jnp.repeat(x, n, axis=0) for x in (state.prompts, state.prompt_lengths))
    columns = jnp.arange(width + capacity, dtype=jnp.int32)[None]
    valid = (columns >= width - lengths[:, None]) & (columns < width + step)
    joined = jnp.concatenate([prompts, tokens.reshape(batch * n, capacity)], axis=1)
    column, new = (jnp.full(batch * n, x, jnp.int32) for x in (width + step, step))
    return History(joined, valid, column, new)


def _processed(state: BeamState, log_probs: Float[Array, "B N V"], options: BeamOptions) -> Float[Array, "B N V"]:
    history = _history(state, state.running.tokens, state.step)
    flat = log_probs.reshape(-1, log_probs.shape[-1])
    flat = sampling.process(flat, history, options.sampling, options.keys is not None, options.min_keep)
    return flat.reshape(log_probs.shape)


def _candidates(
    totals: Float[Array, "B C"], most: int, count: Int[Array, ""], keys: Key[Array, " B"] | None, step: Int[Array, ""]
) -> Int[Array, "B most"]:
    """The largest; or `count` drawn without replacement from softmax(totals), and others behind them. In order."""
    if keys is None:
        return lax.top_k(totals, most)[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), totals.shape[1:], jnp.float32))(keys)
    drawn = lax.top_k(totals + noise, most)[1]  # Gumbel top-k: https://arxiv.org/abs/1903.06059
    scores = jnp.where(jnp.arange(most, dtype=jnp.int32)[None] < count, _take(totals, drawn), -jnp.inf)
    return _take(drawn, lax.top_k(scores, most)[1])


def _finish(finished: _Beams, candidates: _Beams, ends: Bool[Array, "B C"], length_penalty: Float[Array, ""]) -> _Beams:
    """The best of what was finished before and the best N candidates, where these have ended."""
    beams = finished.scores.shape[1]
    new = jax.tree.map(lambda x: x[:, :beams], candidates)
    scores = jnp.where(ends[:, :beams], new.scores / _power(new.lengths, length_penalty), -jnp.inf)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), finished, dataclasses.replace(new, scores=scores))
    return both.select(lax.top_k(both.scores, beams)[1])


def _can_improve(
    running: _Beams, finished: _Beams, best_length: Int[Array, ""], length_penalty: Float[Array, ""]
) -> Bool[Array, " B"]:
    """Whether the best running beam may end better than the worst finished one (HF's heuristic)."""
    best = running.scores[:, :1] / _power(best_length, length_penalty)
    worst = jnp.where(finished.lengths > 0, finished.scores.min(1, keepdims=True), _NEVER)
    return (best > worst).any(1)


def _power(length: Int[Array, "..."], exponent: Float[Array, ""]) -> Float[Array, "..."]:
    return jnp.power(length.astype(jnp.float32), exponent)


def _take(x: Array, index: Int[Array, "B n"]) -> Array:
    """x[b, index[b]] for every prompt b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
