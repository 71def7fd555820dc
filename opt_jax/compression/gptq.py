"""GPTQ: weights not yet rounded are corrected for the errors of those that are.

Frantar et al. 2022, arXiv 2210.17323, section 3.3 and algorithm 1, and `gptq.py` of https://github.com/IST-DASLab/gptq.
As there, the scales of a group hold for weights that are corrected for the blocks before, not for columns before in
the same block. Differences: U (upper triangular, U^T U = inverse of H) comes from one Cholesky factorisation and one
triangular inverse of H with its inputs reversed, not from two factorisations and an inverse. It is the same matrix
with smaller rounding errors. Under act-order, inputs with equal diagonals keep their order.

`qwix.contrib.gptq_core` has no act-order, and its Python loop over columns would give XLA a program with 16,384 steps
for one matrix of the 6.7B.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from opt_jax.compression.grid import Grid, Scales, fit_groups, on_grid, refit, to_matrix
from opt_jax.compression.statistics import dot, layer_error
from opt_jax.model.packed import QuantizedMatrix

# (weights of a block, column in the block, state) -> (what takes the place of the column, state)
Compress = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def gptq(
    weight: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    grid: Grid,
    *,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[QuantizedMatrix, float]:
    """The quantised matrix whose outputs are close to those of `weight`, and its `layer_error`.

    Args:
      weight: [N, K], outputs by inputs.
      hessian: [K, K] from `add_hessian`.
      grid: bits and groups.
      act_order: begin with the inputs of the largest diagonals of `hessian`. Groups are groups in this order.
      static_groups: groups are neighbours in spite of `act_order`, and their scales those of the weights before.
      damping: this share of the mean diagonal of `hessian` is added to its diagonal.
      block_size: how many columns are compressed before those after them are corrected.

    Raises:
      ValueError: a Hessian of no inputs, or one that is not positive definite; a group size that does not divide K.
    """
    check_hessian(hessian)
    options = dict(act_order=act_order, static_groups=static_groups, damping=damping, block_size=block_size)
    quantized, has_factor = _gptq(weight, hessian, grid, **options)
    check_factor(has_factor)
    return quantized, float(layer_error(weight, quantized, hessian))


@partial(jax.jit, static_argnames=("grid", "act_order", "static_groups", "block_size"))
def _gptq(
    weight: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    grid: Grid,
    *,
    act_order: bool,
    static_groups: bool,
    damping: float | Float[Array, ""],
    block_size: int,
) -> tuple[QuantizedMatrix, Bool[Array, ""]]:
    groups = grid.groups(weight.shape[1])
    live, hessian = without_dead(weight, hessian)
    scales = fit_groups(weight if grid.group_size is None else live, grid)
    order = jnp.argsort(-jnp.diagonal(hessian), stable=True) if act_order else jnp.arange(weight.shape[1])
    place = jnp.argsort(order)
    if static_groups:
        groups = groups[order]
    fixed = static_groups or grid.group_size is None

    def begin(weights: jax.Array, start: jax.Array, _width: int) -> Compress:
        def compress(block: jax.Array, i: jax.Array, scales: Scales) -> tuple[jax.Array, Scales]:
            if not fixed:
                scales = refit(scales, weights, start + i, grid)
            return on_grid(block[:, i], scales, groups[start + i], grid), scales

        return compress

    factor = inverse_factor(hessian[order[:, None], order[None]], damping)
    result, scales = sweep(live[:, order], factor, block_size, begin, scales)
    return to_matrix(result[:, place], scales, groups[place], grid), jnp.isfinite(factor).all()


def check_hessian(hessian: Float[Array, "K K"]) -> None:
    """Refuse a Hessian that no inputs have made.

    Raises:
      ValueError: it is zero, or it has values that are not finite.
    """
    trace = float(jnp.trace(hessian))
    if not trace > 0 or not math.isfinite(trace):
        raise ValueError(f"the Hessian has the trace {trace}: no inputs of the matrix were collected, or infinite ones")


def check_factor(has_factor: Bool[Array, ""]) -> None:
    """Refuse a Hessian without a Cholesky factor. Where there is none, JAX gives NaN, and NaN as an integer is 0.

    Raises:
      ValueError: the damped Hessian is not positive definite.
    """
    if not has_factor:
        raise ValueError("the Hessian is not positive definite; use more calibration tokens, or a larger damping")


def without_dead(
    weight: Float[Array, "N K"], hessian: Float[Array, "K K"]
) -> tuple[Float[Array, "N K"], Float[Array, "K K"]]:
    """Both, for inputs that were always 0: their weights are 0, and their diagonals 1."""
    dead = jnp.diagonal(hessian) == 0
    return jnp.where(dead[None], 0, weight), hessian + jnp.diag(dead.astype(hessian.dtype))


def inverse_factor(hessian: Float[Array, "K K"], damping: float | Float[Array, ""]) -> Float[Array, "K K"]:
    """U, upper triangular, with U^T U = inverse of the damped Hessian.

    H reversed (both axes) is M M^T, so that H is R R^T with R = M reversed, and U is the inverse of R.
    """
    identity = jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    damped = hessian + damping * jnp.diagonal(hessian).mean() * identity
    lower = lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
    return jnp.triu(lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)[::-1, ::-1])


def sweep(
    weight: Float[Array, "N K"],
    factor: Float[Array, "K K"],
    block_size: int,
    begin: Callable[[jax.Array, jax.Array, int], Compress],
    state: Any,
) -> tuple[Float[Array, "N K"], Any]:
    """Compress column after column, and correct the columns after each for its error.

    Args:
      weight: [N, K].
      factor: from `inverse_factor`.
      block_size: the columns after a block are corrected once, at its end.
      begin: called for each block with all weights, corrected for the blocks before, the block's first column, and how
        many it has.
      state: the state of the first column.

    Returns:
      The compressed weights, and the state after the last column.
    """
    columns = weight.shape[1]

    def do_block(start: jax.Array, weights: jax.Array, state: Any, width: int) -> tuple[jax.Array, Any]:
        compress = begin(weights, start, width)
        rows = lax.dynamic_slice_in_dim(factor, start, width, axis=0)
        inside = lax.dynamic_slice_in_dim(rows, start, width, axis=1)

        def do_column(i: jax.Array, carry: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
            block, errors, state = carry
            column, state = compress(block, i, state)
            error = (block[:, i] - column) / inside[i, i]
            block = block - error[:, None] * inside[i][None]
            return block.at[:, i].set(column), errors.at[:, i].set(error), state

        block = lax.dynamic_slice_in_dim(weights, start, width, axis=1)
        block, errors, state = lax.fori_loop(0, width, do_column, (block, jnp.zeros_like(block), state))
        after = jnp.where(jnp.arange(columns)[None] < start + width, 0, rows)
        return lax.dynamic_update_slice_in_dim(weights - dot(errors, after), block, start, axis=1), state

    full, rest = divmod(columns, block_size)
    if full:  # a slice of a block's width is an error in a narrower matrix, even in a loop of no steps
        weight, state = lax.fori_loop(
            0, full, lambda b, c: do_block(b * block_size, c[0], c[1], block_size), (weight, state)
        )
    return do_block(jnp.asarray(full * block_size), weight, state, rest) if rest else (weight, state)
