"""What the methods need to know about the inputs of a matrix, and how much its outputs change.

Inputs are [B, T, K]: B sequences of T tokens. Statistics are running means over sequences, as in `add_batch` of GPTQ
(https://github.com/IST-DASLab/gptq) and of Wanda (https://github.com/locuslab/wanda). They keep the dtype they begin
with: begin with zeros in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from opt_jax.model.packed import QuantizedMatrix


def dot(x: Float[Array, "A B"], y: Float[Array, "B C"]) -> Float[Array, "A C"]:
    """The product in full precision: GPUs and TPUs would round float32 to fewer bits."""
    return jnp.dot(x, y, precision=lax.Precision.HIGHEST)


def _flat(inputs: Float[Array, "B T K"], like: Array) -> Float[Array, "B*T K"]:
    return inputs.reshape(-1, inputs.shape[-1]).astype(like.dtype)


@jax.jit
def add_hessian(
    hessian: Float[Array, "K K"], sequences: int | Int[Array, ""], inputs: Float[Array, "B T K"]
) -> Float[Array, "K K"]:
    """2 / n times the sum of x x^T over all tokens x of the n sequences so far.

    Args:
      hessian: the result for the sequences before.
      sequences: how many these were.
      inputs: of B more sequences.
    """
    before = jnp.asarray(sequences, hessian.dtype)
    total = before + inputs.shape[0]
    x = _flat(inputs, hessian) * jnp.sqrt(2 / total)
    return hessian * (before / total) + dot(x.T, x)


@jax.jit
def add_squares(
    squares: Float[Array, " K"], sequences: int | Int[Array, ""], inputs: Float[Array, "B T K"]
) -> Float[Array, " K"]:
    """1 / n times the sum of x * x over all tokens x of the n sequences so far; its root is what Wanda calls norms."""
    before = jnp.asarray(sequences, squares.dtype)
    total = before + inputs.shape[0]
    return squares * (before / total) + jnp.square(_flat(inputs, squares)).sum(0) / total


@jax.jit
def add_absmax(absmax: Float[Array, " K"], inputs: Float[Array, "B T K"]) -> Float[Array, " K"]:
    """The largest absolute value of each input so far."""
    return jnp.maximum(absmax, jnp.abs(_flat(inputs, absmax)).max(0))


@jax.jit
def layer_error(
    weight: Float[Array, "N K"], compressed: Float[Array, "N K"] | QuantizedMatrix, hessian: Float[Array, "K K"]
) -> Float[Array, ""]:
    """The squared change of the outputs on the calibration inputs, relative to the squared outputs.

    tr(D H D^T) / tr(W H W^T) with D = W - compressed.
    """
    dense = compressed.dequantize() if isinstance(compressed, QuantizedMatrix) else compressed
    change = weight - dense.astype(weight.dtype)
    squared_change, squared = (jnp.vdot(dot(x, hessian), x) for x in (change, weight))
    return squared_change / jnp.maximum(squared, jnp.finfo(weight.dtype).tiny)
