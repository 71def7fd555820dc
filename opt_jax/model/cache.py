"""The key/value cache: a pytree, its update, and what it says about masks and positions. No sampling."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from opt_jax.model import int8
from opt_jax.model.int8 import Int8Array

_STATIC = dict(static=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's share of a `KVCache`."""

    k: Float[Array, "*B H L K"] | Int8Array
    v: Float[Array, "*B H L K"] | Int8Array
    column: Int[Array, ""]
    fresh: bool = dataclasses.field(metadata=_STATIC)

    def update(self, k: Float[Array, "B H T K"], v: Float[Array, "B H T K"]):
        """Write new columns; returns the cache and the keys and values to attend to.

        A fresh cache attends to the new columns alone: prefill costs T^2, not T * L.
        """
        if len(self.k.shape) == 3:  # one row (`KVCache.squeeze`)
            new = dataclasses.replace(self, k=_write(self.k, k[0], self.column), v=_write(self.v, v[0], self.column))
            return new, *jax.tree.map(lambda x: x[None], (new.k, new.v))
        new = dataclasses.replace(self, k=_write(self.k, k, self.column), v=_write(self.v, v, self.column))
        return (new, k, v) if self.fresh else (new, new.k, new.v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, one column per token, the same column in every row.

    A column may hold a pad in some rows (`valid` says so): positions enter OPT at the embedding, so columns carry
    no meaning but "seen before". Under `jax.jit` donate it; every update is then in place.
    """

    # One per layer; heads before length keeps each head's keys contiguous. int8: one scale per head and token.
    k: tuple[Float[Array, "*B H L K"] | Int8Array, ...]  # without B: `squeeze`
    v: tuple[Float[Array, "*B H L K"] | Int8Array, ...]
    # Columns that hold a real token; with an axis N, of a row in branches (`branch`): the ancestors of each of them.
    valid: Bool[Array, "B L"] | Bool[Array, "B N L"]
    next_position: Int[Array, " B"]  # number of real tokens so far = position of the next one
    column: Int[Array, ""]  # where the next token is written
    # Known while tracing: nothing was written yet, so a call attends to its own keys only (prefill).
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
        """The cache after T more tokens, real where `mask`; `layers`: the updated layers (default: not yet written).

        In branches: after one more token of each (T = N), hidden from its siblings.
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
        """For a loop over calls: keys and values of a single row without their axis B; `unsqueeze` after the loop.

        XLA takes batch axes of one off what it multiplies. On a CPU, where the loop carries the array with that axis,
        each new column is then written twice, and the whole cache copied four times, at every step.
        """
        return self._reshape(lambda x: x[0]) if self.batch_size == 1 else self

    def unsqueeze(self) -> "KVCache":
        return self._reshape(lambda x: x[None]) if len(self.k[0].shape) == 3 else self

    def _reshape(self, reshape: Callable[[Array], Array]) -> "KVCache":
        return dataclasses.replace(self, k=jax.tree.map(reshape, self.k), v=jax.tree.map(reshape, self.v))

    def wrap(self) -> "KVCache":
        """Go on at column 0 behind the last one. What stands there must not be needed any more."""
        return dataclasses.replace(self, column=self.column % self.max_length)

    def rewind(self, width: int, kept: Int[Array, " B"]) -> "KVCache":
        """Drop the last `width` columns. Row b keeps the first `kept[b]` of them, which hold real tokens.

        The next token goes behind the last column that any row keeps. What other rows had there becomes a hole.
        """
        start = self.column - width
        window = lax.dynamic_slice_in_dim(self.valid, start, width, axis=1)
        keep = jnp.arange(width, dtype=jnp.int32)[None] < kept[:, None]
        return dataclasses.replace(
            self,
            valid=lax.dynamic_update_slice_in_dim(self.valid, keep, start, axis=1),
            next_position=self.next_position - window.sum(-1, dtype=jnp.int32) + kept,
            column=start + kept.max(),
        )

    def compact(self) -> "KVCache":
        """Without holes: each row's real columns moved to the left, in order. Reads and writes all keys and values."""
        order, count = jnp.argsort(~self.valid, axis=1, stable=True), self.valid.sum(-1, dtype=jnp.int32)

        def moved(x: Array) -> Array:
            return jnp.take_along_axis(x, order[:, None, :, None], axis=2)

        return dataclasses.replace(
            self,
            k=jax.tree.map(moved, self.k),
            v=jax.tree.map(moved, self.v),
            valid=jnp.arange(self.max_length, dtype=jnp.int32)[None] < count[:, None],
            column=count.max(),
        )

    def extend(self, batch: int, max_length: int) -> "KVCache":
        """A copy of a cache of one row, for `batch` rows that go on from it, with columns up to `max_length`."""

        def grown(x: Array, axis: int) -> Array:
            x = jnp.pad(x, [(0, max_length - n if i == axis else 0) for i, n in enumerate(x.shape)])
            return jnp.broadcast_to(x, (batch, *x.shape[1:]))

        return dataclasses.replace(
            self,
            k=jax.tree.map(lambda x: grown(x, 2), self.k),
            v=jax.tree.map(lambda x: grown(x, 2), self.v),
            valid=grown(self.valid, 1),
            next_position=jnp.broadcast_to(self.next_position, (batch,)),
        )

    def replace_rows(self, rows: Int[Array, " b"], new: "KVCache") -> "KVCache":
        """The cache with row `rows[i]` replaced by row i of `new`; nothing is written for a row outside [0, B).

        `new` may have fewer columns. Rotates them so that its last written column lands on `self.column - 1` (columns
        wrap around).
        """
        missing = self.max_length - new.max_length

        def put(x: Array, y: Array, axis: int) -> Array:
            y = jnp.pad(y, [(0, missing if i == axis else 0) for i in range(y.ndim)])
            return x.at[rows].set(jnp.roll(y, self.column - new.column, axis), mode="drop")

        return dataclasses.replace(
            self,
            k=jax.tree.map(lambda x, y: put(x, y, 2), self.k, new.k),
            v=jax.tree.map(lambda x, y: put(x, y, 2), self.v, new.v),
            valid=put(self.valid, new.valid, 1),
            next_position=self.next_position.at[rows].set(new.next_position, mode="drop"),
        )

    def branch(self, branches: int) -> "KVCache":
        """The same cache for N continuations of each row, which share all columns up to here.

        Then every call brings one token of each branch, T = N, with its `position_ids` (`next_position` for all).
        """
        valid = jnp.broadcast_to(self.valid[:, None], (self.batch_size, branches, self.max_length))
        return dataclasses.replace(self, valid=valid)

    def select(self, branches: Int[Array, "B N"]) -> "KVCache":
        """Go on from these branches, in this order; some may be dropped, some taken twice. Moves no keys or values."""
        return dataclasses.replace(self, valid=jnp.take_along_axis(self.valid, branches[:, :, None], axis=1))


def init_cache(layers: int, batch: int, heads: int, max_length: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `max_length` columns. Size: 2 * layers * batch * heads * max_length * head_dim elements.

    dtype: floating point, or int8, which adds 4 bytes for each head_dim elements.

    Raises:
      ValueError: another dtype.
    """
    if jnp.dtype(dtype) != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"a cache of {jnp.dtype(dtype)} is not supported: use int8 or a floating point dtype")

    def zeros():
        values = jnp.zeros((batch, heads, max_length, head_dim), dtype)
        scale = (*values.shape[:-1], 1)
        return Int8Array(values, jnp.zeros(scale, jnp.float32)) if values.dtype == jnp.int8 else values

    def empty():
        return tuple(zeros() for _ in range(layers))

    return KVCache(
        k=empty(),
        v=empty(),
        valid=jnp.zeros((batch, max_length), bool),
        next_position=jnp.zeros((batch,), jnp.int32),
        column=jnp.zeros((), jnp.int32),
        fresh=True,
    )


def _write(buffer: Float[Array, "*B H L K"] | Int8Array, new: Float[Array, "*B H T K"], column: Int[Array, ""]):
    """`buffer` with `new` in columns [column, column + T)."""
    columns = int8.quantize(new) if isinstance(buffer, Int8Array) else new.astype(buffer.dtype)
    return jax.tree.map(lambda b, n: lax.dynamic_update_slice_in_dim(b, n, column, axis=b.ndim - 2), buffer, columns)
