"""The collectives of a model inside a training step.

Outside of `mesh.per_device` these functions return their argument, with its sharding constrained (`rules.constrain`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from opt_jax.parallel import rules


def axis_size(axis: str | tuple[str, ...]) -> int:
    """Number of devices along the axis or axes, inside `mesh.per_device`; 1 elsewhere."""
    shape, names = jax.sharding.get_abstract_mesh().shape, (axis,) if isinstance(axis, str) else axis
    return math.prod(shape[name] for name in names) if rules.is_per_device() else 1


def gather_sequence(x: jax.Array) -> jax.Array:
    """All tokens [B, T, D] of this device's rows, gathered over `tensor`. Its transpose is `scatter_sequence`."""
    if axis_size("tensor") == 1:
        return rules.constrain(x, "gathered")
    return lax.all_gather(x, "tensor", axis=min(1, len(x) - 1), tiled=True).reshape(len(x), -1, x.shape[-1])


def scatter_sequence(x: jax.Array) -> jax.Array:
    """This device's part of the sequence of the sum over `tensor` of x, partial sums [B, T, D] of all tokens."""
    if axis_size("tensor") == 1:
        return rules.constrain(x, "residual")
    # Along the second axis of one row, libtpu 0.0.42 would use an all-reduce, which sends twice as much.
    x, axis = (x, 1) if len(x) > 1 else (x.reshape(axis_size("tensor"), -1, x.shape[-1]), 0)
    return lax.psum_scatter(x, "tensor", scatter_dimension=axis, tiled=True)


def local_tokens(x: jax.Array) -> jax.Array:
    """This device's part of the sequence of x [B, T, ...], which is equal on all devices along `tensor`."""
    if axis_size("tensor") == 1:
        return x
    count = x.shape[1] // axis_size("tensor")
    return lax.dynamic_slice_in_dim(x, lax.axis_index("tensor") * count, count, axis=1)


def batch_offset(count: int) -> jax.Array | int:
    """Global index of this device's first row, if each device has `count` rows; 0 outside `mesh.per_device`."""
    return lax.axis_index(rules.BATCH_AXES) * count if rules.is_per_device() else 0


def tensor_offset(count: int) -> jax.Array | int:
    """Global index of the first of this device's `count` tokens, heads or vocabulary rows, split over `tensor`.

    0 outside `mesh.per_device`.
    """
    return lax.axis_index("tensor") * count if rules.is_per_device() else 0


def gather_parameters(tree: Any, dtype: Any, grad_dtype: Any, prefix: str = "") -> Any:
    """The parameters, gathered over `fsdp` after a cast to `dtype`; `tree` itself outside `mesh.per_device`.

    Gathered arrays get the checkpoint name "weights".

    Args:
      tree: a model, or one of its layers.
      dtype: the dtype in which parameters are sent.
      grad_dtype: the dtype in which gradients are added up.
      prefix: the path of a layer. Without it, the parameters of layers are not gathered: the model gathers those of one
        layer at a time.
    """
    if not rules.is_per_device():
        return tree

    def gathered(keys: Any, value: jax.Array) -> jax.Array:
        path = prefix + rules.leaf_path(keys)
        if not prefix and ".layers." in path:
            return value
        row = rules.table_row(path)
        if row in rules.ADDED_ONCE and axis_size("tensor") > 1:
            value = jnp.where(lax.axis_index("tensor") == 0, value, 0)
        if row.endswith(("_lora_a", "_lora_b")):  # because qwix does not cast them
            value = value.astype(dtype)
        if "fsdp" not in rules.PARAMETER_AXES[row] or axis_size("fsdp") == 1:
            return value  # the module of the parameter casts it
        axis = rules.PARAMETER_AXES[row].index("fsdp")
        how = (axis, dtype, grad_dtype, value.dtype, rules.FSDP_STAGES.get())
        return checkpoint_name(_gather_over_fsdp(value, how), "weights")

    return jax.tree_util.tree_map_with_path(gathered, tree)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_over_fsdp(x: jax.Array, how: tuple[int, Any, Any, Any, Any]) -> jax.Array:
    # `where` does not change values, but it keeps the cast inside the loop over layers. XLA for TPUs would move a plain
    # cast out of the loop, even through a barrier, and hold the weights of all layers in both dtypes (0.7 GB per chip
    # for 175B on 512).
    x = jnp.where(jnp.isnan(x), jnp.nan, x).astype(how[1])
    for groups in reversed(how[4]):
        x = lax.all_gather(x, "fsdp", axis=how[0], tiled=True, axis_index_groups=groups)
    return x


def _gather_backward(how: tuple[int, Any, Any, Any, Any], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Put the parts on a separate leading axis. If parts were not multiples of a tile of TPU memory (128 elements along
    # the last axis), XLA would use an all-reduce, which sends twice as much.
    (axis, _dtype, grad_dtype, param_dtype, stages), shape = how, gradient.shape
    gradient = gradient.astype(grad_dtype).reshape(*shape[:axis], axis_size("fsdp"), -1, *shape[axis + 1 :])
    parts = jnp.moveaxis(gradient, axis, 0)
    for groups in stages:
        parts = lax.psum_scatter(parts.reshape(len(groups[0]), -1, *parts.shape[1:]), "fsdp", axis_index_groups=groups)
    return (parts[0].astype(param_dtype),)


_gather_over_fsdp.defvjp(lambda x, how: (_gather_over_fsdp(x, how), None), _gather_backward)


def shard_over_heads(function: Callable[..., Any], *, segments: bool) -> Callable[..., Any]:
    """`function(q, k, v[, segment_ids])` on [B, H, T, K], called on each device with its rows and heads.

    For kernels, which XLA cannot partition. B must be divisible by the devices along `data` and `fsdp`, H by those
    along `tensor`.
    """
    if jax.sharding.get_abstract_mesh().empty or rules.is_per_device():
        return function
    heads = P(*rules.ACTIVATION_AXES["heads"])
    in_specs = (heads, heads, heads, *((P(rules.BATCH_AXES),) if segments else ()))
    return jax.shard_map(function, in_specs=in_specs, out_specs=heads, check_vma=False)
