"""Where arrays lie on a mesh of devices: one table from parameter path to mesh axes, and one for activations.

Axes: `data` (replicas), `fsdp` (batch and parameters), `tensor` (Megatron-style splits of heads, ffn and vocabulary).

There are two ways to compute on a mesh, and the model's code is the same for both. `is_per_device` says which holds.

- Compiler-propagated, the rule: axes are Auto, an array is the whole array, the compiler chooses what is sent, and
  `constrain` pins the few layouts that matter.
- Per device, a training step: inside `per_device` an array is this device's part, and nothing is sent but by the
  functions of `collectives.py` and `reductions.py`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

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
PARAMETER_AXES.update(
    {
        path + suffix: axes
        for path, (rows, columns) in ((p, a) for p, a in PARAMETER_AXES.items() if re.search(r"layers.*kernel", p))
        for suffix, axes in (("_lora_a", (rows, None)), ("_lora_b", (None, columns)))
    }
)

# Biases of row-parallel products, which are partial sums over `tensor` until `scatter_sequence`: one device adds them.
ADDED_ONCE = {"model.decoder.layers.*.self_attn.out_proj.bias", "model.decoder.layers.*.fc2.bias"}

# Names the model gives to its activations -> axes. The residual stream is split along the sequence: for 175B on 512
# chips that sent 17 % less than splitting its width.
ACTIVATION_AXES: dict[str, tuple[Any, ...]] = {
    "residual": (BATCH_AXES, "tensor", None),  # [B, T, D]
    "gathered": (BATCH_AXES, None, None),  # [B, T, D] entering a column-parallel product
    "heads": (BATCH_AXES, "tensor", None, None),  # [B, H, T, K]
    "ffn": (BATCH_AXES, None, "tensor"),  # [B, T, F]
    "logits": (BATCH_AXES, None, "tensor"),  # [B, T, V]
}


def table_row(path: str) -> str:
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
    axes = PARAMETER_AXES[table_row(path)]
    axes = (None,) * (len(shape) - len(axes)) + axes
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(f"{path}: dimension {size} does not divide over mesh axis {axis}={mesh.shape[axis]}")
    return P(*axes)


def param_sharding(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, param_spec(path, shape, mesh))


def leaf_path(keys: Any) -> str:
    """Dotted path of a leaf, from the keys of `jax.tree_util`: `model.decoder.layers.fc1.kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Dotted path -> leaf, in flattening order: parameters, and `opt_state.1.count`, ..."""
    return {leaf_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Pin the layout of a named activation; a no-op without a mesh. Axes that do not divide a dimension are left out
    (a decode step has one token, which no axis can split)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or is_per_device():
        return x
    axes: list[Any] = []
    for size, axis in zip(x.shape, ACTIVATION_AXES[name], strict=True):
        names = (axis,) if isinstance(axis, str) else axis or ()
        axes.append(axis if size % math.prod(mesh.shape[n] for n in names) == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*axes))


def per_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` of each device's part of the arguments: rows of the batch, rows and tokens of the residual stream.

    Differentiate within `function`.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def is_per_device() -> bool:
    """Whether this is traced inside `per_device`, where an array is one device's part."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.are_all_axes_manual
