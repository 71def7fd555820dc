"""Activations of batches, as the modules beside this one read them from a model."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from opt_jax.config import OPTConfig
from opt_jax.model.heads import OPTPreTrainedModel
from opt_jax.model.hook_points import POINTS, Names, find_points, local_name
from opt_jax.model.ids import as_ids, as_mask
from opt_jax.model.inputs import check_inputs
from opt_jax.model.interventions import as_hooks
from opt_jax.parallel.mesh import mesh_of, use_mesh


def token_points(config: OPTConfig, names: Names) -> list[str]:
    """The points that `names` stands for; ValueError for one whose shape does not begin with [B, T]."""
    points = find_points(config, names)
    for name in points:
        axes = POINTS[local_name(name)][0]
        if not axes.startswith("BT"):
            raise ValueError(f"{name} has the axes [{', '.join(axes)}], so no row for each token: use run_with_cache")
    return points


def as_batch(batch: Any) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """The ids and the mask of a batch in one of the forms that `collect` takes; ValueError for another."""
    if isinstance(batch, Mapping):
        batch = (batch.get("input_ids"), batch.get("attention_mask"))
    ids, mask = batch if isinstance(batch, tuple) and len(batch) == 2 else (batch, None)
    ids = as_ids("input_ids", ids)
    mask = np.ones(ids.shape, bool) if mask is None else as_mask("attention_mask", mask)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(f"a batch must be [B, T], or (input_ids, attention_mask), not {ids.shape} and {mask.shape}")
    return ids, mask


def activations(
    model: OPTPreTrainedModel, points: list[str], ids: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]
) -> dict[str, Array]:
    """The activations of one batch, name -> [B, T, ...], of all tokens, computed no further than necessary."""
    mesh = mesh_of(model)
    inputs = check_inputs(model.base_model, dict(input_ids=ids, attention_mask=mask))
    with contextlib.nullcontext() if mesh is None else use_mesh(mesh):
        return _activations(model.base_model, inputs, as_hooks(model.config, None, points))


@jax.jit
def _activations(model: Any, inputs: dict[str, Array], hooks: Any) -> dict[str, Array]:
    return model.forward(**inputs, hooks=hooks).activations


def hash_of_model(model: OPTPreTrainedModel) -> str:
    """A hash of the architecture and of all parameters; the same on any mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(model.base_model)
    sums = jax.device_get(_checksums([x for _, x in leaves]))
    rows = [
        [jax.tree_util.keystr(path), x.shape, str(x.dtype), int(total)]
        for (path, x), total in zip(leaves, sums, strict=True)
    ]
    about = [dataclasses.asdict(model.config), str(model.base_model.dtype), rows]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()


@jax.jit
def _checksums(leaves: list[Array]) -> list[Array]:
    """For each array a sum of its bits modulo 2^32, weighted by their places. Integers: any order gives the same."""

    def checksum(x: Array) -> Array:
        bits = x if x.dtype == bool else lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        place = jnp.ones(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            place = place * jnp.uint32(2654435761) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return (bits.astype(jnp.uint32) * (jnp.uint32(2) * place + jnp.uint32(1))).sum(dtype=jnp.uint32)

    return [checksum(x) for x in leaves]
