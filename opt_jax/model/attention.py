"""Scaled dot-product attention over [batch, heads, length, head_dim]. One function, no parameters."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opt_jax.model import flash, hooks, int8
from opt_jax.model.flash import AttentionImplementation, Heads
from opt_jax.model.int8 import Int8Array
from opt_jax.parallel.collectives import batch_offset, shard_over_heads, tensor_offset

Keys = Float[Array, "B H S K"] | Int8Array  # keys, or values, of all tokens to attend to
# Causal attention splits the queries into at most MOST_BLOCKS blocks of at least BLOCK tokens.
MOST_BLOCKS, BLOCK = 8, 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """The keys that each query may attend to, in parts from which each backend builds the form that it needs.

    Attributes:
      key_mask: true at key columns that hold a real token; with an axis T, at those that each query may attend to.
        None: all columns.
      segment_ids: of packed documents; a token attends to its own segment only. None: one segment. Supported only where
        queries and keys are the same tokens.
      query_column: key column of the first query. Queries of this call do not attend to the columns of later ones. All
        other columns hold earlier tokens, also those with larger numbers, so a cache may have holes and wrap around.
    """

    key_mask: Bool[Array, "B S"] | Bool[Array, "B T S"] | None
    segment_ids: Int[Array, "B S"] | None
    query_column: Int[Array, ""] | int

    def segments(self) -> Int[Array, "B S"] | None:
        """The mask without causality, as segment ids: pads become one more segment. None: one segment.

        For calls in which queries and keys are the same tokens.
        """
        if self.key_mask is None:
            return self.segment_ids
        ids = jnp.zeros((), jnp.int32) if self.segment_ids is None else self.segment_ids.astype(jnp.int32)
        return jnp.where(self.key_mask, ids, jnp.iinfo(jnp.int32).min)

    def is_causal(self, queries: int, keys: int) -> bool:
        """Whether queries and keys are known, while tracing, to be the same tokens. Then query t sees keys 0 to t."""
        return queries == keys and isinstance(self.query_column, int) and self.query_column == 0

    def dense(self, queries: int, keys: int) -> Bool[Array, "b 1 T S"]:
        """The mask, true where query t may attend to key s. b: B, or 1 if all rows have the same mask."""
        t = jnp.arange(queries, dtype=jnp.int32)[:, None]
        s = jnp.arange(keys, dtype=jnp.int32)[None]
        since = (s - self.query_column) % keys  # 0, 1, ... for this call's tokens
        mask = ((since <= t) | (since >= queries))[None, None]
        if self.key_mask is not None:
            mask &= self.key_mask[:, None] if self.key_mask.ndim == 3 else self.key_mask[:, None, None, :]
        if self.segment_ids is not None:
            mask &= (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])[:, None]
        return mask


class DropoutKey(NamedTuple):
    """A key and the global row index of each local row. They make random bits independent of mesh and micro-batches."""

    key: jax.Array
    rows: Int[Array, " B"]

    @classmethod
    def of(
        cls, key: "jax.Array | DropoutKey | None", rows: int, first: Int[Array, ""] | int = 0
    ) -> "DropoutKey | None":
        """`key` with the global indices of `rows` local rows. `first`: global index of the micro-batch's first row."""
        if key is None or isinstance(key, DropoutKey):
            return key
        return cls(key, first + batch_offset(rows) + jnp.arange(rows, dtype=jnp.int32))


def dropout(x: Float[Array, "B N ..."], rate: float, key: DropoutKey | None) -> Float[Array, "B N ..."]:
    """x after inverted dropout, as `torch.nn.functional.dropout`; x itself without a key or at rate 0.

    N: tokens or heads. A device may hold a part of them. Each row and column of axis N has its own key.
    """
    if key is None or rate == 0.0:
        return x
    columns = tensor_offset(x.shape[1]) + jnp.arange(x.shape[1], dtype=jnp.int32)

    def keep(row: jax.Array, column: jax.Array) -> jax.Array:
        column_key = jax.random.fold_in(jax.random.fold_in(key.key, row), column)
        return jax.random.bernoulli(column_key, jnp.float32(1.0 - rate), x.shape[2:])

    kept = jax.vmap(jax.vmap(keep, (None, 0)), (0, None))(key.rows, columns)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


