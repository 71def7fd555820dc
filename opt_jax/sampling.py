"""Logits to logits to token: pure functions, for use inside `jax.jit`. They mean what HF's logits processors mean."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt

Logits = Float[Array, "B V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen. Every value is traced: other values compile nothing."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]  # 0: off
    top_p: Float[Array, ""]  # 1: off
    seed: UInt[Array, ""]
    eos_token_ids: Int[Array, " E"]  # filled up to a fixed size with ids no token has
    pad_token_id: Int[Array, ""]
    min_new_tokens: Int[Array, ""]


def choose(logits: Logits, step: Int[Array, ""], options: SamplingOptions, do_sample: bool) -> Int[Array, " B"]:
    """The token that follows `step` new ones: the most likely, or one drawn at random."""
    logits = process(logits, step, options, do_sample)
    if do_sample:
        return draw(logits, row_keys(options.seed, logits.shape[0], step))
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def process(logits: Logits, step: Int[Array, ""], options: SamplingOptions, do_sample: bool) -> Logits:
    """All that `options` ask for, in HF's order."""
    too_early = step < options.min_new_tokens
    logits = lax.cond(too_early, lambda x: suppress(x, options.eos_token_ids), lambda x: x, logits)
    if do_sample:
        logits = scale(logits, options.temperature)
        logits = keep_top_k(logits, options.top_k)
        logits = keep_top_p(logits, options.top_p)
    return logits


def suppress(logits: Logits, token_ids: Int[Array, " E"]) -> Logits:
    """-inf for the given tokens; ids outside the vocabulary are nobody's (HF `MinNewTokensLengthLogitsProcessor`)."""
    listed = (jnp.arange(logits.shape[-1])[:, None] == token_ids).any(-1)
    return jnp.where(listed, -jnp.inf, logits)


def scale(logits: Logits, temperature: Float[Array, ""]) -> Logits:
    """HF `TemperatureLogitsWarper`."""
    return logits / temperature


def keep_top_k(logits: Logits, k: Int[Array, ""] | int) -> Logits:
    """-inf for all but the k largest of a row and those that tie with them; k = 0: all (HF `TopKLogitsWarper`)."""

    def enough(kept: Bool[Array, "B V"]) -> Bool[Array, "B 1"]:
        return kept.sum(-1, keepdims=True) >= jnp.minimum(k, logits.shape[-1])

    return lax.cond(jnp.asarray(k) > 0, lambda x: _keep_largest(x, enough), lambda x: x, logits)


def keep_top_p(logits: Logits, p: Float[Array, ""] | float) -> Logits:
    """-inf for all but the fewest most likely tokens with p of the probability; p = 1: all (HF `TopPLogitsWarper`).

    Deviation: of tokens with equal logits all are kept, or none; HF may cut between them.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)

    def enough(kept: Bool[Array, "B V"]) -> Bool[Array, "B 1"]:
        return jnp.where(kept, probabilities, 0).sum(-1, keepdims=True) >= p

    return lax.cond(jnp.asarray(p) < 1, lambda x: _keep_largest(x, enough), lambda x: x, logits)


def _keep_largest(logits: Logits, enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B 1"]]) -> Logits:
    """-inf for all but the largest values of each row, as few as are `enough`.

    Finds the threshold bit by bit: 32 passes over the row, on a CPU 10 times faster than sorting 50,000 logits.
    """
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # unsigned integers in the floats' order

    def try_bit(i, threshold):
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(ordered >= higher), higher, threshold)

    threshold = lax.fori_loop(0, 32, try_bit, jnp.zeros((logits.shape[0], 1), jnp.uint32))
    return jnp.where(ordered >= threshold, logits, -jnp.inf)


def row_keys(seed: UInt[Array, ""], batch: int, step: Int[Array, ""]) -> Key[Array, " B"]:
    """A key per row and step: what a row draws does not depend on the rows beside it."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))


def draw(logits: Logits, keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """One token per row from softmax(logits)."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
