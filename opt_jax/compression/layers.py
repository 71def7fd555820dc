"""One layer, compressed by any of the methods: its new parameters, and the error of each matrix."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from opt_jax.compression import awq, smoothquant
from opt_jax.compression.gptq import gptq
from opt_jax.compression.grid import Grid, round_to_nearest
from opt_jax.compression.layerwise import MATRICES, Source, Stream, check_collected, input_points
from opt_jax.compression.pruning import magnitude, wanda
from opt_jax.compression.recipe import Recipe
from opt_jax.compression.sparsegpt import sparsegpt
from opt_jax.compression.statistics import add_absmax, add_hessian, layer_error
from opt_jax.model.attention import AttentionMask
from opt_jax.model.packed import PackedLinear, QuantizedMatrix

Errors = dict[str, float]  # matrix -> error
Arrays = dict[str, np.ndarray]  # path of a parameter inside of its layer -> its new value
# What is compressed together, from statistics of one pass; with `true_sequential` a pass for each.
_GROUPS = (MATRICES[:3], MATRICES[3:4], MATRICES[4:5], MATRICES[5:])
_PARTS = ("qweight", "scales", "zeros", "order")  # parameters of a `PackedLinear`
_CLIP_TOKENS = 512  # for `awq.search_clip`


def compress_layer(source: Source, recipe: Recipe, stream: Stream | None, layer: int) -> tuple[Arrays, Errors]:
    """The new parameters of a layer, as they are stored, and the error of each matrix.

    Args:
      source: the checkpoint.
      recipe: the method and its options.
      stream: the residual stream before the layer; None for a method that does not look at it.
      layer: its number.

    Raises:
      NothingCollectedError: the inputs of a matrix were not seen, or are zero or not finite.
      ValueError: the statistics do not suffice; the message names the layer and the matrix.
    """
    if recipe.method in ("awq", "smoothquant"):
        assert stream is not None
        return _compress_scaled(source, recipe, stream, layer)
    points = input_points(source.config)
    arrays: Arrays = {}
    errors: Errors = {}
    collected: dict[str, Statistics] = {}
    for group in _GROUPS if recipe.true_sequential else (MATRICES,):
        if stream is not None:
            of_group = {matrix: points[matrix] for matrix in group}
            collected = collect(stream, source.module(layer, float_parameters(recipe, source, arrays)), layer, of_group)
        for i, matrix in enumerate(group):
            weight = _on_rows(source.weight(layer, f"{matrix}.kernel").T, source.mesh)
            hessian = collected[points[matrix]].hessian if collected else None
            if points[matrix] not in [points[later] for later in group[i + 1 :]]:
                collected.pop(points[matrix], None)
            try:
                compressed, error = _compress_matrix(recipe, weight, hessian)
            except ValueError as problem:
                raise ValueError(f"layer {layer}, {matrix}: {problem}") from None
            errors[matrix] = float(error)
            del weight, hessian  # before the next ones are read
            if isinstance(compressed, QuantizedMatrix):
                arrays |= _packed_arrays(matrix, compressed)
            else:
                arrays[f"{matrix}.kernel"] = np.asarray(compressed).T
    return _as_stored(source, layer, arrays), errors


@dataclasses.dataclass
class Statistics:
    """Of the inputs of one or more matrices: see `add_hessian` and `add_absmax`."""

    hessian: Float[Array, "K K"]
    absmax: Float[Array, " K"]


def collect(stream: Stream, module: Any, layer: int, points: Mapping[str, str]) -> dict[str, Statistics]:
    """Hook point -> statistics of the inputs there, from one pass of all samples through a layer.

    Args:
      stream: the residual stream before the layer.
      module: the layer.
      layer: its number.
      points: matrix -> the point of its inputs.

    Raises:
      NothingCollectedError: the inputs of a matrix were not seen, or are zero or not finite.
    """
    collected: dict[str, Statistics] = {}
    for number, inputs in enumerate(stream.inputs(module, sorted(set(points.values())))):
        for point, x in inputs.items():
            width = x.shape[-1]
            if point not in collected:
                collected[point] = Statistics(jnp.zeros((width, width), jnp.float32), jnp.zeros(width, jnp.float32))
            of_point = collected[point]
            of_point.hessian = add_hessian(of_point.hessian, number * stream.size, x)
            of_point.absmax = add_absmax(of_point.absmax, x)
    check_collected(layer, points, {point: jnp.diagonal(of_point.hessian) for point, of_point in collected.items()})
    return collected


def _compress_matrix(recipe: Recipe, weight: Array, hessian: Any) -> tuple[QuantizedMatrix | Array, Any]:
    """A matrix [outputs, inputs] compressed by a method that looks at one at a time, and its error."""
    grid: Any = recipe.grid
    sparsity: Any = recipe.sparsity
    if recipe.method == "rtn":
        return _with_error(weight, round_to_nearest(weight, grid))
    if recipe.method == "magnitude":
        return _with_error(weight, magnitude(weight, sparsity))
    if recipe.method == "wanda":
        pruned = wanda(weight, jnp.sqrt(jnp.diagonal(hessian)), sparsity)
        return pruned, layer_error(weight, pruned, hessian)
    damping: Any = recipe.damping
    if recipe.method == "sparsegpt":
        return sparsegpt(weight, hessian, sparsity, grid, damping=damping)
    assert recipe.method == "gptq"
    return gptq(weight, hessian, grid, act_order=recipe.act_order, damping=damping)


def _with_error(weight: Array, compressed: QuantizedMatrix | Array) -> tuple[QuantizedMatrix | Array, Array]:
    """The compressed matrix, and the squared change of the weights relative to their square."""
    dense = compressed.dequantize() if isinstance(compressed, QuantizedMatrix) else compressed
    return compressed, jnp.square(weight - dense).sum() / jnp.square(weight).sum()


# Methods that scale inputs ------------------------------------------------------------------------------------------


def _compress_scaled(source: Source, recipe: Recipe, stream: Stream, layer: int) -> tuple[Arrays, Errors]:
    """As `compress_layer`, by SmoothQuant or AWQ: what comes before a matrix divides its inputs by scales.

    LayerNorms divide the inputs of q_proj, k_proj, v_proj and fc1. With AWQ, v_proj divides those of out_proj, and fc1
    those of fc2, which is exact with ReLU.
    """
    points, grid = input_points(source.config), recipe.grid
    assert grid is not None
    weights = {matrix: _on_rows(source.weight(layer, f"{matrix}.kernel").T, source.mesh) for matrix in MATRICES}
    module = source.module(layer)
    collected = collect(stream, module, layer, points)
    if recipe.method == "awq":
        scales = _awq_scales(grid, stream, module, weights, points, source.config.activation_function == "relu")
    else:
        scales = {}
        for group in (MATRICES[:3], MATRICES[4:5]):
            absmax, alpha = collected[points[group[0]]].absmax, recipe.alpha or 0.0
            scales[points[group[0]]] = smoothquant.smoothing_scales(absmax, [weights[m] for m in group], alpha)
    arrays: Arrays = {}
    for norm, matrix in (("self_attn_layer_norm", "self_attn.q_proj"), ("final_layer_norm", "fc1")):
        scale, bias = (jnp.asarray(source.weight(layer, f"{norm}.{name}")) for name in ("scale", "bias"))
        folded = smoothquant.fold_into_norm(scale, bias, scales[points[matrix]])
        arrays |= {f"{norm}.{name}": np.asarray(x) for name, x in zip(("scale", "bias"), folded, strict=True)}
    for before, after in (("self_attn.v_proj", "self_attn.out_proj"), ("fc1", "fc2")):
        if points[after] in scales:
            bias = jnp.asarray(source.weight(layer, f"{before}.bias")) if source.config.enable_bias else None
            weights[before], bias = awq.fold_into_outputs(weights[before], bias, scales[points[after]])
            arrays |= {} if bias is None else {f"{before}.bias": np.asarray(bias)}
    clipped = _tokens(stream, module, sorted(set(points.values()))) if recipe.method == "awq" else {}
    errors: Errors = {}
    for matrix, weight in weights.items():
        hessian = collected[points[matrix]].hessian
        by = scales.get(points[matrix], jnp.ones(weight.shape[1], jnp.float32))
        scaled = smoothquant.fold_into_inputs(weight, by)
        if recipe.method == "awq":
            free = matrix in MATRICES[:2]  # q_proj and k_proj
            compressed = awq.quantize(weight, by, None if free else clipped[points[matrix]], grid)
        else:
            compressed = smoothquant.quantize_weight(scaled)
        errors[matrix] = float(layer_error(scaled, compressed, hessian / by[:, None] / by[None]))
        arrays |= _packed_arrays(matrix, compressed)
    return _as_stored(source, layer, arrays), errors


def _awq_scales(
    grid: Grid, stream: Stream, module: Any, weights: Mapping[str, Array], points: Mapping[str, str], is_relu: bool
) -> dict[str, Array]:
    """Hook point -> the scales of the inputs there."""
    outputs: dict[str, Any] = dict.fromkeys(MATRICES[3:], awq.product)
    outputs["self_attn.q_proj"] = partial(_attention_outputs, module.self_attn)
    scales = {}
    for group in _GROUPS if is_relu else _GROUPS[:3]:
        batches = _Batches(stream, module, points[group[0]])
        matrices = [weights[matrix] for matrix in group]
        scales[points[group[0]]] = awq.search_scales(matrices, batches, outputs[group[0]], grid)
    return scales


@dataclasses.dataclass
class _Batches:
    """The inputs at a hook point of a layer, batch by batch, as often as they are read."""

    stream: Stream
    module: Any
    point: str

    def __iter__(self) -> Iterator[Float[Array, "B T K"]]:
        yield from (inputs[self.point] for inputs in self.stream.inputs(self.module, [self.point]))


@jax.jit
def _attention_outputs(attention: Any, weights: Any, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The outputs of attention with other kernels, [outputs, inputs], of q_proj, k_proj and v_proj."""
    attention = nnx.clone(attention)
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
        getattr(attention, name).kernel.set_value(weight.T.astype(inputs.dtype))
    return attention(inputs, AttentionMask(None, None, 0), None, None)[0]


