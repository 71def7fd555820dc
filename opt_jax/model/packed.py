"""Matrices as integers of a few bits with scales by groups of inputs, as GPTQ and AWQ make them.

`QuantizedMatrix` is what methods and files hand over. `PackedLinear` is a layer that keeps the bits packed in memory.
`packing.py` has its products, and `packed_models.py` the functions for models.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, UInt8, UInt32

from opt_jax.model.packing import pack, product, slots_of_groups, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [N, K], outputs by inputs, as in PyTorch: `(integers - zeros) * scales`, by groups of inputs.

    Attributes:
      integers: 0 to 2**bits - 1.
      scales: one for each output and group.
      zeros: the integers that mean 0, one for each output and group; 2**(bits - 1) of a symmetric grid.
      groups: the group of each input. Without act-order it is `arange(K) // group_size`.
      bits: 2 to 8.
    """

    integers: UInt8[Array, "N K"]
    scales: Float32[Array, "N G"]
    zeros: Float32[Array, "N G"]
    groups: Int32[Array, " K"]
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.integers.shape
        return rows, columns

    def dequantize(self) -> Float32[Array, "N K"]:
        """The matrix in float32."""
        integers = self.integers.astype(jnp.float32)
        return (integers - self.zeros[:, self.groups]) * self.scales[:, self.groups]


