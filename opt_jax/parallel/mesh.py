"""Meshes of devices, functions that each device calls with its parts, and shardings of a batch."""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opt_jax.parallel.rules import AXES, BATCH_AXES, FSDP_STAGES


def make_mesh(
    spec: str | Mapping[str, int] | None = None,
    devices: Sequence[Any] | None = None,
    dcn: str | Mapping[str, int] | None = None,
) -> Mesh:
    """A mesh with axes (data, fsdp, tensor).

    Args:
      spec: sizes of the axes, such as "data=2,fsdp=4" or a dict. -1: all remaining devices; an axis left out has size
        1. Default: all devices on `fsdp`.
      devices: the devices. Default: all.
      dcn: sizes of the axes between slices, which are connected by a slower network. With spec "data=4,fsdp=8" and dcn
        "data=2", each of two slices has data=2,fsdp=8. Default: all TPU slices on `data`. Without slices, dcn gives the
        sizes between processes.

    On several CPUs, this turns JAX's persistent compilation cache off, with a warning: a program from it can hang.

    Raises:
      ValueError: an unknown axis, an invalid size, or sizes whose product is not the number of devices or slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if not dcn and slices > 1 and devices[0].platform == "tpu":
        dcn = {"data": slices}
    if not spec:
        spec = {"data": slices, "fsdp": -1} if dcn == {"data": slices} else {"fsdp": -1}
    sizes, kinds = _axis_sizes("mesh", spec, len(devices), "devices"), (AxisType.Auto,) * len(AXES)
    turn_cache_off(devices)
    if not dcn:  # `jax.make_mesh` cannot place tensor=4 in a torus of 8 x 8 x 8
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=kinds)
    unit = "slices" if slices > 1 else "processes"
    count = slices if slices > 1 else len({device.process_index for device in devices})
    between = _axis_sizes("dcn-mesh", dcn, count, unit)
    for axis in AXES:
        if sizes[axis] % between[axis]:
            raise ValueError(
                f"mesh {axis}={sizes[axis]} does not divide over {axis}={between[axis]} of the {count} {unit}: choose "
                "another --mesh, or say with --dcn-mesh which axes are between them"
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


def turn_cache_off(devices: Sequence[Any]) -> None:
    """Turn JAX's persistent compilation cache off for this process, with a warning, if the devices are several CPUs.

    All devices must run the collectives of a program in the same order. When XLA compiles for CPUs, it keeps the order.
    A program from the cache may run a collective before a loop on one device, and after it on another (jaxlib 0.10.2
    and 0.12.0.1; CONTRIBUTING.md says how to see it). Then a single process is aborted after 40 seconds, and several
    processes hang.
    """
    config: Any = jax.config
    in_use = config.jax_compilation_cache_dir and config.jax_enable_compilation_cache
    if len(devices) < 2 or devices[0].platform != "cpu" or not in_use:
        return
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the option once, when it compiles for the first time
    if jax.process_index() == 0:
        what, why = config.jax_compilation_cache_dir, "a program from it can hang on several CPU devices"
        warnings.warn(f"JAX's compilation cache {what} is not used from now on: {why}", stacklevel=3)


def use_mesh(mesh: Mesh):
    """A context manager for calls on a mesh: `with use_mesh(mesh): step(...)`. Makes `constrain` take effect.

    On several CPUs, this turns JAX's persistent compilation cache off, as `make_mesh` does.
    """
    turn_cache_off(list(mesh.devices.flat))
    return jax.set_mesh(mesh)


def per_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function`, called on each device with its parts of the arguments (`jax.shard_map`).

    The part of a batch is some of its rows, that of the residual stream some of its rows and tokens. Differentiate
    inside `function`, not through the result.
    """
    stages = fsdp_stages(list(mesh.devices[0, :, 0]))

    def traced(*arguments: Any) -> Any:
        context = copy_context()
        context.run(FSDP_STAGES.set, stages)
        return context.run(function, *arguments)

    return jax.shard_map(traced, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def fsdp_stages(devices: Sequence[Any]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The stages in which to reduce-scatter over the devices along `fsdp`: the groups of indices of each stage.

    An all-gather takes the same stages, from the last to the first.

    There is one stage for each side of the torus that TPUs lie along, and one stage for other devices. All stages
    together send as much as one collective over all devices. In one stage, XLA for TPUs may use an all-reduce, which
    sends twice as much: for a reduce-scatter on slices with two equal sides, for an all-gather on those like 4 x 4 x 4.
    """
    count = len(devices)
    sides = zip(*(device.coords if device.platform == "tpu" else () for device in devices), strict=True)
    # The distance between neighbours along each side, as indices.
    strides = {1} | {next(i for i, at in enumerate(side) if at != side[0]) for side in sides if len(set(side)) > 1}
    spans = [count, *sorted(strides, reverse=True)]
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1 or any(a % b for a, b in pairwise(spans)):
        spans = [count, 1]
    groups = (
        np.arange(count).reshape(-1, span // stride, stride).swapaxes(1, 2).reshape(-1, span // stride)
        for span, stride in pairwise(spans)
    )
    return tuple(tuple(map(tuple, stage.tolist())) for stage in groups)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of a batch [B, ...], rows over `data` and `fsdp`, after `leading` axes that are not split."""
    return NamedSharding(mesh, P(*[None] * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device holds a full copy."""
    return NamedSharding(mesh, P())


def mesh_of(model: Any) -> Mesh | None:
    """The mesh of a model's parameters; None if they are on one device, or abstract."""
    sharding = getattr(jax.tree.leaves(model)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def platform_of(model: Any) -> str | None:
    """The platform of the model's parameters, such as "cpu"; None of an abstract model without a sharding."""
    sharding = getattr(jax.tree.leaves(model)[0], "sharding", None)
    return None if sharding is None else next(iter(sharding.device_set)).platform


def row_groups(mesh: Mesh) -> int:
    """The number of groups into which a batch's rows are split. The number of rows must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
