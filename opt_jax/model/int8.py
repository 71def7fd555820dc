"""int8 arrays with float32 scales, and products with them. Quantisation uses qwix, the optional extra `int8`."""

import dataclasses
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Array:
    """The array `values * scale`, with one scale for each vector along the last axis."""

    values: Int8[Array, "*shape K"]
    scale: Float32[Array, "*shape 1"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self) -> Float32[Array, "*shape K"]:
        return self.values.astype(jnp.float32) * self.scale


def qwix() -> ModuleType:
    """The module qwix, imported on first use; ImportError if it is not installed."""
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise ImportError(f"int8 needs the package qwix ({error}): pip install qwix") from None
    return qwix


def quantize(x: Float[Array, "*shape K"]) -> Int8Array:
    """x rounded to multiples, -128 to 127, of a scale: absmax / 127.5 of each vector along the last axis."""
    array = qwix().quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=range(x.ndim - 1))
    return Int8Array(array.qvalue, array.scale)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def einsum(spec: str, x: Float[Array, "*batch T K"], values: Int8[Array, "..."]) -> Float32[Array, "*batch T N"]:
    """`jnp.einsum(spec, x, values)`, summed over the last axis of x. The caller multiplies by the scales.

    On a CPU, XLA would convert the int8 operand to float32 in memory at every call, or multiply single elements. Both
    are five to ten times slower than float32. So on a CPU x becomes integers as well (see `_in_digits`). On GPUs and
    TPUs, XLA converts while it reads.
    """
    return lax.platform_dependent(x, values, cpu=partial(_in_digits, spec), default=partial(_as_float, spec))


@einsum.defjvp
def _(_spec: Any, _primals: Any, _tangents: Any):
    raise ValueError("int8 weights and caches have no gradients: train the model that was quantized")


def _as_float(spec: str, x: Float[Array, "*batch T K"], values: Int8[Array, "..."]) -> Float32[Array, "*batch T N"]:
    return jnp.einsum(spec, x, values.astype(x.dtype), preferred_element_type=jnp.float32)


def _in_digits(spec: str, x: Float[Array, "*batch T K"], values: Int8[Array, "..."]) -> Float32[Array, "*batch T N"]:
    """The einsum, with x rounded to integers of two int8 digits: 256 * first + second.

    The rounding error is at most absmax / 65278 of each row of x. Both digits go through one product int8 x int8 ->
    int32, as 2T rows. It reads each byte of `values` once. A single row becomes two rows; for one, XLA has no such
    product. Sums of up to 130,000 terms fit into int32.
    """
    x = x.astype(jnp.float32)
    # XLA divides like this in many programs, but not in all. If it is written out, it is the same in all of them.
    step = jnp.maximum(jnp.abs(x).max(-1, keepdims=True) * (1 / (127 * 256 + 127)), jnp.finfo(jnp.float32).tiny)
    x = jnp.round(x * (1 / step)).astype(jnp.int32)
    first = (x + 128) >> 8  # rounds to nearest, so that the second digit is in [-128, 127]
    digits = jnp.concatenate([first, x - 256 * first], axis=-2).astype(jnp.int8)
    out = jnp.einsum(spec, digits, values, preferred_element_type=jnp.int32).astype(jnp.float32)
    first, second = jnp.split(out, 2, axis=-2)
    return (256 * first + second) * step
