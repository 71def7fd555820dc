"""Beam search and beam sampling: one prefill for each prompt, one compiled loop. Ids only, no text.

The meaning is that of HF `GenerationMixin._beam_search` (transformers v5; before 5.24 it did not sort what it drew).
The cache is not: there beams are rows of the cache, copied at every step. Here a row of the cache belongs to a prompt:
its columns hold the prompt once and then, for every step, the token of each beam. Which columns a beam descends from is
a table of booleans (`KVCache.branch`), and this table is the attention mask. Beams change places by reordering the
table; keys and values stay where they were written, and each is read once for all the beams of a prompt.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from opt_jax.generation.config import check_ids
from opt_jax.model.cache import KVCache
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.ids import as_ids, as_mask

_NEVER = -1e9  # HF's score of what must not be chosen: finite, since sums of it are compared
_EOS_SLOTS = 8  # more end tokens than this compile anew

# (options, log_probs [B * N, V], tokens [B * N, L], which of them are real [B * N, L], column of the next token
# [B * N], number of new tokens so far [B * N]) -> log_probs
Process = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class BeamOutput:
    """The R best sequences of each prompt, best first; row b * R + r is sequence r of prompt b."""

    sequences: np.ndarray  # int32 [B * R, T + new]: the prompt, the new tokens with the end token, then pads
    sequences_scores: np.ndarray  # float32 [B * R]: sum of log-probabilities / (number of new tokens) ** length_penalty
    lengths: np.ndarray  # int32 [B * R]: number of new tokens, the end token included


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """What the compiled search is told; every value is traced: other values compile nothing."""

    max_new_tokens: Int[Array, ""]
    length_penalty: Float[Array, ""]
    eos_token_ids: Int[Array, " E"]  # filled up with ids no token has
    pad_token_id: Int[Array, ""]
    process: Any = None  # the first argument of `process`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """N sequences of new tokens for each prompt, best first."""

    tokens: Int[Array, "B N M"]
    scores: Float[Array, "B N"]  # running: sum of log-probabilities; finished: the final score
    lengths: Int[Array, "B N"]  # 0: none yet

    def select(self, index: Int[Array, "B n"]) -> "_Beams":
        return jax.tree.map(lambda x: _take(x, index), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Between two steps. The last token of a running beam is not in the cache yet."""

    cache: KVCache
    running: _Beams
    finished: _Beams
    step: Int[Array, ""]  # new tokens so far
    done: Bool[Array, " B"]  # prompts whose finished beams are final


def beam_search(
    model: OPTForCausalLM,
    ids: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    max_new_tokens: int,
    num_beams: int,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    do_sample: bool = False,
    seed: int | Sequence[int] | np.ndarray = 0,
    first_row: int = 0,
    process: Process | None = None,
    process_options: Any = None,
    capacity: int | None = None,
    cache_dtype: str | None = None,
) -> BeamOutput:
    """The most likely continuations found by following the `num_beams` best ones at every step.

    Args:
      ids, mask: prompts padded on the left; mask is true at real tokens.
      max_new_tokens: the most tokens to add.
      num_beams: sequences kept per prompt.
      num_return_sequences: of these, how many are returned; at most num_beams.
      length_penalty: scores are divided by length ** length_penalty: above 0 favours long sequences.
      early_stopping: when a prompt is done. True: when it has num_beams finished sequences. False: when the best
        running beam, scored at its present length, is worse than the worst finished one. "never": when no continuation
        of it up to max_new_tokens can be better.
      eos_token_ids: end tokens, maybe none.
      pad_token_id: fills sequences that have ended.
      do_sample: draw the candidates of a step at random, without replacement, by their accumulated probability.
      seed: in [0, 2**32). One number: what row i draws depends on it and on i; or one number per row, which alone then
        decides what that row draws.
      first_row: the row i of the first prompt, for a part of a batch with one seed.
      process: changes log-probabilities before they are added up (HF: logits processors); a module-level function, as
        each new function compiles anew. `process_options` is its first argument, a pytree of traced values.
      capacity: compile for this many new tokens, so that any max_new_tokens up to it needs no other compilation.
      cache_dtype: of keys and values; None: the compute dtype.

    Raises:
      ValueError: arguments outside of these ranges, more positions than the model has.
    """
    ids, mask = as_ids("ids", ids, 0, model.config.vocab_size - 1), as_mask("mask", mask)
    capacity = max_new_tokens if capacity is None else capacity
    _check(model, ids, mask, max_new_tokens, num_beams, num_return_sequences, length_penalty, early_stopping, capacity)
    beams = _search(
        model,
        ids,
        mask,
        _options(model, max_new_tokens, length_penalty, eos_token_ids, pad_token_id, process_options),
        _row_keys(seed, len(ids), first_row) if do_sample else None,
        num_beams=num_beams,
        early_stopping=early_stopping,
        process=process,
        capacity=capacity,
        cache_dtype=cache_dtype,
    )
    tokens, scores, lengths = (
        x[:, :num_return_sequences].reshape(-1, *x.shape[2:])
        for x in jax.device_get((beams.tokens, beams.scores, beams.lengths))
    )
    prompts = np.repeat(ids, num_return_sequences, axis=0)
    return BeamOutput(np.concatenate([prompts, tokens[:, : lengths.max()]], axis=1), scores, lengths)