def _tokens(stream: Stream, module: Any, points: list[str]) -> dict[str, Float[Array, "T K"]]:
    """The inputs at hook points of a layer, of evenly spaced tokens."""
    samples, length = stream.values.shape[:2]
    chosen = np.arange(0, samples * length, max(samples * length // _CLIP_TOKENS, 1))
    parts: dict[str, list[Array]] = {point: [] for point in points}
    for number, inputs in enumerate(stream.inputs(module, points)):
        first = number * stream.size * length
        here = chosen[(chosen >= first) & (chosen < first + stream.size * length)] - first
        for point, x in inputs.items():
            parts[point].append(x.reshape(-1, x.shape[-1])[here].astype(jnp.float32))
    return {point: jnp.concatenate(values) for point, values in parts.items()}


# Parameters ---------------------------------------------------------------------------------------------------------


def _on_rows(weight: np.ndarray, mesh: Mesh | None) -> Array:
    """The matrix on the devices, sharded by outputs, which all methods treat alike."""
    if mesh is None:
        return jnp.asarray(weight)
    axes = mesh.axis_names if len(weight) % mesh.size == 0 else None
    return jax.device_put(weight, NamedSharding(mesh, P(axes)))


def _packed_arrays(matrix: str, compressed: QuantizedMatrix) -> Arrays:
    """The parameters of the `PackedLinear` with this matrix, but for its bias."""
    packed = PackedLinear.from_matrix(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), compressed))
    parts = {name: getattr(packed, name) for name in _PARTS}
    return {f"{matrix}.{name}": np.asarray(part.get_value()) for name, part in parts.items() if part is not None}


