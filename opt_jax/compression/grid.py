"""Grids of integers for the weights of a matrix, and rounding to the nearest point of a grid.

Grids are those of GPTQ's `quant.py` (https://github.com/IST-DASLab/gptq, Frantar et al. 2022, arXiv 2210.17323,
section 5): from the smallest to the largest weight of an output, or of a group of its inputs, and 0 lies on the grid.
Differences: a symmetric grid is symmetric also where all weights are positive (there, `quant.py` clips the larger
half of them), and the search for a smaller range (`mse`, off in the paper) is missing.

qwix has no grids with a zero point that keep 0 exactly, none of 3 bits, and no groups in act-order.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from opt_jax.model.packed import QuantizedMatrix


@dataclasses.dataclass(frozen=True)
class Grid:
    """The integers 0 to 2**bits - 1, and what shares a scale.

    Attributes:
      bits: 2 to 8.
      group_size: how many inputs of an output share a scale. None: all of them.
      symmetric: whether 2**(bits - 1) means 0. Otherwise each scale has its zero.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; it must be 2 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it must be positive, or None for all inputs")

    @property
    def largest(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1

    def groups(self, inputs: int) -> Int[Array, " K"]:
        """The group of each input, if groups are neighbours."""
        return jnp.arange(inputs, dtype=jnp.int32) // self.size(inputs)

    def size(self, inputs: int) -> int:
        """How many of the inputs share a scale.

        Raises:
          ValueError: the group size does not divide the number of inputs.
        """
        size = inputs if self.group_size is None else self.group_size
        if inputs % size:
            raise ValueError(f"group_size {size} does not divide the {inputs} inputs of the matrix")
        return size


Scales = tuple[Float[Array, "G N"], Float[Array, "G N"]]  # scales and zeros


def divide(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / y, correctly rounded, for a y that is broadcast. x is finite.

    XLA would compute 1 / y once and multiply, also behind an optimization barrier. `0 * x` keeps it from that. The last
    bit decides the integer of weights halfway between two points, as are the outermost of a symmetric grid and, under
    AWQ, all that are clipped.
    """
    return x / (y + 0 * x)


def fit(weight: Float[Array, "*N K"], grid: Grid) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    """(scales, zeros) of vectors of weights, one of each for a vector. `group_size` is not looked at."""
    low, high = jnp.minimum(weight.min(-1), 0), jnp.maximum(weight.max(-1), 0)
    if grid.symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = jnp.where(empty, -1, low), jnp.where(empty, 1, high)
    scales = divide(high - low, jnp.asarray(grid.largest, weight.dtype))
    middle = jnp.full_like(scales, (grid.largest + 1) // 2)
    return scales, middle if grid.symmetric else jnp.round(divide(jnp.abs(low), scales))


def to_integers(
    weight: Float[Array, "..."], scales: Float[Array, "..."], zeros: Float[Array, "..."], grid: Grid
) -> Float[Array, "..."]:
    """The nearest integers of the grid, as floats."""
    return jnp.clip(jnp.round(divide(weight, scales)) + zeros, 0, grid.largest)


def fit_groups(weight: Float[Array, "N K"], grid: Grid) -> Scales:
    """Scales of all groups of neighbours.

    Raises:
      ValueError: the group size does not divide K.
    """
    rows, columns = weight.shape
    size = grid.size(columns)
    scales, zeros = fit(weight.reshape(rows, columns // size, size), grid)
    return scales.T, zeros.T


def refit(scales: Scales, weight: Float[Array, "N K"], column: Int[Array, ""], grid: Grid) -> Scales:
    """Scales, with those of the group that begins at the column fitted to `weight`, if one begins there."""
    size = grid.size(weight.shape[1])
    group = column // size
    new = lax.cond(
        column % size == 0,
        lambda: fit(lax.dynamic_slice_in_dim(weight, column, size, axis=1), grid),
        lambda: (scales[0][group], scales[1][group]),
    )
    return scales[0].at[group].set(new[0]), scales[1].at[group].set(new[1])


def on_grid(weight: Float[Array, " N"], scales: Scales, group: Int[Array, ""], grid: Grid) -> Float[Array, " N"]:
    """The nearest points of the grid, for the weights of one input."""
    scale, zero = scales[0][group], scales[1][group]
    return (to_integers(weight, scale, zero, grid) - zero) * scale


def to_matrix(weight: Float[Array, "N K"], scales: Scales, groups: Int[Array, " K"], grid: Grid) -> QuantizedMatrix:
    """The matrix of the nearest integers, in the dtypes of QuantizedMatrix."""
    scale, zero = scales[0].T, scales[1].T
    integers = to_integers(weight, scale[:, groups], zero[:, groups], grid).astype(jnp.uint8)
    return QuantizedMatrix(
        integers, scale.astype(jnp.float32), zero.astype(jnp.float32), groups.astype(jnp.int32), grid.bits
    )


@partial(jax.jit, static_argnames="grid")
def round_to_nearest(weight: Float[Array, "N K"], grid: Grid) -> QuantizedMatrix:
    """The matrix with each weight rounded to the nearest point of its grid. Zeros stay zeros.

    Raises:
      ValueError: the group size does not divide K.
    """
    return to_matrix(weight, fit_groups(weight, grid), grid.groups(weight.shape[1]), grid)