class PackedLinear(nnx.Module):
    """`nnx.Linear` whose kernel [K, N], inputs by outputs, is a `QuantizedMatrix` of packed integers.

    Inputs are sorted by their group. Each of the G groups has S / G slots, a multiple of `period(bits)`. Slots that a
    smaller group leaves over hold `zeros`, and read a 0.

    The constructor takes these arrays by name; what is None is left out.

    Attributes:
      qweight: uint32 [S * bits / 32, N], see `pack`. Without act-order it is the `qweight` of GPTQ's files.
      scales: float32 [G, N].
      zeros: uint8 [G, N], the integers that mean 0; None: all are 2**(bits - 1).
      order: int32 [S], the input that each slot reads, K if it is left over; None: slot k reads input k, and S is K.
      bias: [N], or None.
      in_features: K.
      bits: 2 to 8.
      dtype: the compute dtype.
      activation_bits: 8: inputs are rounded to int8 as well (see `from_matrix`); None: they are not.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        bias: nnx.Param[Any] | None,
        *,
        in_features: int,
        bits: int,
        dtype: DTypeLike,
        activation_bits: int | None = None,
    ):
        self.qweight, self.scales = nnx.Param(arrays["qweight"]), nnx.Param(arrays["scales"])
        self.zeros = nnx.data(nnx.Param(arrays["zeros"]) if "zeros" in arrays else None)
        self.order = nnx.data(nnx.Param(arrays["order"]) if "order" in arrays else None)
        self.bias = nnx.data(bias)
        self.in_features, self.bits, self.dtype = in_features, bits, jnp.dtype(dtype)
        self.activation_bits = activation_bits

    @classmethod
    def from_matrix(
        cls,
        matrix: QuantizedMatrix,
        bias: nnx.Param[Any] | None = None,
        dtype: DTypeLike = jnp.float32,
        activation_bits: int | None = None,
    ) -> "PackedLinear":
        """A layer with the matrix as its kernel.

        Args:
          matrix: concrete arrays, on one device.
          bias: the bias of the layer that it replaces.
          dtype: the compute dtype.
          activation_bits: 8: W8A8, as SmoothQuant has it. Each token's inputs are rounded to multiples, -127 to 127, of
            absmax / 127, and the product is one of integers. It needs a symmetric grid of 8 bits with one group.

        Raises:
          ValueError: bits, zeros or groups that cannot be packed; other `activation_bits`.
        """
        _check(matrix, activation_bits)
        order, size = slots_of_groups(np.asarray(matrix.groups), matrix.scales.shape[1], matrix.bits)
        symmetric = bool((matrix.zeros == 2 ** (matrix.bits - 1)).all())
        arrays: dict[str, jax.Array] = {} if order is None else {"order": jnp.asarray(order, jnp.int32)}
        arrays |= {} if symmetric else {"zeros": matrix.zeros.T.astype(jnp.uint8)}
        arrays["scales"] = matrix.scales.T.astype(jnp.float32)
        arrays["qweight"] = _packed(matrix, arrays.get("order"), size)
        return cls(
            arrays, bias, in_features=matrix.shape[1], bits=matrix.bits, dtype=dtype, activation_bits=activation_bits
        )

    @property
    def out_features(self) -> int:
        """N."""
        return self.scales.get_value().shape[-1]

    @property
    def group_slots(self) -> int:
        """The number of slots of each group: the group size, unless groups are uneven."""
        slots = self.qweight.get_value().shape[0] * 32 // self.bits
        return slots // self.scales.get_value().shape[0]

    def matrix(self) -> QuantizedMatrix:
        """The matrix that `from_matrix` packed, bit by bit."""
        integers = unpack(self.qweight.get_value(), self.bits).T.astype(jnp.uint8)
        groups = jnp.arange(integers.shape[1], dtype=jnp.int32) // self.group_slots
        if self.order is not None:
            order = self.order.get_value()
            slot = jnp.zeros(self.in_features, jnp.int32).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
            integers, groups = integers[:, slot], groups[slot]
        scales = self.scales.get_value().T
        zeros = jnp.full_like(scales, 2 ** (self.bits - 1)) if self.zeros is None else self.zeros.get_value().T
        return QuantizedMatrix(integers, scales, zeros.astype(jnp.float32), groups, self.bits)

    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B N"]:
        """The product with the dequantized kernel, in the compute dtype."""
        x = x.astype(self.dtype)
        if self.order is not None:
            x = jnp.take(x, self.order.get_value(), axis=-1, mode="fill", fill_value=0)
        rows, step = x.reshape(-1, x.shape[-1]), None
        if self.activation_bits is not None:
            wide = rows.astype(jnp.float32)
            step = jnp.maximum(jnp.abs(wide).max(-1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
            rows = jnp.round(wide / step).astype(jnp.int8)
        zeros = None if self.zeros is None else self.zeros.get_value()
        out = product(rows, self.qweight.get_value(), self.scales.get_value(), zeros, self.bits)
        out = out if step is None else out * step
        if self.bias is not None:
            out += self.bias.get_value().astype(jnp.float32)[None]
        return out.astype(self.dtype).reshape(*x.shape[:-1], -1)


def _check(matrix: QuantizedMatrix, activation_bits: int | None) -> None:
    if not 2 <= matrix.bits <= 8:
        raise ValueError(f"bits={matrix.bits}: packed matrices have 2 to 8")
    zeros, groups = np.asarray(matrix.zeros), np.asarray(matrix.groups)
    if not ((zeros >= 0) & (zeros <= 255) & (zeros == np.round(zeros))).all():
        raise ValueError("zeros of a packed matrix are integers from 0 to 255")
    if groups.min() < 0 or groups.max() >= zeros.shape[1]:
        raise ValueError(f"groups of a packed matrix are 0 to {zeros.shape[1] - 1}, the last one of its scales")
    if activation_bits is not None:
        if activation_bits != 8:
            raise ValueError(f"activation_bits={activation_bits}: use 8, or None for inputs that are not rounded")
        if matrix.bits != 8 or zeros.shape[1] > 1 or (zeros != 128).any():
            raise ValueError("activation_bits=8 needs a matrix of 8 bits, symmetric, with one group: quantize it so")


@partial(jax.jit, static_argnums=2)
def _packed(matrix: QuantizedMatrix, order: Any, size: int) -> UInt32[Array, "W N"]:
    integers = matrix.integers.T
    if order is not None:
        zeros = jnp.repeat(matrix.zeros.T.astype(jnp.uint8), size, axis=0)
        taken = jnp.take(integers, order, axis=0, mode="clip")
        integers = jnp.where((order < len(integers))[:, None], taken, zeros)
    return pack(integers, matrix.bits)