# Compiled -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("num_beams", "early_stopping", "process", "capacity", "cache_dtype"))
def _search(
    model: OPTForCausalLM,
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    options: BeamOptions,
    keys: Key[Array, " B"] | None,
    *,
    num_beams: int,
    early_stopping: bool | Literal["never"],
    process: Process | None,
    capacity: int,
    cache_dtype: str | None,
) -> _Beams:
    """The finished beams. `keys`: draw at random."""
    batch, width = ids.shape
    cache = model.init_cache(batch, width + num_beams * capacity, cache_dtype)
    out = model.forward(ids, mask, cache=cache, logits_to_keep=1)
    assert out.cache is not None
    advance = partial(_advance, ids, mask, options, keys, early_stopping, process)

    def step(state: _State) -> _State:
        token = lax.dynamic_index_in_dim(state.running.tokens, state.step - 1, axis=2, keepdims=False)
        positions = jnp.broadcast_to(state.cache.next_position[:, None], token.shape)
        out = model.forward(token, position_ids=positions, cache=state.cache)
        return advance(dataclasses.replace(state, cache=out.cache), out.logits)

    state = _start(batch, num_beams, capacity, options.pad_token_id, out.cache.branch(num_beams))
    logits = jnp.broadcast_to(out.logits, (batch, num_beams, out.logits.shape[-1]))
    return lax.while_loop(lambda s: ~s.done.all(), step, advance(state, logits)).finished


def _start(batch: int, beams: int, capacity: int, pad_token_id: Int[Array, ""], cache: KVCache) -> _State:
    # All the beams of a prompt begin as one: the first counts, the others must not repeat it.
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER).astype(jnp.float32)
    running = _Beams(
        tokens=jnp.full((batch, beams, capacity), pad_token_id, jnp.int32),
        scores=jnp.broadcast_to(scores, (batch, beams)),
        lengths=jnp.zeros((batch, beams), jnp.int32),
    )
    finished = dataclasses.replace(running, scores=jnp.full((batch, beams), _NEVER, jnp.float32))
    return _State(cache, running, finished, jnp.zeros((), jnp.int32), jnp.zeros((batch,), bool))


def _advance(
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    options: BeamOptions,
    keys: Key[Array, " B"] | None,
    early_stopping: bool | Literal["never"],
    process: Process | None,
    state: _State,
    logits: Float[Array, "B N V"],
) -> _State:
    """One step: candidates, which of them go on, which are finished, and whether a prompt is done."""
    beams, vocabulary = logits.shape[1:]
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    if process is not None:
        log_probs = _processed(process, options.process, ids, mask, state, log_probs)
    totals = (log_probs + state.running.scores[:, :, None]).reshape(len(ids), -1)

    # So many that `beams` of them are left to go on if each beam proposes all the end tokens.
    most = min((1 + options.eos_token_ids.size) * beams, totals.shape[1])
    count = jnp.maximum(2, 1 + (options.eos_token_ids < vocabulary).sum(dtype=jnp.int32)) * beams
    index = _candidates(totals, most, count, keys, state.step)
    parent, token = index // vocabulary, index % vocabulary
    length = state.step + 1
    tokens = _take(state.running.tokens, parent)
    candidates = _Beams(
        tokens=lax.dynamic_update_slice_in_dim(tokens, token[:, :, None], state.step, axis=2),
        scores=_take(totals, index),
        lengths=jnp.full_like(index, length),
    )
    ends = (token[:, :, None] == options.eos_token_ids[None, None]).any(-1) | (length >= options.max_new_tokens)

    # Ended ones stay behind, unless there are no others; the best `beams` candidates only may finish (HF's rules).
    counted = jnp.arange(most, dtype=jnp.int32)[None] < count
    going_on = jnp.where(counted, candidates.scores + jnp.where(ends, _NEVER, 0.0), -jnp.inf)
    scores, chosen = lax.top_k(going_on, beams)
    running = dataclasses.replace(candidates.select(chosen), scores=scores)
    finished = _finish(state.finished, candidates, ends & ~state.done[:, None], options.length_penalty)

    if early_stopping == "never":
        best_length = jnp.where(options.length_penalty > 0, options.max_new_tokens, length)
    else:
        best_length = length
    done = state.done | ~_can_improve(running, finished, best_length, options.length_penalty)
    done |= (ends | ~counted).all(1)
    if early_stopping is True:
        done |= (finished.lengths > 0).all(1)
    return _State(state.cache.select(_take(parent, chosen)), running, finished, length, done)


