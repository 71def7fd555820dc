"""Scaled dot-product attention over [batch, heads, length, head_dim]. One function, no parameters."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opt_jax import int8
from opt_jax.int8 import Int8Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """What a query may look at, kept in parts so that each backend can build the form it needs.

    key_mask: key columns that hold a real token; with an axis T, those that each query may see; None: all of them.
    segment_ids: packed documents, a token sees its own segment only; None: one segment. Only where queries = keys.
    query_column: key column of the first query. Columns of later queries are hidden from earlier ones; any other
      column is in the past, whatever its number, so a cache may have holes and wrap.
    """

    key_mask: Bool[Array, "B S"] | Bool[Array, "B T S"] | None
    segment_ids: Int[Array, "B S"] | None
    query_column: Int[Array, ""] | int

    def dense(self, queries: int, keys: int) -> Bool[Array, "b 1 T S"]:
        """True where query t may attend to key s; leading axis 1 when it is the same for every row."""
        t = jnp.arange(queries)[:, None]
        since = (jnp.arange(keys)[None] - self.query_column) % keys  # 0.. for this call's tokens, in order
        mask = ((since <= t) | (since >= queries))[None, None]
        if self.key_mask is not None:
            mask &= self.key_mask[:, None] if self.key_mask.ndim == 3 else self.key_mask[:, None, None, :]
        if self.segment_ids is not None:
            mask &= (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])[:, None]
        return mask


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Inverted dropout, as `torch.nn.functional.dropout`; identity without a key or at rate 0."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), jnp.zeros_like(x))


def attend(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H S K"] | Int8Array,
    v: Float[Array, "B H S K"] | Int8Array,
    mask: AttentionMask,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> tuple[Float[Array, "B H T K"], Float[Array, "B H T S"]]:
    """softmax(q k^T) v and its weights; `q` comes scaled. Weights nobody uses are dropped by the compiler.

    Follows HF's `eager_attention_forward`: softmax in float32, cast back to the inputs' dtype before the product
    with `v`. Deviations: scores are accumulated in float32 (HF rounds them to half precision first), and hidden
    scores are *replaced* by a finite minimum, so that a row without any visible key stays finite in every dtype.
    """
    if isinstance(k, Int8Array):
        scores = int8.einsum("bhtk,bhsk->bhts", q, k.values) * k.scale.mT
    else:
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask.dense(q.shape[2], k.shape[2]), scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(q.dtype), dropout_rate, dropout_key)
    if isinstance(v, Int8Array):
        return int8.einsum("bhts,bhsk->bhtk", weights * v.scale.mT, v.values).astype(q.dtype), weights
    return jnp.einsum("bhts,bhsk->bhtk", weights, v), weights
