"""A model layer by layer: one layer's weights in memory, and the residual stream of all samples before it.

GPTQ, SparseGPT and Wanda compress a layer with the outputs of the compressed layers before it as inputs. So they
collect statistics of the inputs of a layer's matrices, compress these, and replace the residual stream by the outputs
of the compressed layer. Nothing but the layer at hand is read from the checkpoint.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from opt_jax.checkpoints import hub
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats.quantized import quantized_of
from opt_jax.checkpoints.pretrained import check_parameters, choose_dtypes, open_parameters, read_array, read_config
from opt_jax.checkpoints.source_files import SourceFiles, files_of_model
from opt_jax.config import OPTConfig
from opt_jax.model import hooks
from opt_jax.model.attention import AttentionMask
from opt_jax.model.heads import OPTModel, named_parameters
from opt_jax.parallel import rules
from opt_jax.parallel.mesh import batch_sharding, row_groups, use_mesh
from opt_jax.research.activations import activations

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
_HEADS = ("lm_head.", "score.", "qa_outputs.")
IN_MEMORY = 4 << 30  # bytes of a residual stream; a larger one is a file
_TOKENS = 2048  # that one device computes at once, if a sample is not longer


def input_points(config: OPTConfig) -> dict[str, str]:
    """Matrix of a layer -> the hook point whose value it multiplies."""
    before = config.do_layer_norm_before
    attention = "ln1.hook_normalized" if before else "hook_resid_pre"
    feed_forward = "ln2.hook_normalized" if before else "ln1.hook_normalized"
    points = (attention, attention, attention, "attn.hook_z", feed_forward, "mlp.hook_post")
    return dict(zip(MATRICES, points, strict=True))


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, of which nothing is in memory.

    Attributes:
      directory: where it is.
      config: the architecture.
      raw: the content of its config.json.
      arrays: all parameters by path.
      files: their state when the checkpoint was opened.
      dtype: of computation.
      mesh: over which a layer is sharded; None: one device.
    """

    directory: Path
    config: OPTConfig
    raw: dict[str, Any]
    arrays: dict[str, LazyArray]
    files: SourceFiles
    dtype: np.dtype
    mesh: Mesh | None

    @classmethod
    def open(cls, name: str | os.PathLike, dtype: DTypeLike | None, mesh: Mesh | None, verify: bool) -> "Source":
        """The checkpoint `name`; arguments as in `load_pretrained`, with the same errors."""
        directory = hub.resolve(name)
        if not (verify or hub.is_orbax(directory)):
            raise ValueError(f"verify=False (--no-verify) is for Orbax directories: {directory} has no checksums")
        files = files_of_model(directory)
        config, raw = read_config(directory)
        arrays, checks = open_parameters(directory, config, verify)
        for path in quantized_of(arrays):
            raise ValueError(f"{directory}: {path} is quantized already: take the model that was quantized")
        check_parameters(OPTModel, config, arrays, directory, may_drop=_HEADS)
        for check in checks:
            check()
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        stored = {path: array.dtype for path, array in arrays.items()}
        compute, _ = choose_dtypes(dtype, None, stored, platform, directory)
        return cls(directory, config, raw, arrays, files, compute, mesh)

    def weight(self, layer: int, path: str) -> np.ndarray:
        """A parameter of a layer in float32, by its path inside of it, such as `self_attn.q_proj.kernel`."""
        return self.arrays[layer_prefix(layer) + path].load().astype(np.float32)

    def stored_dtype(self, layer: int, path: str) -> np.dtype:
        """The dtype of a layer's parameter in the checkpoint."""
        return self.arrays[layer_prefix(layer) + path].dtype

    def module(self, layer: int, changed: dict[str, np.ndarray] | None = None) -> Any:
        """The `OPTDecoderLayer`, with other values of some parameters."""
        layers: Any = self._one_layer_model(layer, changed or {}).decoder.layers
        return layers[0]

    def embed(self, ids: Int[np.ndarray, "B T"]) -> Iterator[Float[np.ndarray, "B T D"]]:
        """The residual stream before the first layer, batch by batch."""
        model, size = self._one_layer_model(0, {}), self.batch_size(ids.shape[1])
        for start in range(0, len(ids), size):
            batch = ids[start : start + size]
            points = ["blocks.0.hook_resid_pre"]
            yield np.asarray(activations(model, points, batch, np.ones(batch.shape, bool))[points[0]])

    def batch_size(self, length: int) -> int:
        """The samples of `length` tokens that are computed at once."""
        return max(1, _TOKENS // length) * (1 if self.mesh is None else row_groups(self.mesh))

    def _one_layer_model(self, layer: int, changed: dict[str, np.ndarray]) -> OPTModel:
        """A base model with one layer. If that is the first one, it also has what lies outside of the layers."""
        config = dataclasses.replace(self.config, num_hidden_layers=1)
        model: Any = nnx.eval_shape(lambda: OPTModel(config, rngs=nnx.Rngs(0), dtype=self.dtype))
        default = jnp.zeros(()).sharding
        for path, param in named_parameters(model).items():
            inside = path.startswith(layer_prefix(0))
            if not inside and layer:
                continue
            local = path.removeprefix(layer_prefix(0))
            stored = self.arrays[layer_prefix(layer) + local if inside else path]
            sharding = default if self.mesh is None else rules.param_sharding(path, stored.shape, self.mesh)
            target = jax.ShapeDtypeStruct(stored.shape, self.dtype, sharding=sharding)
            if inside and local in changed:
                param.set_value(jax.device_put(changed[local].astype(self.dtype), sharding))
            else:
                param.set_value(read_array(stored, target))
        return model


def layer_prefix(layer: int) -> str:
    """The beginning of the paths of a layer's parameters."""
    return f"model.decoder.layers.{layer}."


class Stream:
    """The residual stream of all samples at one place of the model, [N, T, D], in memory or in a file.

    Args:
      source: the checkpoint.
      ids: [N, T], the samples.
      file: where it lies if it is larger than IN_MEMORY.
    """

    def __init__(self, source: Source, ids: Int[np.ndarray, "N T"], file: Path):
        self.source, shape = source, (*ids.shape, source.config.hidden_size)
        self.size = source.batch_size(ids.shape[1])
        nbytes = int(np.prod(shape, dtype=np.int64)) * source.dtype.itemsize
        if nbytes > IN_MEMORY:
            self.values: np.ndarray = np.memmap(file, source.dtype, "w+", shape=shape)
        else:
            self.values = np.empty(shape, source.dtype)
        start = 0
        for batch in source.embed(ids):
            self.values[start : start + len(batch)] = batch
            start += len(batch)

    def _batches(self) -> Iterator[tuple[slice, Array]]:
        mesh = self.source.mesh
        for start in range(0, len(self.values), self.size):
            part = slice(start, start + self.size)
            batch = np.ascontiguousarray(self.values[part])
            yield part, jnp.asarray(batch) if mesh is None else jax.device_put(batch, batch_sharding(mesh))

    def inputs(self, layer: Any, points: Sequence[str]) -> Iterator[dict[str, Float[Array, "B T K"]]]:
        """The values at hook points of a layer, batch by batch."""
        with _on(self.source.mesh):
            for _, batch in self._batches():
                _, kept = run_layer(layer, batch, tuple(points))
                yield {name: x.reshape(*x.shape[:2], -1) for name, x in kept.items()}

    def advance(self, layer: Any) -> None:
        """Replace the stream by the outputs of a layer."""
        with _on(self.source.mesh):
            for part, batch in self._batches():
                self.values[part] = np.asarray(run_layer(layer, batch, ())[0])


def _on(mesh: Mesh | None) -> Any:
    return contextlib.nullcontext() if mesh is None else use_mesh(mesh)


class _Inputs:
    """What `hooks.point` finds while a layer is traced: keeps the values at points."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.kept = names, {}

    def at(self, name: str, value: Array, *_: Any) -> Array:
        if name in self.names:
            self.kept[name] = value
        return value

    def wants(self, _: str) -> bool:
        return False


@partial(jax.jit, static_argnums=2)
def run_layer(
    layer: Any, x: Float[Array, "B T D"], points: tuple[str, ...]
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """The output of a layer for rows without pads, and the values at its hook points."""
    inputs = _Inputs(points)
    token = hooks.active.set(inputs)
    try:
        y, _, _ = layer(x, AttentionMask(None, None, 0), None, None)
    finally:
        hooks.active.reset(token)
    return y, inputs.kept


class NothingCollectedError(ValueError):
    """The inputs of a matrix were not seen, or they are not finite."""


def check_collected(layer: int, points: Mapping[str, str], statistics: Mapping[str, Array]) -> None:
    """Refuse statistics without numbers, or with such as are not finite.

    Args:
      layer: its number.
      points: matrix -> the hook point of its inputs.
      statistics: hook point -> an array that the inputs at that point have made.

    Raises:
      NothingCollectedError: names the layer and the first matrix without good statistics.
    """
    for matrix, point in points.items():
        where = f"layer {layer}, {matrix}"
        if point not in statistics:
            raise NothingCollectedError(f"{where}: no inputs were seen at {point}, so nothing to calibrate with")
        if not bool(jnp.isfinite(statistics[point]).all()):
            raise NothingCollectedError(f"{where}: its inputs are not finite; try another dtype")
        if not bool((statistics[point] != 0).any()):
            raise NothingCollectedError(f"{where}: all its inputs are zero, so nothing to calibrate with")
