"""AWQ: inputs with large activations get finer steps, by scales that move into what comes before the matrix.

Lin et al. 2023, arXiv 2306.00978, section 3.2, and `auto_scale.py`, `auto_clip.py` of
https://github.com/mit-han-lab/llm-awq. Scales of an OPTDecoderLayer there, each with the op that takes their inverse:
q_proj, k_proj and v_proj (`self_attn_layer_norm`; the outputs compared are those of attention); out_proj (v_proj); fc1
(`final_layer_norm`); fc2 (fc1, exact with ReLU). All four are searched with the weights as they were, then applied;
then all but q_proj and k_proj are clipped.

Differences: the grid is GPTQ's (`grid.py`), not that of `quantizer.py`, which is another one for groups whose weights
have the same sign, and for those narrower than 1e-5. Losses are summed over batches.

`qwix.contrib.awq_core` compares weights times mean activations, not outputs. It has other ratios and clips nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from opt_jax.compression.grid import Grid, fit, round_to_nearest, to_integers
from opt_jax.compression.smoothquant import fold_into_inputs
from opt_jax.compression.statistics import dot
from opt_jax.model.packed import QuantizedMatrix

_SMALLEST = 1e-4
Outputs = Callable[[Sequence[jax.Array], jax.Array], jax.Array]  # (matrices, inputs [B, T, K]) -> outputs to compare


@jax.jit
def product(weights: Sequence[Float[Array, "N K"]], inputs: Float[Array, "B T K"]) -> Float[Array, "B*T N"]:
    """The outputs of one matrix: what `search_scales` compares for out_proj, fc1 and fc2."""
    (weight,) = weights
    return dot(inputs.reshape(-1, inputs.shape[-1]).astype(weight.dtype), weight.T)


def search_scales(
    weights: Sequence[Float[Array, "N K"]],
    batches: Iterable[Float[Array, "B T K"]],
    outputs: Outputs,
    grid: Grid,
    *,
    steps: int = 20,
) -> Float[Array, " K"]:
    """The scales of the inputs: mean|x_j|**ratio, with the ratio of 0, 1 / steps, ... that changes outputs least.

    Args:
      weights: the matrices with these inputs, [N, K] each.
      batches: calibration inputs; they are read twice.
      outputs: (weights, inputs) -> what is compared. It does not change `weights` (biases are its own), and is best
        jitted.
      grid: bits and groups.
      steps: how many ratios.

    Raises:
      ValueError: no batches, or outputs that are not finite.
    """
    total, tokens = jnp.zeros(weights[0].shape[1], weights[0].dtype), 0
    for inputs in batches:
        total, tokens = total + jnp.abs(inputs.astype(total.dtype)).sum((0, 1)), tokens + math.prod(inputs.shape[:2])
    if not tokens:
        raise ValueError("no inputs of the matrix were collected")
    candidates = [_candidate(total / tokens, step / steps) for step in range(steps)]
    losses = [0.0] * steps
    for inputs in batches:
        expected = outputs(weights, inputs)
        for step, scales in enumerate(candidates):
            losses[step] += float(_squares(expected, outputs(_rounded(weights, scales, grid), inputs)))
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"the outputs differ by {losses} at the {steps} ratios: not all are finite")
    return candidates[losses.index(min(losses))]


@jax.jit
def _candidate(mean: Float[Array, " K"], ratio: float | Float[Array, ""]) -> Float[Array, " K"]:
    scales = jnp.maximum(mean**ratio, _SMALLEST)
    return scales / jnp.sqrt(scales.max() * scales.min())


@partial(jax.jit, static_argnames="grid")
def _rounded(
    weights: Sequence[Float[Array, "N K"]], scales: Float[Array, " K"], grid: Grid
) -> Sequence[Float[Array, "N K"]]:
    rounded = [round_to_nearest(fold_into_inputs(weight, scales), grid).dequantize() for weight in weights]
    return [weight.astype(scales.dtype) / scales[None] for weight in rounded]


@jax.jit
def _squares(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.square(x - y).sum()


def fold_into_outputs(
    weight: Float[Array, "N K"], bias: Float[Array, " N"] | None, scales: Float[Array, " N"]
) -> tuple[Float[Array, "N K"], Float[Array, " N"] | None]:
    """(weight, bias) of a matrix whose outputs are divided by `scales`: v_proj before out_proj, fc1 before fc2."""
    return weight / scales[:, None], None if bias is None else bias / scales


def quantize(
    weight: Float[Array, "N K"], scales: Float[Array, " K"], inputs: Float[Array, "T K"] | None, grid: Grid
) -> QuantizedMatrix:
    """The rounded matrix for inputs that are divided by `scales`.

    Args:
      weight: [N, K], as it was before scaling.
      scales: from `search_scales`, or ones.
      inputs: calibration tokens before scaling, for `search_clip`; None clips nothing (q_proj and k_proj).
      grid: bits and groups.
    """
    scaled = fold_into_inputs(weight, scales)
    if inputs is not None:
        scaled = clip(scaled, search_clip(scaled, inputs / scales[None], grid))
    return round_to_nearest(scaled, grid)


@jax.jit
def clip(weight: Float[Array, "N K"], limits: Float[Array, "N G"]) -> Float[Array, "N K"]:
    """The matrix with no absolute value above the limit of its group."""
    grouped = weight.reshape(*limits.shape, -1)
    return jnp.clip(grouped, -limits[..., None], limits[..., None]).reshape(weight.shape)


def search_clip(
    weight: Float[Array, "N K"],
    inputs: Float[Array, "T K"],
    grid: Grid,
    *,
    steps: int = 20,
    shrink: float = 0.5,
    tokens: int = 512,
) -> Float[Array, "N G"]:
    """The largest absolute value of each group of weights, reduced such that its share of the output changes least.

    Args:
      weight: [N, K].
      inputs: calibration tokens [T, K]. Evenly spaced ones are used.
      grid: bits and groups.
      steps: limits are 1, 1 - 1 / steps, ... times the largest absolute value.
      shrink: the share of steps that are tried.
      tokens: how many tokens are used at least, and fewer than twice as many at most, if there are so many.
    """
    sample = inputs[:: max(inputs.shape[0] // tokens, 1)].astype(weight.dtype)
    return _search_clip(weight, sample, grid, tuple(1 - step / steps for step in range(int(shrink * steps))))


@partial(jax.jit, static_argnames=("grid", "factors"))
def _search_clip(
    weight: Float[Array, "N K"], inputs: Float[Array, "T K"], grid: Grid, factors: tuple[float, ...]
) -> Float[Array, "N G"]:
    size = grid.size(weight.shape[1])
    x = inputs.reshape(inputs.shape[0], -1, size)

    def limits_of(row: Float[Array, "G S"]) -> Float[Array, " G"]:
        limits = jnp.asarray(factors, row.dtype)[:, None] * jnp.abs(row).max(-1)[None]

        def error(limit: Float[Array, " G"]) -> Float[Array, " G"]:
            clipped = jnp.clip(row, -limit[:, None], limit[:, None])
            scales, zeros = (part[:, None] for part in fit(clipped, grid))
            change = (to_integers(clipped, scales, zeros, grid) - zeros) * scales - row
            return jnp.square(jnp.einsum("tgk,gk->tg", x, change, precision=lax.Precision.HIGHEST)).mean(0)

        best = lax.map(error, limits).argmin(0)
        return jnp.take_along_axis(limits, best[None], axis=0)[0]

    return lax.map(limits_of, weight.reshape(weight.shape[0], -1, size), batch_size=256)
