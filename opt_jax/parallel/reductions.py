"""The collectives of losses and gradients in a training step. Those of the model are in `collectives.py`."""

from typing import Any

import jax
from jax import lax

from opt_jax.parallel.collectives import axis_size
from opt_jax.parallel.rules import AXES, BATCH_AXES, PARAMETER_AXES, leaf_path, table_row


def gather_rows(x: jax.Array) -> jax.Array:
    """x with axis 0 gathered over `tensor`."""
    return x if axis_size("tensor") == 1 else lax.all_gather(x, "tensor", tiled=True)


def scatter_rows(x: jax.Array) -> jax.Array:
    """This device's part of axis 0 of the sum over `tensor` of x, which holds partial sums."""
    return x if axis_size("tensor") == 1 else lax.psum_scatter(x, "tensor", tiled=True)


def sum_over_tensor(x: jax.Array) -> jax.Array:
    return x if axis_size("tensor") == 1 else lax.psum(x, "tensor")


def divide_gradient_over_tensor(x: jax.Array) -> jax.Array:
    """x, which is the same on all n devices along `tensor`; its gradient on each of them is (dL/dx) / n.

    `sum_gradients` and the transposes of the functions above add up the gradients of the n devices to dL/dx.
    """
    share = x / axis_size("tensor")
    return share + lax.stop_gradient(x - share)


def max_over_tensor(x: jax.Array) -> jax.Array:
    return x if axis_size("tensor") == 1 else lax.pmax(x, "tensor")


def sum_over_batch(x: jax.Array) -> jax.Array:
    return x if axis_size(BATCH_AXES) == 1 else lax.psum(x, BATCH_AXES)


def sum_gradients(gradients: Any) -> Any:
    """Gradients, summed over every mesh axis that does not split their parameter.

    For parameters split over `fsdp`, the transpose of `gather_parameters` has summed over `fsdp` already. A parameter
    that `tensor` does not split needs the sum, because each device used it on a part of the sequence, or only one did.
    """

    def summed(keys: Any, value: jax.Array) -> jax.Array:
        row = table_row(leaf_path(keys))
        axes = tuple(axis for axis in AXES if axis not in PARAMETER_AXES[row] and axis_size(axis) > 1)
        return lax.psum(value, axes) if axes else value

    return jax.tree_util.tree_map_with_path(summed, gradients)
