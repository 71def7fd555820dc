"""int8 arrays with float32 scales, and products with them. Quantises through qwix, the optional extra `int8`."""

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
    """`values * scale`: one scale for each vector along the last axis."""

    values: Int8[Array, "*shape K"]
    scale: Float32[Array, "*shape 1"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self) -> Float32[Array, "*shape K"]:
        return self.values.astype(jnp.float32) * self.scale


def qwix() -> ModuleType:
    """The library, imported on first use; ImportError with what to do where it is not installed."""
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise ImportError(f'int8 needs qwix ({error}): pip install "opt-jax[int8]"') from None
    return qwix


def quantize(x: Float[Array, "*shape K"]) -> Int8Array:
    """The nearest multiples, -128 to 127, of absmax / 127.5 of each vector along the last axis."""
    array = qwix().quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=range(x.ndim - 1))
    return Int8Array(array.qvalue, array.scale)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def einsum(spec: str, x: Float[Array, "*batch T K"], values: Int8[Array, "..."]) -> Float32[Array, "*batch T N"]:
    """`jnp.einsum(spec, x, values)`, summed over the last axis of x. Scales are the caller's.

    On a CPU, XLA would write the int8 operand out as float32 at every call, or multiply number by number: five to ten
    times slower than float32. There x is made of integers as well (see `_in_digits`). The compilers for GPU and TPU
    convert while they read.
    """
    return lax.platform_dependent(x, values, cpu=partial(_in_digits, spec), default=partial(_as_float, spec))


@einsum.defjvp
def _(_spec: Any, _primals: Any, _tangents: Any):
    raise ValueError("int8 weights and caches have no gradients: train the model that was quantized")


def _as_float(spec: str, x: Float[Array, "*batch T K"], values: Int8[Array, "..."]) -> Float32[Array, "*batch T N"]:
    return jnp.einsum(spec, x, values.astype(x.dtype), preferred_element_type=jnp.float32)


def _in_digits(spec: str, x: Float[Array, "*batch T K"], values: Int8[Array, "..."]) -> Float32[Array, "*batch T N"]:
    """x as integers of two int8 digits, 256 * first + second: within absmax / 65278 of each row of x.

    Both go through one product int8 x int8 -> int32, as 2T rows, so that `values` is read once, a byte each; and a
    single row, for which XLA has no such product, becomes two. (int32 has room for sums of 130,000 terms.)
    """
    x = x.astype(jnp.float32)
    step = jnp.maximum(jnp.abs(x).max(-1, keepdims=True) / (127 * 256 + 127), jnp.finfo(jnp.float32).tiny)
    x = jnp.round(x / step).astype(jnp.int32)
    first = (x + 128) >> 8  # to the nearest, so that what is left is in [-128, 127]
    digits = jnp.concatenate([first, x - 256 * first], axis=-2).astype(jnp.int8)
    out = jnp.einsum(spec, digits, values, preferred_element_type=jnp.int32).astype(jnp.float32)
    first, second = jnp.split(out, 2, axis=-2)
    return (256 * first + second) * step
