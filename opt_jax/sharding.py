"""Where things live on a mesh of devices: the one table parameter path -> mesh axes. The only file that names axes.

Axes: `data` (replicas), `fsdp` (batch and parameters), `tensor` (Megatron-style splits of heads, ffn and vocabulary).
Axis types are Auto: the compiler propagates shardings, `constrain` pins the few places that matter.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
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
    if not dcn:
        return jax.make_mesh(tuple(sizes.values()), AXES, devices=devices, axis_types=kinds)
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


def param_spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The partition of the parameter at `path` (see PARAMETER_AXES; stacked layers are recognised by their extra axis).

    Raises:
      KeyError: the table has no such path.
      ValueError: a dimension does not divide over its axis.
    """
    row = re.sub(r"\.layers\.(\d+\.)?", ".layers.*.", path)
    if row not in PARAMETER_AXES:
        raise KeyError(f"no sharding rule for parameter {path!r}")
    axes = PARAMETER_AXES[row]
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


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Pin the layout of a named activation; a no-op without a mesh. Axes that do not divide a dimension are left out
    (a decode step has one token, which no axis can split)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = []
    for size, axis in zip(x.shape, _ACTIVATION_AXES[name], strict=True):
        names = (axis,) if isinstance(axis, str) else axis or ()
        axes.append(axis if size % math.prod(mesh.shape[n] for n in names) == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*axes))
