"""Products in bfloat16 on a CPU that has instructions for them (AVX512-BF16, AMX), in calls without gradients.

Before a product whose result is bfloat16, XLA converts both matrices to float32. A product whose result is float32
calls a kernel of YNNPACK that reads bfloat16. Both add up in float32.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opt_jax.model.decoder import Embed, Linear
from opt_jax.model.relu_sparsity import skips_zeros
from opt_jax.parallel.mesh import platform_of

_CPU_INFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def has_instructions() -> bool:
    """Whether the CPU of this machine multiplies bfloat16. Known on Linux only."""
    flags = _CPU_INFO.read_text("utf-8", "replace").split() if _CPU_INFO.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def with_cpu_products(model: Any) -> Any:
    """The model, or on such a CPU one with the same arrays, whose linear layers and LM head call that kernel."""
    if model.dtype != jnp.bfloat16 or not has_instructions() or platform_of(model) != "cpu":
        return model
    copy = jax.tree.map(lambda x: x, model)
    for _, module in nnx.iter_graph(copy):
        # (Layers that skip zeros multiply in float32 already.)
        if type(module) is Linear and not skips_zeros(module):
            module.dot_general = Rounded(module.dot_general)
        elif type(module) is Embed:
            module.__class__ = _Embed
    return copy


class _Embed(Embed):
    """The tied LM head, whose result is float32 already."""

    def attend(self, x: jax.Array) -> jax.Array:
        return super().attend(_two_rows(x))[: len(x)]


def _two_rows(x: jax.Array) -> jax.Array:
    """`x` [B, T, D], or two copies of a single token.

    The kernel multiplies no matrix by one row. XLA would keep a float32 copy of the matrices, and make it in each call
    (docs/performance.md).
    """
    return jnp.concatenate([x, x]) if x.shape[:-1] == (1, 1) else x


class Rounded:
    """A product in float32, rounded to the dtype that was asked for, or else to that of the activations."""

    def __init__(self, dot_general: Any):
        self._dot_general = dot_general

    def __call__(self, x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **kwargs: Any) -> jax.Array:
        dtype = kwargs.pop("preferred_element_type", None) or x.dtype
        y = self._dot_general(_two_rows(x), kernel, dimension_numbers, preferred_element_type=jnp.float32, **kwargs)
        return y[: len(x)].astype(dtype)

    def __eq__(self, other: object) -> bool:  # otherwise each call of `generate` would compile
        return isinstance(other, Rounded) and other._dot_general == self._dot_general

    def __hash__(self) -> int:
        return hash(self._dot_general)
