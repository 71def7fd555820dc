"""Shardings on a mesh of devices: one table from parameter path to mesh axes, and one for activations.

Axes: `data` (replicas), `fsdp` (batch and parameters), `tensor` (Megatron-style splits of heads, ffn and vocabulary).

There are two ways to compute on a mesh. The model's code is the same for both. `is_per_device` tells them apart.

- Compiler-propagated (the default): mesh axes are Auto, arrays are global arrays, and XLA inserts the collectives.
  `constrain` fixes the sharding of a few activations.
- Per device (a training step): inside `mesh.per_device`, an array is this device's part. The only collectives are those
  in `collectives.py` and `reductions.py`.
"""

import math
import re
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Inside `mesh.per_device`: the groups of each stage of a collective over `fsdp` (see `mesh.fsdp_stages`).
FSDP_STAGES: ContextVar[tuple[tuple[tuple[int, ...], ...], ...]] = ContextVar("FSDP_STAGES")

# Parameter path (unstacked form, layer numbers as "*") -> mesh axes of its dimensions. The first products of a block
# are column-parallel, the last ones row-parallel. The 2050 rows of the position table are not divisible by useful sizes
# and are never split.
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

# LoRA adapters of a layer's kernel: A [inputs, rank] is split like the kernel's rows, B [rank, outputs] like its
# columns.
# (In a row-parallel product, A gives partial sums over `tensor`. B is linear, so its results are partial sums, too.)
PARAMETER_AXES.update(
    (path + suffix, axes)
    for path, (rows, columns) in [(p, a) for p, a in PARAMETER_AXES.items() if re.search(r"layers.*kernel", p)]
    for suffix, axes in (("_lora_a", (rows, None)), ("_lora_b", (None, columns)))
)

# Biases of row-parallel products. The products are partial sums over `tensor` until `scatter_sequence`, so only one
# device along `tensor` adds the bias.
ADDED_ONCE = {"model.decoder.layers.*.self_attn.out_proj.bias", "model.decoder.layers.*.fc2.bias"}

# Arrays of `model/packed.py` in place of a kernel, and laid out as it is: [inputs or groups of them, outputs].
PACKED = re.compile(r"\.(qweight|scales|zeros)$")

# Name of an activation in the model -> mesh axes of its dimensions. The residual stream is split along the sequence:
# for 175B on 512 chips, this sent 17 % less than a split of its width.
ACTIVATION_AXES: dict[str, tuple[Any, ...]] = {
    "residual": (BATCH_AXES, "tensor", None),  # [B, T, D]
    "gathered": (BATCH_AXES, None, None),  # [B, T, D] entering a column-parallel product
    "heads": (BATCH_AXES, "tensor", None, None),  # [B, H, T, K]
    "ffn": (BATCH_AXES, None, "tensor"),  # [B, T, F]
    "logits": (BATCH_AXES, None, "tensor"),  # [B, T, V]
}


def table_row(path: str) -> str:
    row = re.sub(r"\.layers\.(\d+\.)?", ".layers.*.", PACKED.sub(".kernel", path))
    if row not in PARAMETER_AXES:
        raise KeyError(f"no sharding rule for parameter {path!r}")
    return row


def param_spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The PartitionSpec of the parameter at `path`, from PARAMETER_AXES. A stacked layer has an extra leading axis.

    Packed arrays are not split along an axis that does not divide. The order of their inputs is never split.

    Raises:
      KeyError: the table has no such path.
      ValueError: a dimension is not divisible by the size of its mesh axis.
    """
    axes = () if path.endswith(".order") else PARAMETER_AXES[table_row(path)]
    axes = (None,) * (len(shape) - len(axes)) + axes
    if PACKED.search(path):
        axes = tuple(axis if axis and n % mesh.shape[axis] == 0 else None for n, axis in zip(shape, axes, strict=True))
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(f"{path}: dimension {size} does not divide over mesh axis {axis}={mesh.shape[axis]}")
    return P(*axes)


def param_sharding(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of the parameter at `path`; errors as of `param_spec`."""
    return NamedSharding(mesh, param_spec(path, shape, mesh))


def leaf_path(keys: Any) -> str:
    """The dotted path of a leaf, from its `jax.tree_util` key path: `model.decoder.layers.fc1.kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted path (`opt_state.1.count`, ...), in the order in which JAX flattens it."""
    return {leaf_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def constrain(x: jax.Array, name: str) -> jax.Array:
    """x with the sharding of the named activation as a constraint; x itself without a mesh of `make_mesh`.

    Skips mesh axes whose size does not divide the dimension. (The one token of a decoding step cannot be split.)
    """
    spec = activation_spec(x.shape, name)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def activation_spec(shape: Sequence[int], name: str) -> P | None:
    """The PartitionSpec that `constrain` gives to an activation, or to its last dimensions; None if it gives none."""
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.axis_names or is_per_device():
        return None
    axes: list[Any] = []
    for size, axis in zip(shape, ACTIVATION_AXES[name][-len(shape) :], strict=True):
        names = (axis,) if isinstance(axis, str) else axis or ()
        axes.append(axis if size % math.prod(mesh.shape[n] for n in names) == 0 else None)
    return P(*axes)


def is_per_device() -> bool:
    """Whether this code is traced inside `mesh.per_device`, where an array is one device's part.

    (A caller's `jax.pmap` or `jax.shard_map` over axes of other names is not: there the model is whole.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    return "tensor" in mesh.axis_names and mesh.are_all_axes_manual