def flash_attend(implementation: AttentionImplementation, q: Heads, k: Heads, v: Heads, mask: AttentionMask) -> Heads:
    """The output of `attend`, by a kernel that never stores the weights. It differs at pads, which attend to pads."""
    segments = mask.segments()
    kernel = shard_over_heads(flash.KERNELS[implementation], segments=segments is not None)
    return kernel(q, k, v) if segments is None else kernel(q, k, v, segments)


def attend(
    q: Heads, k: Keys, v: Keys, mask: AttentionMask, *, dropout_rate: float = 0.0, dropout_key: DropoutKey | None = None
) -> tuple[Heads, Float[Array, "B H T S"]]:
    """softmax(q k^T) v and the softmax weights. `q` is scaled already. XLA removes the weights if they are unused.

    Follows HF's `eager_attention_forward`: softmax in float32, cast back to the inputs' dtype before the product
    with `v`. Deviations: scores are accumulated in float32 (HF rounds them to half precision first), and hidden
    scores are *replaced* by a finite minimum, so that a query without any visible key stays finite in every dtype.
    """
    queries, keys = q.shape[2], k.shape[2]
    visible, key = mask.dense(queries, keys), dropout_key if dropout_rate else None
    in_blocks = isinstance(queries, int) and mask.is_causal(queries, keys) and key is None  # symbolic in `jax.export`
    in_blocks = in_blocks and not (hooks.wanted("attn.hook_attn_scores") or hooks.wanted("attn.hook_pattern"))
    blocks = min(queries // BLOCK, MOST_BLOCKS) if in_blocks else 1
    if blocks < 2 or isinstance(k, Int8Array) or isinstance(v, Int8Array):
        return _attend(q, k, v, visible, dropout_rate, key)
    # Each block leaves out the keys after its last query. This saves nearly half of the work and memory.
    outputs, weights = [], []
    for start, end in itertools.pairwise(queries * i // blocks for i in range(blocks + 1)):
        out, part = _attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], visible[:, :, start:end, :end], 0.0, None)
        outputs.append(out)
        weights.append(jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, keys - end))))
    return jnp.concatenate(outputs, axis=2), jnp.concatenate(weights, axis=2)


def _attend(
    q: Heads, k: Keys, v: Keys, visible: Bool[Array, "b 1 T S"], dropout_rate: float, dropout_key: DropoutKey | None
) -> tuple[Heads, Float[Array, "B H T S"]]:
    if isinstance(k, Int8Array):
        scores = int8.einsum("bhtk,bhsk->bhts", q, k.values) * k.scale.mT
    else:
        scores = _product("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32)
    scores = hooks.point("attn.hook_attn_scores", jnp.where(visible, scores, jnp.finfo(jnp.float32).min))
    weights = hooks.point("attn.hook_pattern", jax.nn.softmax(scores, axis=-1).astype(q.dtype))
    weights = dropout(weights, dropout_rate, dropout_key)
    if isinstance(v, Int8Array):
        scaled = weights.astype(jnp.float32) * v.scale.mT
        return int8.einsum("bhts,bhsk->bhtk", scaled, v.values).astype(q.dtype), weights
    return _product("bhts,bhsk->bhtk", weights, v).astype(q.dtype), weights


def _product(spec: str, x: Array, cached: Array, **kwargs: Any) -> Array:
    """`jnp.einsum` with standard dtype promotion, because the cache's dtype may differ from the compute dtype."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.einsum(spec, x, cached, **kwargs)