def _as_stored(source: Source, layer: int, arrays: Arrays) -> Arrays:
    """The arrays in the dtypes of the checkpoint, but for those of packed matrices.

    Raises:
      ValueError: a value that the dtype cannot hold.
    """
    stored: Arrays = {}
    for path, value in arrays.items():
        if not _is_packed(path):
            dtype = source.stored_dtype(layer, path)
            with np.errstate(over="ignore"):
                value = value.astype(dtype)
            if not np.isfinite(value).all():
                raise ValueError(f"layer {layer}, {path}: {dtype.name}, as stored, cannot hold its new values")
        stored[path] = np.ascontiguousarray(value)
    return stored


def _is_packed(path: str) -> bool:
    matrix, _, part = path.rpartition(".")
    return matrix in MATRICES and part in _PARTS


def float_parameters(recipe: Recipe, source: Source, arrays: Arrays) -> Arrays:
    """The new parameters of a layer, with float kernels [inputs, outputs] in place of packed ones."""
    floats = {path: value for path, value in arrays.items() if not _is_packed(path)}
    for matrix in MATRICES:
        parts = {name: jnp.asarray(arrays[f"{matrix}.{name}"]) for name in _PARTS if f"{matrix}.{name}" in arrays}
        if parts:
            inputs = source.config.ffn_dim if matrix == "fc2" else source.config.hidden_size
            packed = PackedLinear(parts, None, in_features=inputs, bits=recipe.bits or 0, dtype=jnp.float32)
            floats[f"{matrix}.kernel"] = np.asarray(packed.matrix().dequantize().T)
    return floats
