"""SmoothQuant: outliers of activations move into the weights; then both are int8 (W8A8).

Xiao et al. 2022, arXiv 2211.10438, section 4, equation 4, and `smooth.py`, `fake_quant.py` of
https://github.com/mit-han-lab/smoothquant: q_proj, k_proj and v_proj behind `self_attn_layer_norm`, fc1 behind
`final_layer_norm`. Weights have a scale for each output, activations one for each token ("per_channel" and "per_token"
there). Differences: what goes into the products of attention stays as it is (`quantize_bmm_input=False` there), and
scales are computed in float32.

`qwix.contrib.smooth_quant` divides the activations while the model runs, and folds nothing into the LayerNorms.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from opt_jax.compression.grid import divide
from opt_jax.config import OPTConfig
from opt_jax.model.packed import QuantizedMatrix

LARGEST = 127  # int8 without -128
_SMALLEST = 1e-5  # of scales, and of the ranges that they divide


def check_norms(config: OPTConfig) -> None:
    """Refuse models whose LayerNorms cannot take the scales of the projections behind them.

    Raises:
      ValueError: LayerNorms come after the residual sum (the 350M), or they have no scale and bias.
    """
    if not config.do_layer_norm_before:
        raise ValueError(
            "SmoothQuant and AWQ fold scales into the LayerNorm before a projection, and do_layer_norm_before=False "
            "(the 350M) has LayerNorms whose outputs are the residual stream as well; use gptq"
        )
    if not config.layer_norm_elementwise_affine:
        raise ValueError(
            "SmoothQuant and AWQ fold scales into LayerNorms, and layer_norm_elementwise_affine=False leaves these "
            "without parameters; use gptq"
        )


def smoothing_scales(
    absmax: Float[Array, " K"], weights: Sequence[Float[Array, "N K"]], alpha: float = 0.5
) -> Float[Array, " K"]:
    """max|x_j|**alpha / max|w_j|**(1 - alpha) for each input j.

    Args:
      absmax: the largest absolute value of each input, from `add_absmax`.
      weights: all matrices with these inputs, [N, K] each.
      alpha: 0 leaves activations as they are, 1 makes their ranges equal. The paper uses 0.5 for OPT.
    """
    largest = jnp.stack([jnp.abs(weight).max(0) for weight in weights]).max(0)
    scales = absmax**alpha / jnp.maximum(largest, _SMALLEST) ** (1 - alpha)
    return jnp.maximum(scales, _SMALLEST)


def fold_into_norm(
    scale: Float[Array, " K"], bias: Float[Array, " K"], scales: Float[Array, " K"]
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """(scale, bias) of a LayerNorm whose output is divided by `scales`."""
    return scale / scales, bias / scales


def fold_into_inputs(weight: Float[Array, "N K"], scales: Float[Array, " K"]) -> Float[Array, "N K"]:
    """The matrix for inputs that are divided by `scales`."""
    return weight * scales[None]


@jax.jit
def quantize_weight(weight: Float[Array, "N K"]) -> QuantizedMatrix:
    """The matrix in int8, -127 to 127, with one scale for each output."""
    scales = _scales(weight)
    integers = jnp.round(divide(weight, scales)) + 128
    groups = jnp.zeros(weight.shape[1], jnp.int32)
    zeros = jnp.full(scales.shape, 128, jnp.float32)
    return QuantizedMatrix(integers.astype(jnp.uint8), scales.astype(jnp.float32), zeros, groups, 8)


@jax.jit
def quantize_activations(x: Float[Array, "*T K"]) -> tuple[Int8[Array, "*T K"], Float[Array, "*T 1"]]:
    """(integers, scales): each token in int8, -127 to 127, with a scale of its own."""
    scales = _scales(x)
    return jnp.round(divide(x, scales)).astype(jnp.int8), scales


def _scales(x: Float[Array, "*T K"]) -> Float[Array, "*T 1"]:
    return divide(jnp.maximum(jnp.abs(x).max(-1, keepdims=True), _SMALLEST), jnp.asarray(LARGEST, x.dtype))
