"""Models on disk: reads and writes Orbax model directories, and loads Hugging Face directories through `convert.hf`.

A model directory holds `config.json` (HF's form), the tokenizer's files, and `params/`: an Orbax pytree, nested by the
parts of `opt_jax.model.named_parameters`' paths, with one array per layer and parameter, in the dtype of its source.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from opt_jax import hub, sharding
from opt_jax.config import OPTConfig
from opt_jax.model import OPTForCausalLM, OPTPreTrainedModel, named_parameters

M = TypeVar("M", bound=OPTPreTrainedModel)
Shape = tuple[int, ...]
log = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20  # of one stored chunk: what a process must read at least to fill its shard
PARAM_DTYPES = ("float32", "bfloat16", "float16")
_EMBEDDING = "model.decoder.embed_tokens.embedding"
_HEADS = ("lm_head.", "score.", "qa_outputs.")


# Writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LazyArray:
    """An array to be written, made (`load`) only when its turn comes."""

    shape: Shape
    dtype: np.dtype
    load: Callable[[], np.ndarray]


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `LazyArray`s one after the other, so that one array is in memory at a time (Orbax alone starts all at
    once, on copies). On disk they are what NumpyHandler writes: any Orbax reads them."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Any], infos, args=None):
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for written in await super().serialize([value.load()], [info], [arg]):
                await asyncio.to_thread(written.result)
        return []


def save_params(directory: Path, arrays: Mapping[str, LazyArray]) -> None:
    """Write parameters, path -> array, as an Orbax pytree to the new `directory`, one at a time, in chunks."""
    tree = _nest(arrays)
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # Weights do not compress: zstd makes writing several times slower for a few percent.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree, save_args=save_args))


@contextmanager
def new_directory(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path` that becomes `path` when the block ends, and vanishes if it raises.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false, or `path` is not a model directory of ours.
    """
    path = Path(os.path.realpath(path))
    check_destination(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    new, old = (path.with_name(f".{path.name}.{tag}.{suffix}") for suffix in ("new", "old"))
    new.mkdir()
    try:
        yield new
        check_destination(path, overwrite)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_destination(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError where `new_directory` would refuse to write."""
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or pass overwrite=True (--overwrite)")
    if not (hub.is_orbax(path) or path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is not a model directory, so it will not be overwritten: remove it yourself")


def copy_companions(source: Path, destination: Path) -> None:
    """Copy the tokenizer's files and generation_config.json, those that are there."""
    for name in hub.COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def save_pretrained(
    model: OPTPreTrainedModel, directory: str | os.PathLike, *, overwrite: bool = False, tokenizer: Any = None
) -> None:
    """Write the model, stacked or not, to a self-contained directory that `load_pretrained` reads.

    `directory` appears complete or not at all. Parameters keep their dtype.

    Args:
      overwrite: replace a model directory that is there.
      tokenizer: an `OPTTokenizer` to save along; default: the files of the directory the model was loaded from.

    Raises:
      FileExistsError: `directory` exists (see `overwrite`), or is something other than a model directory.
      ValueError: an abstract model (`nnx.eval_shape`), or one spread over several processes.
    """
    arrays: dict[str, LazyArray] = {}
    for path, param in named_parameters(model).items():
        value = param.get_value()
        if not isinstance(value, jax.Array) or not value.is_fully_addressable:
            raise ValueError(f"cannot save parameter {path}: it is not an array that this process holds in full")
        if re.search(r"\.layers\.\D", path):  # stacked: written layer by layer
            for i in range(value.shape[0]):
                load = lambda value=value, i=i: np.asarray(value[i])  # noqa: E731
                arrays[path.replace(".layers.", f".layers.{i}.")] = LazyArray(value.shape[1:], value.dtype, load)
        else:
            arrays[path] = LazyArray(value.shape, value.dtype, lambda value=value: np.asarray(value))
    config = model.config.to_hf() | {"architectures": [type(model).__name__]}
    config = set_dtype(config, str(arrays[_EMBEDDING].dtype))
    with new_directory(directory, overwrite) as new:
        save_params(new / "params", arrays)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if model.name_or_path is not None and Path(model.name_or_path).is_dir():
            copy_companions(Path(model.name_or_path), new)
        if tokenizer is not None:
            for name in hub.TOKENIZER_FILES:
                (new / name).unlink(missing_ok=True)
            tokenizer.save_pretrained(new)


def set_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The content of a config.json with its one note of the stored dtype changed (both spellings of HF are known)."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: dtype}


# Reading ----------------------------------------------------------------------------------------------------


def load_pretrained(
    cls: type[M],
    name: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> M:
    """A model of class `cls` with unstacked layers from what `hub.resolve` finds: an Orbax or an HF directory.

    A classification or QA head that the checkpoint lacks is newly initialised, a head that `cls` lacks is ignored; both
    are logged. Every other missing, left-over or misshapen tensor is an error.

    Args:
      dtype, param_dtype: of the computation and of the parameters; "auto": as stored, and `dtype="auto"` alone means
        both. Default: float32 on CPU, else as stored, but bfloat16 for float16 on TPU (logged).
      mesh: put the parameters on it, as `sharding.param_spec` says; every process reads its own shards only.
      revision, cache_dir, local_files_only: see `hub.resolve`.

    Raises:
      FileNotFoundError: no such model, or an incomplete one.
      ValueError: a bad config or checkpoint, or a dtype that is not floating point.
    """
    directory = hub.resolve(name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    config = OPTConfig.from_hf(directory)
    source = _OrbaxSource(directory) if hub.is_orbax(directory) else _HFSource(directory, config)

    expected = expected_shapes(cls, config)
    # A tied causal LM must not lose a head that is there, nor an untied one get a random head.
    may_drop = [head for head in _HEADS if not (head == "lm_head." and issubclass(cls, OPTForCausalLM))]
    found = {path: shape for path, (shape, _) in source.found.items()}
    fresh, dropped = check_parameters(
        expected, found, directory, may_lack=("score.", "qa_outputs."), may_drop=may_drop, describe=source.describe
    )
    for path in fresh:
        log.warning("%s has no %s: newly initialised. Train it before use.", directory, path)
    for path in dropped:
        log.warning("%s: %s is not used by %s", directory, path, cls.__name__)

    default = jnp.zeros(()).sharding  # honours jax.default_device
    platform = next(iter(default.device_set)).platform if mesh is None else mesh.devices.flat[0].platform
    stored = {path: dt for path, (_, dt) in source.found.items() if path in expected}
    compute, dtypes = _choose_dtypes(dtype, param_dtype, stored, platform, directory)
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), dtype=compute, param_dtype=dtypes[_EMBEDDING]))
    targets = {
        path: jax.ShapeDtypeStruct(
            shape,
            dtypes.get(path, dtypes[_EMBEDDING]),
            sharding=default if mesh is None else sharding.param_sharding(path, shape, mesh),
        )
        for path, shape in expected.items()
    }
    arrays = source.read({path: target for path, target in targets.items() if path not in fresh})
    params = named_parameters(model)
    for path in targets:
        if path not in fresh:
            params[path].set_value(arrays.pop(path))
    if fresh:
        for path, array in _initialise(cls, config, {path: targets[path] for path in fresh}).items():
            params[path].set_value(array)
    model.name_or_path = str(directory)
    return model


def expected_shapes(cls: type[OPTPreTrainedModel], config: OPTConfig) -> dict[str, Shape]:
    """Path -> shape of every parameter of the (unstacked) model, without making any."""
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    return {path: param.get_value().shape for path, param in named_parameters(model).items()}


def check_parameters(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    where: str | os.PathLike,
    *,
    may_lack=(),
    may_drop=(),
    describe: Callable[[str, Shape], tuple[str, Shape]] = lambda path, shape: (path, shape),
) -> tuple[list[str], list[str]]:
    """Compare a checkpoint's parameters with the model's: (missing ones, left-over ones), of the heads that may be.

    Args:
      may_lack, may_drop: prefixes of heads that may be missing as a whole, or left over.
      describe: our path and shape -> name and shape in the checkpoint, for messages.

    Raises:
      ValueError: a tensor is missing, left over or has another shape; the message names it.
    """
    lacking = [head for head in may_lack if not any(path.startswith(head) for path in found)]
    fresh = [path for path in expected if path not in found]
    dropped = [path for path in found if path not in expected]
    for path in fresh:
        if not path.startswith(tuple(lacking)):
            raise ValueError(f"{where}: tensor {describe(path, ())[0]} is missing, which the config calls for")
    for path in dropped:
        if not path.startswith(tuple(may_drop)):
            raise ValueError(f"{where}: tensor {describe(path, ())[0]} is left over: the config has no place for it")
    for path, shape in expected.items():
        if path not in fresh and found[path] != shape:
            (label, got), (_, want) = describe(path, found[path]), describe(path, shape)
            raise ValueError(f"{where}: tensor {label} has shape {got}, but the config calls for {want}")
    return fresh, dropped


def _choose_dtypes(
    dtype: DTypeLike | None, param_dtype: DTypeLike | None, stored: Mapping[str, np.dtype], platform: str, where: Path
) -> tuple[np.dtype, dict[str, np.dtype]]:
    """(dtype of the computation, dtype of each parameter) by the rule of `load_pretrained`."""

    def choose(asked: DTypeLike | None, stored: np.dtype) -> np.dtype:
        if asked is None and platform == "cpu":
            asked = jnp.float32
        if asked is None and platform == "tpu" and stored == jnp.float16:
            asked = jnp.bfloat16
        chosen = jnp.dtype(stored if asked is None or isinstance(asked, str) and asked == "auto" else asked)
        if chosen.name not in PARAM_DTYPES:
            raise ValueError(f"{where}: {chosen} is not a dtype for models ({', '.join(PARAM_DTYPES)})")
        return chosen

    if param_dtype is None and isinstance(dtype, str) and dtype == "auto":  # as HF's one option: all as stored
        param_dtype = dtype
    chosen = choose(dtype, stored[_EMBEDDING]), {path: choose(param_dtype, dt) for path, dt in stored.items()}
    if platform == "tpu" and stored[_EMBEDDING] == jnp.float16 and jnp.bfloat16 in (chosen[0], chosen[1][_EMBEDDING]):
        log.info("%s is stored as float16; on TPU it is used as bfloat16", where)
    return chosen


def _initialise(
    cls: type[OPTPreTrainedModel], config: OPTConfig, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Some parameters of a new model; the compiler leaves out all others."""

    def init() -> dict[str, jax.Array]:
        params = named_parameters(cls(config, rngs=nnx.Rngs(0)))
        return {path: params[path].get_value().astype(target.dtype) for path, target in targets.items()}

    return jax.jit(init, out_shardings={path: target.sharding for path, target in targets.items()})()


class _OrbaxSource:
    """The parameters in a model directory of ours; `found`: path -> (shape, dtype)."""

    def __init__(self, directory: Path):
        self.path = directory.absolute() / "params"
        with self._reading() as checkpointer:
            tree: Any = checkpointer.metadata(self.path).item_metadata
            if tree is None:  # Orbax keeps the reason to itself
                raise ValueError("its metadata are damaged or do not belong to its data")
            leaves = _flatten(tree.tree)
            self.found = {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in leaves.items()}

    @contextmanager
    def _reading(self) -> Iterator[ocp.Checkpointer]:
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                yield checkpointer
        except Exception as e:  # Orbax and TensorStore raise nearly anything for a damaged checkpoint
            raise ValueError(f"{self.path} cannot be read: {' '.join(str(e).split())}") from e

    def describe(self, path: str, shape: Shape) -> tuple[str, Shape]:
        return path, shape

    def read(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        tree = _nest(targets)
        how = jax.tree.map(
            lambda t: ocp.ArrayRestoreArgs(sharding=t.sharding, dtype=t.dtype, global_shape=t.shape), tree
        )
        with self._reading() as checkpointer:
            args = ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=True)
            return _flatten(checkpointer.restore(self.path, args=args))


class _HFSource:
    """The parameters in a Hugging Face directory; `found`: path -> (shape, dtype)."""

    def __init__(self, directory: Path, config: OPTConfig):
        from convert import hf  # the one place where the library knows a foreign format

        self.describe = hf.describe
        self.tensors = hf.open_parameters(directory, config)
        self.found = {path: (view.shape, view.dtype) for path, view in self.tensors.items()}

    def read(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        arrays = {}
        for path, target in targets.items():
            view = self.tensors[path]
            # A copy, never the mapped file itself: the file may change, and its pages cannot be donated.
            shard = lambda index, view=view, target=target: np.array(view[index], target.dtype, order="C")  # noqa: E731
            arrays[path] = jax.make_array_from_callback(target.shape, target.sharding, shard)
            self.tensors.release()
        return arrays


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
