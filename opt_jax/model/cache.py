"""The KV cache: a pytree of keys and values, and the mask and positions that follow from it."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from opt_jax.model import int8
from opt_jax.model.int8 import Int8Array
from opt_jax.parallel.rules import activation_spec

_STATIC = dict(static=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The part of a `KVCache` that one layer reads and updates."""

    k: Float[Array, "*B H L K"] | Int8Array
    v: Float[Array, "*B H L K"] | Int8Array
    column: Int[Array, ""]
    fresh: bool = dataclasses.field(metadata=_STATIC)

    def update(self, k: Float[Array, "B H T K"], v: Float[Array, "B H T K"]):
        """The cache with T new columns, and the keys and values to attend to.

        In a fresh cache these are the new columns only, so that prefill costs T^2 and not T * L.
        """
        if len(self.k.shape) == 3:  # one row (`KVCache.squeeze`)
            new = dataclasses.replace(self, k=_write(self.k, k[0], self.column), v=_write(self.v, v[0], self.column))
            return new, *jax.tree.map(lambda x: x[None], (new.k, new.v))
        new = dataclasses.replace(self, k=_write(self.k, k, self.column), v=_write(self.v, v, self.column))
        return (new, k, v) if self.fresh else (new, new.k, new.v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far. Each token has a column; a call writes the same columns in all rows.

    A column may hold a pad in some rows; `valid` is false there. The order of columns has no meaning, because OPT adds
    position embeddings to the input. Donate the cache to `jax.jit`; updates are then in place.
    """

    # One array for each layer. H stands before L, so that the keys of a head are contiguous. int8: a scale for each
    # head and token. `squeeze` removes the axis B.
    k: tuple[Float[Array, "*B H L K"] | Int8Array, ...]
    v: tuple[Float[Array, "*B H L K"] | Int8Array, ...]
    # True at columns that hold a real token. With an axis N (`branch`): at the columns that are ancestors of a branch.
    valid: Bool[Array, "B L"] | Bool[Array, "B N L"]
    next_position: Int[Array, " B"]  # number of real tokens so far, which is the position of the next one
    column: Int[Array, ""]  # where the next token is written
    # True, while tracing, if the cache is empty: the call is a prefill and attends to its own keys only.
    fresh: bool = dataclasses.field(metadata=_STATIC)

    @property
    def batch_size(self) -> int:
        return self.valid.shape[0]

    @property
    def max_length(self) -> int:
        return self.valid.shape[-1]

    def layers(self) -> list[LayerCache]:
        return [LayerCache(k, v, self.column, self.fresh) for k, v in zip(self.k, self.v, strict=True)]

    def advance(self, mask: Bool[Array, "B T"], layers: Iterable[LayerCache] | None = None) -> "KVCache":
        """The cache after T more tokens.

        In a branched cache, T = N: token i belongs to branch i, and other branches do not attend to it.

        Args:
          mask: true at real tokens.
          layers: the updated layers. Default: the old ones; then only mask and positions advance.
        """
        layers = self.layers() if layers is None else list(layers)
        branched = self.valid.ndim == 3
        seen = mask[:, :, None] & jnp.eye(mask.shape[1], dtype=bool)[None] if branched else mask
        return KVCache(
            k=tuple(layer.k for layer in layers),
            v=tuple(layer.v for layer in layers),
            valid=lax.dynamic_update_slice_in_dim(self.valid, seen, self.column, axis=seen.ndim - 1),
            next_position=self.next_position + (1 if branched else mask.sum(-1, dtype=jnp.int32)),
            column=self.column + mask.shape[1],
            fresh=False,
        )

    def squeeze(self) -> "KVCache":
        """A cache of one row without the axis B of keys and values, for use in a loop. `unsqueeze` is the inverse.

        XLA removes batch axes of size one from the operands of a product. If the loop carries arrays with this axis, a
        CPU writes each new column twice and copies the cache four times in every step.
        """
        return self._map(lambda x: x[0]) if self.batch_size == 1 else self

    def unsqueeze(self) -> "KVCache":
        return self._map(lambda x: x[None]) if len(self.k[0].shape) == 3 else self

    def _map(self, change: Callable[..., Array], *others: "KVCache") -> "KVCache":
        k, v = jax.tree.map(change, *((cache.k, cache.v) for cache in (self, *others)))
        return dataclasses.replace(self, k=k, v=v)

    def wrap(self) -> "KVCache":
        """The cache with `column` set to 0 if it is past the last one. The tokens there must not be needed any more."""
        return dataclasses.replace(self, column=self.column % self.max_length)

    def pin(self) -> "KVCache":
        """The cache, for a step of a loop. On TPUs, keys and values stay in the layout that they have outside of it.

        Without this, the compiler puts the columns first in a loop. Then it copies the cache before and after, and pads
        heads of fewer than 128 numbers to 128.
        """

        def pinned(x: Array) -> Array:
            last = (x.ndim - 2, x.ndim - 1)[:: 1 if x.shape[-1] % 128 == 0 else -1]
            fix = partial(with_layout_constraint, layouts=Layout((*range(x.ndim - 2), *last)))
            spec = activation_spec(x.shape, "heads")  # without `shard_map`, each device might gather all of x first
            return fix(x) if spec is None else jax.shard_map(fix, in_specs=spec, out_specs=spec, check_vma=False)(x)

        return lax.platform_dependent(self, tpu=lambda cache: cache._map(pinned), default=lambda cache: cache)

    def rewind(self, width: int, kept: Int[Array, " B"]) -> "KVCache":
        """The cache without its last `width` columns. Row b keeps the first `kept[b]` of them, which hold real tokens.

        The next token goes to the column after the last one that any row keeps. Columns that a row does not keep
        before that one become holes.
        """
        start = self.column - width
        window = lax.dynamic_slice_in_dim(self.valid, start, width, axis=1)
        keep = jnp.arange(width, dtype=jnp.int32)[None] < kept[:, None]
        valid = lax.dynamic_update_slice_in_dim(self.valid, keep, start, axis=1)
        position = self.next_position - window.sum(-1, dtype=jnp.int32) + kept
        return dataclasses.replace(self, valid=valid, next_position=position, column=start + kept.max())

    def compact(self) -> "KVCache":
        """The cache without holes: the real columns of each row, moved to the left. Rewrites all keys and values."""
        order, count = jnp.argsort(~self.valid, axis=1, stable=True), self.valid.sum(-1, dtype=jnp.int32)

        def moved(x: Array) -> Array:
            return jnp.take_along_axis(x, order[:, None, :, None], axis=2)

        valid = jnp.arange(self.max_length, dtype=jnp.int32)[None] < count[:, None]
        return dataclasses.replace(self._map(moved), valid=valid, column=count.max())

    def extend(self, batch: int, columns: int) -> "KVCache":
        """A copy with `columns` more columns; and if the cache has one row, with `batch` equal rows."""

        def grown(x: Array, axis: int) -> Array:
            x = jnp.pad(x, [(0, columns if i == axis else 0) for i in range(x.ndim)])
            return jnp.broadcast_to(x, (batch, *x.shape[1:]))

        cache, position = self._map(lambda x: grown(x, 2)), jnp.broadcast_to(self.next_position, (batch,))
        return dataclasses.replace(cache, valid=grown(self.valid, 1), next_position=position)

    def replace_rows(self, rows: Int[Array, " b"], new: "KVCache") -> "KVCache":
        """The cache with row `rows[i]` replaced by row i of `new`; nothing is written for a row outside [0, B).

        `new` may have fewer columns. Rotates them so that its last written column lands on `self.column - 1` (columns
        wrap around).
        """
        missing = self.max_length - new.max_length

        def put(x: Array, y: Array, axis: int) -> Array:
            y = jnp.pad(y, [(0, missing if i == axis else 0) for i in range(y.ndim)])
            return x.at[rows].set(jnp.roll(y, self.column - new.column, axis), mode="drop")

        cache = self._map(lambda x, y: put(x, y, 2), new)
        position = self.next_position.at[rows].set(new.next_position, mode="drop")
        return dataclasses.replace(cache, valid=put(self.valid, new.valid, 1), next_position=position)

    def branch(self, branches: int) -> "KVCache":
        """The cache with N branches of each row, which share all columns so far.

        Each later call adds one token to each branch: T = N, and `position_ids` are `next_position` for all of them.
        """
        valid = jnp.broadcast_to(self.valid[:, None], (self.batch_size, branches, self.max_length))
        return dataclasses.replace(self, valid=valid)

    def select(self, branches: Int[Array, "B N"]) -> "KVCache":
        """The cache with branch i of row b replaced by branch branches[b, i]. Moves no keys or values."""
        return dataclasses.replace(self, valid=jnp.take_along_axis(self.valid, branches[:, :, None], axis=1))


def init_cache(layers: int, batch: int, heads: int, max_length: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """An empty cache with `max_length` columns: 2 * layers * batch * heads * max_length * head_dim elements.

    `dtype` is a floating point dtype or int8. The scales of int8 take 4 more bytes for each head_dim elements.

    Raises:
      ValueError: another dtype.
    """
    if jnp.dtype(dtype) != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"a cache of {jnp.dtype(dtype)} is not supported: use int8 or a floating point dtype")

    def zeros():
        x = jnp.zeros((batch, heads, max_length, head_dim), dtype)
        return Int8Array(x, jnp.zeros((*x.shape[:-1], 1), jnp.float32)) if x.dtype == jnp.int8 else x

    k, v = (tuple(zeros() for _ in range(layers)) for _ in "kv")
    return KVCache(
        k=k,
        v=v,
        valid=jnp.zeros((batch, max_length), bool),
        next_position=jnp.zeros((batch,), jnp.int32),
        column=jnp.zeros((), jnp.int32),
        fresh=True,
    )


def _write(buffer: Float[Array, "*B H L K"] | Int8Array, new: Float[Array, "*B H T K"], column: Int[Array, ""]):
    """`buffer` with `new` in columns [column, column + T)."""
    columns = int8.quantize(new) if isinstance(buffer, Int8Array) else new.astype(buffer.dtype)
    return jax.tree.map(lambda b, n: lax.dynamic_update_slice_in_dim(b, n, column, axis=b.ndim - 2), buffer, columns)
