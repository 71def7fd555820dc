"""`compress`: a model directory in, a compressed model directory out, layer by layer."""

import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

import opt_jax
from opt_jax.checkpoints import hub
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.directories import check_destination, check_space, new_directory
from opt_jax.checkpoints.formats import quantized
from opt_jax.checkpoints.formats.hf_writer import write_json
from opt_jax.checkpoints.orbax import write_arrays
from opt_jax.checkpoints.saving import copy_companions
from opt_jax.compression.calibration import MOST_TOKENS, Calibration, Rows, read_calibration
from opt_jax.compression.layers import Errors, compress_layer, float_parameters
from opt_jax.compression.layerwise import Source, Stream, layer_prefix
from opt_jax.compression.recipe import Recipe, make_recipe
from opt_jax.data.tokens import hash_of_ids
from opt_jax.model.ids import as_ids
from opt_jax.parallel.mesh import row_groups
from opt_jax.system.disk import disk_errors
from opt_jax.system.reading import json_object, read_small
from opt_jax.system.temporary import TemporaryPlace, new_file, write_file
from opt_jax.text.tokenizer import OPTTokenizer


def compress(  # noqa: PLR0913  (options, by keyword)
    model: str | os.PathLike,
    output: str | os.PathLike,
    method: str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    true_sequential: bool = False,
    damping: float | None = None,
    alpha: float | None = None,
    sparsity: float | str | tuple[int, int] | None = None,
    calibration: Sequence[str] | np.ndarray | None = None,
    samples: int | None = None,
    window: int | None = None,
    seed: int | None = None,
    rows: Rows | None = None,
    text_key: str | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    verify: bool = True,
    progress: Callable[[int, int, Errors], object] | None = None,
) -> dict[str, Any]:
    """Quantise or prune the matrices of a model's layers, and write the result as a model directory.

    Embeddings, `project_in`, `project_out` and heads stay as they are, as in the papers. Layers are read, compressed
    and written one by one. If the process is killed, the same call goes on at the layer where it was, and gives the
    same bits. What is unfinished lies in `.NAME.compressing` beside `output`.

    Args:
      model: a directory, a hub id, or "tiny".
      output: the new directory.
      method: "rtn" (round to nearest), "gptq", "awq", "smoothquant" (8-bit weights and activations), "magnitude",
        "wanda" or "sparsegpt" (with `bits` it also quantises).
      bits: 2 to 8; default: 4.
      group_size: how many inputs share a scale; default: all inputs of an output.
      symmetric: no zeros of groups: the middle of the integers means 0.
      act_order: GPTQ's: the inputs with the largest activations first.
      true_sequential: four passes for a layer: a matrix sees the inputs that compressed matrices before it have made.
      damping: added to the diagonal of the Hessian, as a share of its mean; default: 0.01.
      alpha: SmoothQuant's migration strength, 0 to 1; default: 0.5.
      sparsity: the share of weights that become 0, or "2:4": two of each four; default: 0.5.
      calibration: texts, as `read_calibration` takes them, or ids [N, T] without pads.
      samples: the number of windows of the texts; default: 128.
      window: tokens of a window; default: 2048, or the model's context if that is less.
      seed: of their places; default: 0.
      rows, text_key: see `read_calibration`.
      dtype: of computation, for methods with `calibration`; default as in `from_pretrained`.
      mesh: shard a layer and the samples over it.
      verify: see `from_pretrained`.
      progress: called with (layers done, layers, error of each matrix) after each layer. The error is the squared
        change of a matrix's outputs on the samples, relative to their square; of rtn and magnitude that of the weights.

    Returns:
      The content of compression.json in the new directory: the recipe, and the errors by layer.

    Raises:
      ValueError: an option without effect on the method, or out of range; bad texts; weights that the stored dtype
        cannot hold; an earlier call with this `output` was begun with other arguments; or see `from_pretrained`.
      FileExistsError: `output` exists, or another process is writing it now.
    """
    options = dict(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order, damping=damping)
    options |= dict(true_sequential=true_sequential, alpha=alpha, sparsity=sparsity, calibration=calibration)
    sampling = dict(samples=samples, window=window, seed=seed, rows=rows, text_key=text_key)
    recipe = make_recipe(method, options | sampling | dict(dtype=dtype))
    if jax.process_count() > 1:
        raise ValueError("a model is compressed by one process: start it on one host")
    path = hub.disk_path(output)
    hub.check_array_path(path)
    check_destination(path, overwrite=None)
    source = Source.open(model, dtype, mesh, verify)
    recipe.check_model(source.config)
    drawn = None if calibration is None else _calibration(model, source, calibration, sampling)
    about = {
        "model": str(model),
        **recipe.described(),
        "calibration": None if drawn is None else drawn.about,
        "dtype": str(source.dtype),
        "mesh": None if mesh is None else dict(mesh.shape),
        "platform": jax.default_backend(),
        "versions": _versions(),
    }
    place = TemporaryPlace(path.with_name(f".{path.name}.compressing"), r"state\.json.*|stream|\d+\.[\w.]+\.npy.*")
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), place.locked(wait=False):
        work = _Work(place.path, about | {"source": source.files.hash_of_states()})
        try:
            _compress_layers(source, recipe, drawn, work, progress)
        except Exception:
            if not work.errors:
                place.remove()
            raise
        kind = "outputs" if recipe.needs_samples else "weights"
        report = about | {"error_of": kind, "errors": work.errors}
        _write(source, recipe, work, path, report)
        place.remove()
    return report


