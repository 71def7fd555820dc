"""SparseGPT: pruning, alone or jointly with quantisation, that corrects the weights after each that it removes.

Frantar and Alistarh 2023, arXiv 2301.00774, sections 3.2 to 3.5 and algorithm 1, and `sparsegpt.py` of
https://github.com/IST-DASLab/sparsegpt. As there, the mask of a block of columns has one threshold for all outputs, and
removes one weight more than the share says. Differences: those of `gptq`; of equal weights, n:m removes those of the
lower inputs (there, what `torch.topk` does); the grid may have groups, fitted as in GPTQ. qwix has no pruning by it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from opt_jax.compression.gptq import Compress, check_factor, check_hessian, inverse_factor, sweep, without_dead
from opt_jax.compression.grid import Grid, fit_groups, on_grid, refit, to_matrix
from opt_jax.compression.pruning import Sparsity, check_sparsity, lowest, up_to_share
from opt_jax.compression.statistics import layer_error
from opt_jax.model.packed import QuantizedMatrix


def sparsegpt(
    weight: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    sparsity: Sparsity,
    grid: Grid | None = None,
    *,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Float[Array, "N K"] | QuantizedMatrix, float]:
    """The matrix with zeros whose outputs are close to those of `weight`, and its `layer_error`.

    Args:
      weight: [N, K], outputs by inputs.
      hessian: [K, K] from `add_hessian`.
      sparsity: the share of weights to remove, or (n, m) to remove n of each m.
      grid: also rounds the weights that stay.
      damping: this share of the mean diagonal of `hessian` is added to its diagonal.
      block_size: how many columns are compressed before those after them are corrected, and share a threshold.

    Raises:
      ValueError: as in `check_sparsity`; m does not divide the block size; a Hessian of no inputs, or one that is not
        positive definite; a group size that does not divide K.
    """
    check_sparsity(sparsity, weight.shape[1])
    if isinstance(sparsity, tuple) and block_size % sparsity[1]:
        raise ValueError(f"sparsity {sparsity[0]}:{sparsity[1]}: {sparsity[1]} does not divide block_size {block_size}")
    check_hessian(hessian)
    compressed, has_factor = _sparsegpt(weight, hessian, sparsity, grid, damping=damping, block_size=block_size)
    check_factor(has_factor)
    return compressed, float(layer_error(weight, compressed, hessian))


@partial(jax.jit, static_argnames=("sparsity", "grid", "block_size"))
def _sparsegpt(
    weight: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    sparsity: Sparsity,
    grid: Grid | None,
    *,
    damping: float | Float[Array, ""],
    block_size: int,
) -> tuple[Float[Array, "N K"] | QuantizedMatrix, Bool[Array, ""]]:
    columns = weight.shape[1]
    live, hessian = without_dead(weight, hessian)
    factor = inverse_factor(hessian, damping)
    diagonal = jnp.diagonal(factor)
    n, m = sparsity if isinstance(sparsity, tuple) else (0, 0)
    groups = jnp.zeros(columns, jnp.int32) if grid is None else grid.groups(columns)
    scales = () if grid is None else fit_groups(weight if grid.group_size is None else live, grid)

    def scores(weights: jax.Array, start: jax.Array) -> jax.Array:
        return jnp.square(weights / lax.dynamic_slice_in_dim(diagonal, start, weights.shape[1])[None])

    def begin(weights: jax.Array, start: jax.Array, width: int) -> Compress:
        block = lax.dynamic_slice_in_dim(weights, start, width, axis=1)
        of_block = None if isinstance(sparsity, tuple) else up_to_share(scores(block, start), sparsity)

        def of_next(block: jax.Array, i: jax.Array) -> jax.Array:
            return lowest(scores(lax.dynamic_slice_in_dim(block, i, m, axis=1), start + i), n)

        def compress(block: jax.Array, i: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            scales, removed = state
            if of_block is None:
                removed = lax.cond(i % m == 0, lambda: of_next(block, i), lambda: removed)
            column = jnp.where(removed[:, i % m] if of_block is None else of_block[:, i], 0, block[:, i])
            if grid is not None:
                scales = scales if grid.group_size is None else refit(scales, weights, start + i, grid)
                column = on_grid(column, scales, groups[start + i], grid)
            return column, (scales, removed)

        return compress

    state = (scales, jnp.zeros((weight.shape[0], m), bool))
    result, (scales, _) = sweep(live, factor, block_size, begin, state)
    compressed = result if grid is None else to_matrix(result, scales, groups, grid)
    return compressed, jnp.isfinite(factor).all()