def _processed(
    process: Process,
    options: Any,
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    state: _State,
    log_probs: Float[Array, "B N V"],
) -> Float[Array, "B N V"]:
    tokens, step = state.running.tokens, state.step
    width, (beams, capacity) = ids.shape[1], tokens.shape[1:]
    is_new = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32) < step, tokens.shape)

    def joined(prompt, new):
        prompt = jnp.repeat(prompt[:, None], beams, axis=1)
        return jnp.concatenate([prompt, new], axis=2).reshape(-1, width + capacity)

    flat = log_probs.reshape(-1, log_probs.shape[-1])
    column, new = (jnp.full(len(flat), x, jnp.int32) for x in (width + step, step))
    flat = process(options, flat, joined(ids, tokens), joined(mask, is_new), column, new)
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


def _finish(finished: _Beams, candidates: _Beams, ends: Bool[Array, "B C"], length_penalty) -> _Beams:
    """The best of what was finished before and the best N candidates, where these have ended."""
    beams = finished.scores.shape[1]
    new = jax.tree.map(lambda x: x[:, :beams], candidates)
    scores = jnp.where(ends[:, :beams], new.scores / _power(new.lengths, length_penalty), -jnp.inf)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), finished, dataclasses.replace(new, scores=scores))
    return both.select(lax.top_k(both.scores, beams)[1])


def _can_improve(running: _Beams, finished: _Beams, best_length, length_penalty) -> Bool[Array, " B"]:
    """Whether the best running beam may end better than the worst finished one (HF's heuristic)."""
    best = running.scores[:, :1] / _power(best_length, length_penalty)
    worst = jnp.where(finished.lengths > 0, finished.scores.min(1, keepdims=True), _NEVER)
    return (best > worst).any(1)


def _power(length: Int[Array, "..."], exponent: Float[Array, ""]) -> Float[Array, "..."]:
    return jnp.power(length.astype(jnp.float32), exponent)


def _take(x: Array, index: Int[Array, "B n"]) -> Array:
    """x[b, index[b]] for every prompt b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


# Arguments ----------------------------------------------------------------------------------------------------


def _check(
    model, ids, mask, max_new_tokens, num_beams, num_return_sequences, length_penalty, early_stopping, capacity
) -> None:
    if not isinstance(model, OPTForCausalLM):
        raise ValueError(f"beam search needs an OPTForCausalLM, not an {type(model).__name__}")
    config = model.config
    if ids.ndim != 2 or mask.shape != ids.shape or not mask[:, -1:].all():
        raise ValueError(f"ids {ids.shape} and mask {mask.shape} must be [batch, tokens], padded on the left")
    if num_beams < 1:
        raise ValueError(f"num_beams={num_beams} must be at least 1")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences={num_return_sequences} must be in [1, {num_beams}], as num_beams={num_beams}"
        )
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty={length_penalty} must be a finite number")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(f'early_stopping={early_stopping!r} must be True, False or "never"')
    if not 1 <= max_new_tokens <= capacity:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be in [1, {capacity}]")
    prompt, limit = int(mask.sum(1).max()), config.max_position_embeddings
    if prompt + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones are more than "
            f"max_position_embeddings={limit}: shorten the prompt, or ask for fewer"
        )


def _options(model, max_new_tokens, length_penalty, eos_token_ids, pad_token_id, process_options) -> BeamOptions:
    vocabulary = model.config.vocab_size
    eos = list(dict.fromkeys(check_ids("eos_token_ids", eos_token_ids, vocabulary)))
    (pad_token_id,) = check_ids("pad_token_id", [pad_token_id], vocabulary)
    slots = math.ceil(max(len(eos), 1) / _EOS_SLOTS) * _EOS_SLOTS
    return BeamOptions(
        max_new_tokens=jax.device_put(np.int32(max_new_tokens)),
        length_penalty=jax.device_put(np.float32(length_penalty)),
        eos_token_ids=jax.device_put(np.array(eos + [vocabulary] * (slots - len(eos)), np.int32)),
        pad_token_id=jax.device_put(np.int32(pad_token_id)),
        process=process_options,
    )


def _row_keys(seed: int | Sequence[int] | np.ndarray, batch: int, first_row: int) -> Key[Array, " B"]:
    seeds = np.atleast_1d(np.asarray(seed))
    if (
        seeds.dtype.kind not in "iu"
        or seeds.shape not in ((1,), (batch,))
        or (seeds < 0).any()
        or (seeds >= 2**32).any()
    ):
        raise ValueError(f"seed={seed} must be a number in [0, 2**32), or one for each of the {batch} rows")
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    if np.ndim(seed) > 0:
        return keys
    return jax.vmap(lambda row: jax.random.fold_in(keys[0], row))(first_row + jnp.arange(batch, dtype=jnp.int32))
