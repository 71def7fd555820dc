"""Logits processors that look at the tokens so far: penalties, banned and forced tokens. Pure functions for `jax.jit`.

They compute what the `LogitsProcessor`s of `transformers` compute on a row without padding. (Deviation: HF's also see
pads.) So a row's result does not depend on the other rows of its batch. The functions keep no state between steps: each
reads all tokens again. Beams may therefore be reordered freely.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Logits = Float[Array, "B V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens so far: in each row the last columns before `column`. The last `step` of them are new."""

    tokens: Int[Array, "B L"]
    valid: Bool[Array, "B L"]  # columns that hold a real token
    column: Int[Array, " B"]
    step: Int[Array, " B"]

    def lengths(self) -> Int[Array, " B"]:
        return self.valid.sum(-1, dtype=jnp.int32)

    def is_new(self) -> Bool[Array, "B L"]:
        columns = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]
        return (columns >= (self.column - self.step)[:, None]) & (columns < self.column[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
    """W token sequences of at most S tokens, right-aligned. Padding rows hold an id outside the vocabulary."""

    ids: Int[Array, "W S"]
    used: Bool[Array, "W S"]  # False at the padding before a sequence


def repetition_penalty(logits: Logits, history: History, penalty: Float[Array, ""]) -> Logits:
    """Logits with tokens of prompt and continuation less likely (HF `RepetitionPenaltyLogitsProcessor`)."""
    seen = _counts(logits, history, history.valid) > 0
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def additive_penalties(
    logits: Logits, history: History, presence: Float[Array, ""] | None, frequency: Float[Array, ""] | None
) -> Logits:
    """Logits of the new tokens so far minus `presence`, and minus `frequency` * occurrences (as OpenAI and vLLM)."""
    counts = _counts(logits, history, history.valid & history.is_new())
    if presence is not None:
        logits = logits - presence * (counts > 0).astype(logits.dtype)
    return logits if frequency is None else logits - frequency * counts.astype(logits.dtype)


def no_repeat_ngram(logits: Logits, history: History, size: Int[Array, ""]) -> Logits:
    """Logits, -inf for tokens that would repeat an n-gram of the row (HF `NoRepeatNGramLogitsProcessor`)."""
    tokens, valid, column = history.tokens, history.valid, history.column[:, None]
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

    def agree(i: Int[Array, ""], match: Bool[Array, "B L"]) -> Bool[Array, "B L"]:
        # True where the token i columns before each column is the row's i-th last token, and neither is a pad.
        before, known = (jnp.roll(x, i, axis=1) for x in (tokens, valid))
        last = jnp.take_along_axis(tokens, column - i, axis=1)
        return match & known & (columns >= i) & (before == last)

    ends_ngram = lax.fori_loop(1, size, agree, valid & (columns < column))
    return jnp.where(_marked(logits, tokens, ends_ngram), -jnp.inf, logits)


def ban_sequences(logits: Logits, history: History, banned: Sequences) -> Logits:
    """Logits, -inf for tokens that would complete a banned sequence (HF `NoBadWordsLogitsProcessor`)."""
    begun = _ends_with(history, banned.ids[:, :-1], banned.used[:, :-1], history.valid)
    last = jnp.broadcast_to(banned.ids[:, -1], begun.shape)
    return jnp.where(_marked(logits, last, begun), -jnp.inf, logits)


def completes(history: History, sequences: Sequences) -> Bool[Array, " B"]:
    """Whether the new tokens end with one of the sequences."""
    return _ends_with(history, sequences.ids, sequences.used, history.valid & history.is_new()).any(-1)


def suppress(logits: Logits, token_ids: Int[Array, " E"]) -> Logits:
    """Logits, -inf for the given tokens; ignores ids outside the vocabulary (HF `SuppressTokensLogitsProcessor`)."""
    return jnp.where(_listed(logits, token_ids), -jnp.inf, logits)


def force(logits: Logits, token_ids: Int[Array, " E"]) -> Logits:
    """Logits, 0 for the given tokens and -inf for all others (HF `ForcedEOSTokenLogitsProcessor`)."""
    return jnp.where(_listed(logits, token_ids), jnp.zeros_like(logits), -jnp.inf)


def _listed(logits: Logits, token_ids: Int[Array, " E"]) -> Bool[Array, "1 V"]:
    return jnp.zeros((1, logits.shape[-1]), bool).at[:, token_ids].set(True, mode="drop")


def _marked(logits: Logits, tokens: Int[Array, "B N"], where: Bool[Array, "B N"]) -> Bool[Array, "B V"]:
    """True at the vocabulary entries `tokens[b, i]` where `where[b, i]` is true."""
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros(logits.shape, bool).at[rows, tokens].max(where, mode="drop")


def _counts(logits: Logits, history: History, where: Bool[Array, "B L"]) -> Int[Array, "B V"]:
    """How often each vocabulary entry is in the columns where `where` is true."""
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros(logits.shape, jnp.int32).at[rows, history.tokens].add(where.astype(jnp.int32), mode="drop")


def _ends_with(
    history: History, ids: Int[Array, "W S"], used: Bool[Array, "W S"], valid: Bool[Array, "B L"]
) -> Bool[Array, "B W"]:
    """Whether the valid tokens of row b end with sequence w. Every row ends with an empty sequence."""
    size = ids.shape[1]
    columns = history.column[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    last, known = (
        jnp.take_along_axis(jnp.pad(x, ((0, 0), (size, 0))), columns, axis=1)[:, None] for x in (history.tokens, valid)
    )
    return (~used[None] | (known & (last == ids[None]))).all(-1)
