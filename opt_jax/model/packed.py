"""Matrices as integers of a few bits with scales by groups of inputs, as GPTQ and AWQ make them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt8


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