def _versions() -> dict[str, str]:
    return {"opt-jax": opt_jax.__version__} | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}


def _calibration(model: str | os.PathLike, source: Source, calibration: Any, sampling: dict[str, Any]) -> Calibration:
    """The samples; ValueError for sizes that the model or the mesh cannot take."""
    context, vocabulary = source.config.max_position_embeddings, source.config.vocab_size
    given = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(calibration, (str, os.PathLike)):
        calibration = [calibration]
    if all(isinstance(name, (str, os.PathLike)) for name in calibration):
        options: dict[str, Any] = dict(samples=128, window=min(MOST_TOKENS, context)) | given
        for name, low, high in (("samples", 1, None), ("window", 2, context)):
            if options[name] < low or high is not None and options[name] > high:
                limit = f" and at most {high}, the model's context" if high else ""
                raise ValueError(f"{name} is {options[name]}: it must be at least {low}{limit}")
        drawn = read_calibration([os.fspath(x) for x in calibration], OPTTokenizer.from_pretrained(model), **options)
    else:
        if given:
            raise ValueError(f"{next(iter(given))} without effect: calibration holds ids already")
        ids = as_ids("calibration", calibration, 0, vocabulary - 1)
        if ids.ndim != 2 or not ids.size or ids.shape[1] > context:
            raise ValueError(f"calibration ids must be [N, T] with T at most {context}, not of shape {ids.shape}")
        pad, ends = source.config.pad_token_id, (source.config.bos_token_id, source.config.eos_token_id)
        if pad not in ends and (ids == pad).any():
            raise ValueError(f"calibration ids hold the pad token, {pad}: cut all rows to one length")
        drawn = Calibration(ids, {"samples": len(ids), "window": ids.shape[1], "hash": hash_of_ids(ids.reshape(-1))})
    parts = 1 if source.mesh is None else row_groups(source.mesh)
    if len(drawn.ids) % parts:
        raise ValueError(f"samples is {len(drawn.ids)}: it must be a multiple of {parts}, the mesh's data x fsdp")
    return drawn


