"""Where things live on a mesh of devices: the one table parameter path -> mesh axes. The only file that names axes.

Axes: `data` (replicas), `fsdp` (batch and parameters), `tensor` (Megatron-style splits of heads, ffn and vocabulary).
There are two ways to compute on a mesh, and the model's code is the same for both. As a rule axes are Auto: the
compiler propagates shardings, and `constrain` pins the few places that matter. A training step runs `per_device`:
each device sees its own part of every array, and what is sent is written down below, collective by collective.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")

# Parameter path (unstacked form, layer numbers as "*") -> axes of its dimensions. Column-parallel into a block,
# row-parallel out of it. The 2050 rows of the position table divide by nothing useful and are never split.
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "model.decoder.embed_tokens.embedding": ("tensor", "fsdp"),
    "model.decoder.embed_positions.embedding": (None, "fsdp"),
    "model.decoder.project_in.kernel": (None, "fsdp"),
    "model.decoder.project_out.kernel": ("fsdp", None),
    "model.decoder.layers.*.self_attn.q_proj.kernel": ("fsdp", "tensor"),
    "model.decoder.layers.*.self_attn.k_proj.kernel": ("fsdp", "tensor"),
    "model.decoder.layers.*.self_attn.v_proj.kernel": ("fsdp", "tensor"),
    "model.decoder.layers.*.self_attn.out_proj.kernel": ("tensor", "fsdp"),
    "model.decoder.layers.*.fc1.kernel": ("fsdp", "tensor"),
    "model.decoder.layers.*.fc2.kernel": ("tensor", "fsdp"),
    "model.decoder.layers.*.self_attn.q_proj.bias": ("tensor",),
    "model.decoder.layers.*.self_attn.k_proj.bias": ("tensor",),
    "model.decoder.layers.*.self_attn.v_proj.bias": ("tensor",),
    "model.decoder.layers.*.self_attn.out_proj.bias": (None,),
    "model.decoder.layers.*.fc1.bias": ("tensor",),
    "model.decoder.layers.*.fc2.bias": (None,),
    "model.decoder.layers.*.self_attn_layer_norm.scale": (None,),
    "model.decoder.layers.*.self_attn_layer_norm.bias": (None,),
    "model.decoder.layers.*.final_layer_norm.scale": (None,),
    "model.decoder.layers.*.final_layer_norm.bias": (None,),
    "model.decoder.final_layer_norm.scale": (None,),
    "model.decoder.final_layer_norm.bias": (None,),
    "lm_head.kernel": ("fsdp", "tensor"),
    "score.kernel": ("fsdp", None),
    "qa_outputs.kernel": ("fsdp", None),
    "qa_outputs.bias": (None,),
}

# Adapters of LoRA beside a layer's kernel: A [inputs, rank] is split as the kernel's rows are, B [rank, outputs] as its
# columns. (Of a row-parallel product A leaves partial sums over `tensor`, and B, being linear, passes them on.)
PARAMETER_AXES |= {
    path + suffix: axes
    for path, (rows, columns) in ((p, a) for p, a in PARAMETER_AXES.items() if re.search(r"layers.*kernel", p))
    for suffix, axes in (("_lora_a", (rows, None)), ("_lora_b", (None, columns)))
}

# Biases of row-parallel products, which are partial sums over `tensor` until `scatter_tokens`: one device adds them.
_ADDED_ONCE = {"model.decoder.layers.*.self_attn.out_proj.bias", "model.decoder.layers.*.fc2.bias"}

# Names the model gives to its activations -> axes. The residual stream is split along the sequence: for 175B on 512
# chips that sent 17 % less than splitting its width.
_ACTIVATION_AXES: dict[str, tuple[Any, ...]] = {
    "residual": (_BATCH, "tensor", None),  # [B, T, D]
    "gathered": (_BATCH, None, None),  # [B, T, D] entering a column-parallel product
    "heads": (_BATCH, "tensor", None, None),  # [B, H, T, K]
    "ffn": (_BATCH, None, "tensor"),  # [B, T, F]
    "logits": (_BATCH, None, "tensor"),  # [B, T, V]
}


def make_mesh(
    spec: str | Mapping[str, int] | None = None,
    devices: Sequence[Any] | None = None,
    dcn: str | Mapping[str, int] | None = None,
) -> Mesh:
    """A mesh with axes (data, fsdp, tensor) from "data=2,fsdp=4" or a dict; -1 = the rest, an axis left out: 1.

    Default: all devices on `fsdp`. `dcn` says how much of each axis lies between slices, which the slower network
    joins: with mesh data=4,fsdp=8 and dcn data=2 each of two slices has data=2,fsdp=8. Default: all TPU slices on
    `data`.
    Where there are no slices, `dcn` is about processes.

    Raises:
      ValueError: an unknown axis, a bad size, or sizes that do not multiply to the number of devices or slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if not dcn and slices > 1 and devices[0].platform == "tpu":
        dcn = {"data": slices}
    if not spec:
        spec = {"data": slices, "fsdp": -1} if dcn == {"data": slices} else {"fsdp": -1}
    sizes, kinds = _axis_sizes("mesh", spec, len(devices), "devices"), (AxisType.Auto,) * len(AXES)
    if not dcn:  # not `jax.make_mesh`, which has no place for tensor=4 in a torus of 8 x 8 x 8
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=kinds)
    unit = "slices" if slices > 1 else "processes"
    count = slices if slices > 1 else len({device.process_index for device in devices})
    between = _axis_sizes("dcn-mesh", dcn, count, unit)
    for axis in AXES:
        if sizes[axis] % between[axis]:
            raise ValueError(
                f"mesh {axis}={sizes[axis]} does not divide over {axis}={between[axis]} of the {count} {unit}: choose "
                "another --mesh, or say with --dcn-mesh which axes lie between them"
            )
    within = [sizes[axis] // between[axis] for axis in AXES]
    grid = mesh_utils.create_hybrid_device_mesh(
        within, list(between.values()), devices, process_is_granule=slices == 1, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=kinds)


def _axis_sizes(what: str, spec: str | Mapping[str, int], total: int, unit: str) -> dict[str, int]:
    if isinstance(spec, str):
        parts = [part.partition("=") for part in spec.split(",")]
        if bad := [p[0] for p in parts if not re.fullmatch(r"-?\d+", p[2].strip())]:
            raise ValueError(f"{what} {spec!r}: {bad[0]!r} needs a size, as in data=2,fsdp=4")
        if len({p[0].strip() for p in parts}) < len(parts):
            raise ValueError(f"{what} {spec!r} names an axis twice")
        spec = {name.strip(): int(size) for name, _, size in parts}
    if unknown := [name for name in spec if name not in AXES]:
        raise ValueError(f"{what}: unknown axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
    sizes = {axis: spec.get(axis, 1) for axis in AXES}
    named = ", ".join(f"{k}={v}" for k, v in sizes.items())
    if any(v < 1 and v != -1 for v in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"{what} {named}: sizes must be positive, and at most one may be -1 (the rest)")
    fixed = math.prod(v for v in sizes.values() if v != -1)
    sizes = {k: total // fixed if v == -1 else v for k, v in sizes.items()}
    if math.prod(sizes.values()) != total:
        raise ValueError(f"{what} {named}: sizes multiply to {fixed}, but there are {total} {unit}")
    return sizes


def use_mesh(mesh: Mesh):
    """Context in which `constrain` acts: `with use_mesh(mesh): step(...)`, around the traced call."""
    return jax.set_mesh(mesh)


def _row(path: str) -> str:
    row = re.sub(r"\.layers\.(\d+\.)?", ".layers.*.", path)
    if row not in PARAMETER_AXES:
        raise KeyError(f"no sharding rule for parameter {path!r}")
    return row


def param_spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The partition of the parameter at `path` (see PARAMETER_AXES; stacked layers are recognised by their extra axis).

    Raises:
      KeyError: the table has no such path.
      ValueError: a dimension does not divide over its axis.
    """
    axes = PARAMETER_AXES[_row(path)]
    axes = (None,) * (len(shape) - len(axes)) + axes
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(f"{path}: dimension {size} does not divide over mesh axis {axis}={mesh.shape[axis]}")
    return P(*axes)


def param_sharding(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, param_spec(path, shape, mesh))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of inputs [B, ...], behind so many leading axes: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(*[None] * leading, _BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def mesh_of(model: Any) -> Mesh | None:
    """The mesh that a model's parameters are on; None: they are on one device, or abstract."""
    sharding = getattr(jax.tree.leaves(model)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def row_groups(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into: their number must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in _BATCH)


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Pin the layout of a named activation; a no-op without a mesh. Axes that do not divide a dimension are left out
    (a decode step has one token, which no axis can split)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or is_per_device():
        return x
    axes = []
    for size, axis in zip(x.shape, _ACTIVATION_AXES[name], strict=True):
        names = (axis,) if isinstance(axis, str) else axis or ()
        axes.append(axis if size % math.prod(mesh.shape[n] for n in names) == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*axes))


# What one device computes, and sends --------------------------------------------------------------------------------


def per_device(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` of each device's own parts of the arguments; inside, only the functions below send anything.

    Differentiate within `function`. Parts of the batch are rows; of the residual stream, rows and tokens.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def is_per_device() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.are_all_axes_manual


def _size(axis: str | tuple[str, ...]) -> int:
    """How many devices share it, inside `per_device`; elsewhere 1."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in ((axis,) if isinstance(axis, str) else axis)) if is_per_device() else 1


def gather_tokens(x: jax.Array) -> jax.Array:
    """The residual stream [B, T, D] as column-parallel products need it: every token. Transposed: `scatter_tokens`."""
    if _size("tensor") == 1:
        return constrain(x, "gathered")
    return lax.all_gather(x, "tensor", axis=1, tiled=True)


def scatter_tokens(x: jax.Array) -> jax.Array:
    """Partial sums [B, T, D] of row-parallel products to the residual: added up; each device keeps its tokens."""
    if _size("tensor") == 1:
        return constrain(x, "residual")
    return lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)


def own_tokens(x: jax.Array) -> jax.Array:
    """This device's part of [B, T, ...] that is the same all over `tensor`."""
    if _size("tensor") == 1:
        return x
    count = x.shape[1] // _size("tensor")
    return lax.dynamic_slice_in_dim(x, lax.axis_index("tensor") * count, count, axis=1)


def first_row(count: int) -> jax.Array | int:
    """Number in the whole batch of the first of this device's rows, of which it has so many."""
    return lax.axis_index(_BATCH) * count if is_per_device() else 0


def first_part(count: int) -> jax.Array | int:
    """Likewise of what `tensor` splits: tokens, heads or vocabulary."""
    return lax.axis_index("tensor") * count if is_per_device() else 0


def gather_rows(x: jax.Array) -> jax.Array:
    """Axis 0 of every device of `tensor`, joined."""
    return x if _size("tensor") == 1 else lax.all_gather(x, "tensor", tiled=True)


def scatter_rows(x: jax.Array) -> jax.Array:
    """Partial sums, added up over `tensor`, each device keeps its part of axis 0."""
    return x if _size("tensor") == 1 else lax.psum_scatter(x, "tensor", tiled=True)


def sum_over_tensor(x: jax.Array) -> jax.Array:
    return x if _size("tensor") == 1 else lax.psum(x, "tensor")


def share_of_tensor(x: jax.Array) -> jax.Array:
    """The same number on every device of `tensor`: each one differentiates a share of it.

    Gradients are added up over these devices, by `sum_gradients` and by the transposes of the functions above.
    """
    share = x / _size("tensor")
    return share + lax.stop_gradient(x - share)


def max_over_tensor(x: jax.Array) -> jax.Array:
    return x if _size("tensor") == 1 else lax.pmax(x, "tensor")


def sum_over_batch(x: jax.Array) -> jax.Array:
    return x if _size(_BATCH) == 1 else lax.psum(x, _BATCH)


def gather_parameters(tree: Any, dtype: Any, grad_dtype: Any, prefix: str = "") -> Any:
    """The parameters whole along `fsdp`, cast to `dtype` before they are sent; gradients are added up in `grad_dtype`.

    Does nothing outside `per_device`. Layers are left alone unless `prefix` is their path, for the model gathers one
    at a time; what is made here has the checkpoint name "weights".
    """
    if not is_per_device():
        return tree

    def whole(keys: Any, value: jax.Array) -> jax.Array:
        path = prefix + jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")
        if not prefix and ".layers." in path:
            return value
        row = _row(path)
        if row in _ADDED_ONCE and _size("tensor") > 1:
            value = jnp.where(lax.axis_index("tensor") == 0, value, 0)
        if row.endswith(("_lora_a", "_lora_b")):  # qwix does not cast them
            value = value.astype(dtype)
        if "fsdp" not in PARAMETER_AXES[row] or _size("fsdp") == 1:
            return value  # its module casts it
        axis = PARAMETER_AXES[row].index("fsdp")
        return checkpoint_name(_gather(value, axis, dtype, grad_dtype, value.dtype), "weights")

    return jax.tree_util.tree_map_with_path(whole, tree)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(x: jax.Array, axis: int, dtype: Any, _grad_dtype: Any, _own_dtype: Any) -> jax.Array:
    # `where` changes nothing, but is not moved: the compiler for TPUs would take the cast alone out of the loop over
    # layers, through a barrier too, and hold all layers' weights in both dtypes (0.7 GB per chip for 175B on 512).
    return lax.all_gather(jnp.where(jnp.isnan(x), jnp.nan, x).astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_forward(x, axis, dtype, grad_dtype, own_dtype):
    return _gather(x, axis, dtype, grad_dtype, own_dtype), None


def _gather_backward(axis, _dtype, grad_dtype, own_dtype, _, gradient):
    # With the parts along an axis of their own, the first. Parts that are not whole tiles of a TPU's memory (of 128
    # numbers, along the last axis) would be scattered by adding all up on every chip, which sends twice as much.
    shape = gradient.shape
    gradient = gradient.astype(grad_dtype).reshape(*shape[:axis], _size("fsdp"), -1, *shape[axis + 1 :])
    own = lax.psum_scatter(jnp.moveaxis(gradient, axis, 0), "fsdp", scatter_dimension=0)
    return (own.astype(own_dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def sum_gradients(gradients: Any) -> Any:
    """Gradients added up over every axis that does not split their parameter (over `fsdp` where it does, that is done).

    What `tensor` does not split has been used on parts of the sequence, or by one device of it.
    """

    def summed(keys: Any, value: jax.Array) -> jax.Array:
        row = _row(jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value"))
        axes = tuple(axis for axis in AXES if axis not in PARAMETER_AXES[row] and _size(axis) > 1)
        return lax.psum(value, axes) if axes else value

    return jax.tree_util.tree_map_with_path(summed, gradients)


def over_heads(function: Callable, *, segments: bool) -> Callable:
    """`function(q, k, v[, segment_ids])` over [B, H, T, K], one call for each device's own rows and heads.

    For kernels, which the compiler cannot split. Rows and heads must divide over the mesh.
    """
    if jax.sharding.get_abstract_mesh().empty or is_per_device():
        return function
    heads = P(*_ACTIVATION_AXES["heads"])
    in_specs = (heads, heads, heads, *((P(_BATCH),) if segments else ()))
    return jax.shard_map(function, in_specs=in_specs, out_specs=heads, check_vma=False)
