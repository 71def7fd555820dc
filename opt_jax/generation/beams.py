"""Beam search and beam sampling: one prefill for each prompt, one compiled loop. Token ids only, no text.

The results are those of HF `GenerationMixin._beam_search` (transformers v5; before 5.24 it did not sort the candidates
that it drew). The cache differs. In HF each beam is a row of the cache, and rows are copied at every step. Here each
prompt is a row of the cache. Its columns hold the prompt once and then, for every step, one token of each beam. A table
of booleans (`KVCache.branch`) says which columns are ancestors of a beam; this table is the attention mask. Reordering
beams reorders the table. Keys and values are never moved, and all beams of a prompt share one read of them.

Shapes: B prompts, N beams of each, M columns for new tokens, V tokens in the vocabulary, C candidates.
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
from opt_jax.generation.loop import FlatModel, Model, Prompts, Report, TokenLogprobs, as_module, read
from opt_jax.generation.processors import History
from opt_jax.generation.prompts import batch_bucket, bucket, take_prompts
from opt_jax.generation.request import Request
from opt_jax.generation.sampling import SamplingOptions
from opt_jax.model.cache import KVCache

_NEVER = -1e9  # HF's score of a beam that must not be chosen; finite, because sums of such scores are compared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """Options of the compiled search. All values but the static ones are traced, so new values do not recompile."""

    sampling: SamplingOptions  # the same for all beams; `seeds` and `samples` are unused
    length_penalty: Float[Array, ""]  # scores are divided by length ** length_penalty
    keys: Key[Array, " B"] | None  # to draw candidates at random; None: take the best
    early_stopping: bool | Literal["never"] = dataclasses.field(metadata=dict(static=True))
    # The sampling processors keep at least this many tokens (as in HF), so that enough beams are left when one ends.
    min_keep: int = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """N sequences of new tokens for each prompt, best first."""

    tokens: Int[Array, "B N M"]
    scores: Float[Array, "B N"]  # of running beams: sum of log-probabilities; of finished beams: final score
    lengths: Int[Array, "B N"]  # number of new tokens; 0: there is no beam in this place yet
    stopped: Bool[Array, "B N"]  # ended by an end token, stop sequence or stop string
    matched: Int[Array, "B N"] | None  # state of `SamplingOptions.stop_strings` after the last token
    logprobs: TokenLogprobs | None  # arrays [B, N, M] and [B, N, M, n]

    def select(self, index: Int[Array, "B n"]) -> "_Beams":
        return jax.tree.map(lambda x: _take(x, index), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """The state between two steps. The last token of each running beam is not in the cache yet."""

    cache: KVCache
    prompts: Int[Array, "B W"]  # padded on the left
    prompt_lengths: Int[Array, " B"]
    running: _Beams
    finished: _Beams
    step: Int[Array, ""]  # number of new tokens in each running beam
    done: Bool[Array, " B"]  # True where the finished beams of a prompt cannot change any more


class BeamEngine:
    """An engine for beam search: at every step it keeps the `num_beams` best continuations of each prompt.

    A job is a prompt; its rows are its `num_return_sequences` best continuations. All prompts of a batch are at the
    same step. A new prompt therefore cannot join a batch that has begun.
    """

    refills = False

    def __init__(self, model: FlatModel, request: Request):
        self._model, self._request = model, request
        self.jobs, self.rows_per_job = len(request.input_ids), request.copies

    def begin(self, jobs: np.ndarray) -> tuple[Slots, Report]:
        request = self._request
        jobs = padded(jobs, batch_bucket(len(jobs)))
        capacity = bucket(request.max_new_tokens)
        num_beams = request.num_beams
        records = (3 + request.options.eos_token_ids.size) * num_beams  # running, finished, and candidates
        check_fits(self._model, request, len(jobs), num_beams * capacity, num_beams, records)
        options = self.options_of(jobs)
        state, report = _begin(
            self._model,
            take_prompts(request.prompts, jobs, cut=False),  # or each batch might compile
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
            min_keep=1 + max(1, ends) if request.do_sample else 1,  # as in HF: at least 2 without an end token
        )

    def _keys(self, jobs: np.ndarray) -> Key[Array, " B"]:
        """A key for each prompt: from its seed and, if one seed was given for all, from the index of its job."""
        seeds = np.asarray(self._request.options.seeds)[jobs * self._request.copies]
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        if np.ndim(self._request.given.seed) > 0:
            return keys
        return jax.vmap(jax.random.fold_in)(keys, jnp.asarray(jobs, jnp.int32))

    def advance(self, slots: Slots, steps: int, enough: int) -> tuple[Slots, Report]:
        state, report = advance(self._model, slots.state, slots.options, np.int32(steps), np.int32(enough))
        return dataclasses.replace(slots, state=state), report

    def place(self, slots: Slots, jobs: np.ndarray, places: np.ndarray, size: int) -> Slots:
        raise NotImplementedError("beam search cannot add prompts to a batch that has begun")

    def results(self, slots: Slots) -> NewTokens:
        count, finished = self.rows_per_job, jax.device_get(slots.state.finished)
        best = jax.tree.map(lambda x: x[:, :count].reshape(len(x) * count, *x.shape[2:]), finished)
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
    """The state after the prompts were read and the first token of each beam was chosen. `capacity` is M."""
    model = as_module(model)
    out = read(model, prompts, num_beams * capacity, cache_dtype)
    assert out.cache is not None
    state = new_state(prompts, out.cache.branch(num_beams), options, num_beams, capacity, logprobs)
    logits = jnp.broadcast_to(out.logits, (len(out.logits), num_beams, out.logits.shape[-1]))
    return _report(add_tokens(state, logits, options))


@partial(jax.jit, donate_argnames="state")
def advance(
    model: Model, state: BeamState, options: BeamOptions, steps: Int[Array, ""], enough: Int[Array, ""]
) -> tuple[BeamState, Report]:
    """The state after `steps` more steps, or fewer: the loop ends once `enough` prompts are done."""
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
    """The state before the first token. `cache` holds the prompts, and has one branch for each beam."""
    shape, matched, records = (len(prompts.mask), num_beams), prompts.matched, None
    if matched is not None:
        matched = jnp.broadcast_to(matched[:, None], shape)
    if logprobs is not None:
        records = TokenLogprobs.empty(shape, capacity, logprobs)
    # All beams of a prompt begin equal. Only the first one may be continued, or all would choose the same tokens.
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
    """The state, and a report about the best running beam of each prompt."""
    token = lax.dynamic_index_in_dim(state.running.tokens[:, 0], state.step - 1, axis=1)
    return state, Report(token, jnp.copy(state.running.lengths[:, 0]), jnp.copy(state.done))


def add_tokens(state: BeamState, logits: Float[Array, "B N V"], options: BeamOptions) -> BeamState:
    """The state with one more token in each beam.

    Each beam proposes candidates. The best of them become the running beams; those that end may join the finished ones.
    """
    beams, vocabulary = logits.shape[1:]
    eos, penalty = options.sampling.eos_token_ids, options.length_penalty
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    totals = _processed(state, log_probs, options) + state.running.scores[:, :, None]
    totals = totals.reshape(len(totals), -1)

    # Enough candidates that `beams` of them go on even if every beam proposes all end tokens.
    most = min((1 + eos.size) * beams, totals.shape[1])
    count = jnp.maximum(2, 1 + (eos < vocabulary).sum(dtype=jnp.int32)) * beams
    index = _candidates(totals, most, count, options.keys, state.step)
    candidates = _grown(state, index, _take(totals, index), log_probs, options.sampling)
    most_new = options.sampling.max_new_tokens[0]  # the same for all
    ends = candidates.stopped | (candidates.lengths >= most_new)

    # HF's rules: candidates that end are continued only if there are no others; only the best `beams` may finish.
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
    """The candidates: beams with one token appended. `index` is beam * V + token."""
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
    """The history of B * n rows, each with `step` new tokens."""
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
    """Indices of `most` candidates, best first.

    Without keys these are the largest totals. With keys, the first `count` are drawn without replacement from
    softmax(totals), and the rest is padding.
    """
    if keys is None:
        return lax.top_k(totals, most)[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), totals.shape[1:], jnp.float32))(keys)
    drawn = lax.top_k(totals + noise, most)[1]  # Gumbel top-k: https://arxiv.org/abs/1903.06059
    scores = jnp.where(jnp.arange(most, dtype=jnp.int32)[None] < count, _take(totals, drawn), -jnp.inf)
    return _take(drawn, lax.top_k(scores, most)[1])


def _finish(finished: _Beams, candidates: _Beams, ends: Bool[Array, "B C"], length_penalty: Float[Array, ""]) -> _Beams:
    """The N best of the finished beams and of those among the best N candidates that end."""
    beams = finished.scores.shape[1]
    new = jax.tree.map(lambda x: x[:, :beams], candidates)
    scores = jnp.where(ends[:, :beams], new.scores / _power(new.lengths, length_penalty), -jnp.inf)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), finished, dataclasses.replace(new, scores=scores))
    return both.select(lax.top_k(both.scores, beams)[1])


def _can_improve(
    running: _Beams, finished: _Beams, best_length: Int[Array, ""], length_penalty: Float[Array, ""]
) -> Bool[Array, " B"]:
    """Whether the best running beam may still beat the worst finished one (HF's heuristic)."""
    best = running.scores[:, :1] / _power(best_length, length_penalty)
    worst = jnp.where(finished.lengths > 0, finished.scores.min(1, keepdims=True), _NEVER)
    return (best > worst).any(1)


def _power(length: Int[Array, "..."], exponent: Float[Array, ""]) -> Float[Array, "..."]:
    return jnp.power(length.astype(jnp.float32), exponent)


def _take(x: Array, index: Int[Array, "B n"]) -> Array:
    """x[b, index[b]] for every prompt b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