class _Work:
    """The finished layers of a compression, in a directory; the caller has its lock."""

    def __init__(self, path: Path, plan: dict[str, Any]):
        """Go on with an earlier call. ValueError if it had another plan."""
        self.path, self.state = path, {"plan": json.loads(json.dumps(plan)), "errors": [], "arrays": []}
        if (file := path / "state.json").exists():
            before = json_object(read_small(file), file)
            for name, value in self.state["plan"].items():
                if (old := before.get("plan", {}).get(name)) != value:
                    what = f"another {name}" + ("" if name == "source" else f": {json.dumps(old)}")
                    raise ValueError(f"{path} was begun with {what}; give the same, or remove that directory")
            self.state = before
        else:
            self._write_state()

    @property
    def errors(self) -> list[Errors]:
        """Of each finished layer."""
        return self.state["errors"]

    def add(self, layer: int, arrays: dict[str, np.ndarray], errors: Errors) -> None:
        """Write the new parameters of a layer, by their path inside of it."""
        for name, value in arrays.items():
            with new_file(self.path / f"{layer}.{name}.npy", value.nbytes) as file:
                np.lib.format.write_array(file, _plain(value), allow_pickle=False)
        self.errors.append(errors)
        self.state["arrays"].append(sorted(arrays))
        self._write_state()

    def arrays(self, layer: int, dtype_of: Callable[[str], np.dtype]) -> dict[str, np.ndarray]:
        """What `add` wrote, memory-mapped. `dtype_of`: of a path, if NumPy's files lack it."""
        loaded = {}
        for name in self.state["arrays"][layer]:
            value = np.load(self.path / f"{layer}.{name}.npy", "r")
            loaded[name] = value.view(dtype_of(name)) if value.dtype == np.uint16 else value
        return loaded

    def _write_state(self) -> None:
        write_file(self.path / "state.json", json.dumps(self.state).encode())


def _plain(value: np.ndarray) -> np.ndarray:
    """The array in a dtype that NumPy's files have; uint16 in place of half precision."""
    return value.view(np.uint16) if value.dtype.itemsize == 2 else value


def _compress_layers(
    source: Source,
    recipe: Recipe,
    drawn: Calibration | None,
    work: _Work,
    progress: Callable[[int, int, Errors], object] | None,
) -> None:
    depth, stream = source.config.num_hidden_layers, None
    begun = len(work.errors)
    if drawn is not None and begun < depth:
        stream = Stream(source, drawn.ids, work.path / "stream")
        for layer in range(begun):
            _advance(
                source, recipe, stream, layer, work.arrays(layer, lambda path, i=layer: source.stored_dtype(i, path))
            )
    for layer in range(begun, depth):
        arrays, errors = compress_layer(source, recipe, stream, layer)
        if stream is not None and layer + 1 < depth:
            _advance(source, recipe, stream, layer, arrays)
        work.add(layer, arrays, errors)
        if progress is not None:
            progress(layer + 1, depth, errors)


def _advance(source: Source, recipe: Recipe, stream: Stream, layer: int, arrays: dict[str, np.ndarray]) -> None:
    changed = float_parameters(recipe, source, arrays) if recipe.after_compressed else {}
    stream.advance(source.module(layer, changed))


def _write(source: Source, recipe: Recipe, work: _Work, path: Path, report: dict[str, Any]) -> None:
    """Publish the model."""
    arrays: dict[str, Any] = dict(source.arrays)
    for layer in range(source.config.num_hidden_layers):
        prefix = layer_prefix(layer)
        new = work.arrays(layer, lambda local, i=layer: source.stored_dtype(i, local))
        for local, value in new.items():
            if local.endswith(".qweight"):
                del arrays[f"{prefix}{local.removesuffix('qweight')}kernel"]
            arrays[prefix + local] = LazyArray(value.shape, value.dtype, value.__getitem__)
    with new_directory(path) as new:
        check_space(new, sum(array.nbytes for array in arrays.values()))
        write_arrays(new / "params", arrays)
        copy_companions(hub.companion_directories(source.directory), new)
        source.files.check()
        write_json(new / hub.RECIPE_FILE, report)
        kernels = [path for path in source.arrays if path not in arrays]  # which are quantised
        activation_bits = 8 if recipe.method == "smoothquant" else None
        bits: Any = dict.fromkeys(kernels, recipe.bits)
        settings = quantized.settings_of(bits, dict.fromkeys(kernels, activation_bits), recipe.described())
        write_json(new / "config.json", quantized.with_settings(source.raw, settings))
