"""Writes models as directories: Orbax, Hugging Face's form, or a PEFT adapter. `pretrained.py` reads them."""

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from opt_jax.checkpoints import hf_scripts, hub, quantized_layers
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.directories import check_space, new_directory
from opt_jax.checkpoints.formats import gptq, hf_writer, names, peft, quantized
from opt_jax.checkpoints.orbax import write_arrays
from opt_jax.model.heads import OPTPreTrainedModel, named_parameters
from opt_jax.model.lora import LoRA, is_trained
from opt_jax.parallel.agreement import on_first_process
from opt_jax.system.disk import write_content
from opt_jax.system.reading import read_small


def read_companions(sources: Iterable[Path]) -> dict[str, bytes]:
    """Name -> content of the tokenizer's files and generation_config.json; of two `sources` the earlier one counts."""
    contents: dict[str, bytes] = {}
    for source in sources:
        for name in hub.COMPANION_FILES:
            if name not in contents and (source / name).is_file():
                contents[name] = read_small(source / name)
    return contents


def copy_companions(sources: Iterable[Path], destination: Path) -> None:
    for name, content in read_companions(sources).items():
        write_content(destination / name, content)


def save_pretrained(
    model: OPTPreTrainedModel,
    directory: str | os.PathLike,
    *,
    overwrite: bool = False,
    tokenizer: Any = None,
    safe_serialization: bool = False,
    max_shard_size: int | str | None = None,
    **foreign: Any,
) -> None:
    """Write the model, stacked or not, to a self-contained directory that `load_pretrained` reads.

    `directory` appears complete or not at all. Parameters keep their dtype. Quantized matrices stay integers; in the
    form of Hugging Face they are those of a GPTQ checkpoint. In a `jax.distributed` job all processes must call this
    together, with a directory that they share. Each writes its part. Of a model with an adapter that was kept apart
    (`merge_adapter=False`), only the adapter is written, in PEFT's form.

    Args:
      model: the model.
      directory: where to write; an Orbax directory may be in an object store.
      overwrite: replace an existing model directory.
      tokenizer: an `OPTTokenizer` to save with the model; default: the files of the directory that the model was loaded
        from.
      safe_serialization: True: in the form of Hugging Face, safetensors, which `transformers` reads. False: Orbax.
      max_shard_size: of the tensors in one safetensors file: bytes, or "500MB", "5GB" (the default), "5GiB".
      **foreign: none; the error for an argument of `transformers` says what to write instead.

    Raises:
      FileExistsError: `directory` exists (see `overwrite`), or is not a model directory.
      ValueError: the model is abstract (`nnx.eval_shape`), or has integers that are no quantized matrices, or (with
        `safe_serialization`) that GPTQ's form cannot hold; `safe_serialization` in a job of several processes; an
        argument without effect; or see `hub.check_array_path`.
    """
    for name in hf_scripts.known("save_pretrained", foreign, hf_scripts.SAVING):
        raise hf_scripts.unknown_argument("save_pretrained", name, inspect.signature(save_pretrained).parameters)
    if max_shard_size is not None and not safe_serialization:
        raise ValueError("max_shard_size without effect: pass safe_serialization=True as well")
    limit = hf_writer.parse_size(max_shard_size or "5GB")
    if safe_serialization and jax.process_count() > 1:
        raise ValueError("a job writes Orbax directories: leave safe_serialization out, then `opt-jax convert to-hf`")
    hub.disk_path(directory) if safe_serialization else hub.check_array_path(directory)
    if (lora := getattr(model, "lora", None)) is not None:  # see `load_pretrained`
        return _save_adapter(model, lora, directory, overwrite, tokenizer)
    cls, arrays, integers = type(model).__name__, _arrays_of(model), quantized_layers.settings(model)
    dtype = str(arrays.get(names.EMBEDDING, arrays[names.POSITIONS]).dtype)  # the embedding may be int8
    config = set_dtype(quantized.with_settings(model.config.to_hf() | {"architectures": [cls]}, integers), dtype)
    companions: dict[str, bytes] = {}

    def read_small_files() -> None:
        if model.name_or_path is not None and hub.as_path(model.name_or_path).is_dir():
            companions.update(read_companions(hub.companion_directories(model.name_or_path)))
        if model.generation_config_json is not None:
            companions["generation_config.json"] = model.generation_config_json.encode()
        if tokenizer is not None:
            for name in hub.TOKENIZER_FILES:
                companions.pop(name, None)
            with TemporaryDirectory() as files:
                tokenizer.save_pretrained(Path(files))
                companions.update(read_companions([Path(files)]))

    def write_small_files(new: Path) -> None:
        for name, content in companions.items():
            write_content(new / name, content)
        hf_writer.write_json(new / "config.json", config)

    on_first_process(read_small_files)  # before `new_directory`, which in a bucket removes the old model first
    if safe_serialization:
        lazy = quantized.gather(cast(dict[str, LazyArray], arrays), Path(directory), model.config, integers)
        form = gptq.writer(lazy, integers)
        config = quantized.with_settings(config, form and form.settings)
        files = hf_writer.plan_files(cls, lazy, limit, form)
        with new_directory(directory, overwrite, hub.is_model) as new:
            check_space(new, sum(file.nbytes for file in files))
            hf_writer.FileWriter().write_all(new, files)
            write_small_files(new)
            hf_writer.write_descriptions(new, cls, model.config, files)
            hf_writer.check_written(new, files)
    else:
        with new_directory(directory, overwrite) as new:
            write_arrays(new / "params", arrays)
            on_first_process(lambda: write_small_files(new))


def _arrays_of(model: OPTPreTrainedModel) -> dict[str, LazyArray | jax.Array]:
    """The arrays to write, one for each layer and parameter."""
    arrays: dict[str, LazyArray | jax.Array] = {}
    integers = quantized_layers.parameters_of(model)
    for path, param in named_parameters(model).items():
        value = param.get_value()
        if not isinstance(value, jax.Array):
            raise ValueError(f"cannot save parameter {path}: it is not an array, but abstract")
        if not jnp.issubdtype(value.dtype, jnp.floating) and path not in integers:
            raise ValueError(f"cannot save parameter {path}: it is {value.dtype}; save the model that was quantized")
        if re.search(r"\.layers\.\D", path):  # stacked layers are written one by one
            for i in range(value.shape[0]):
                arrays[path.replace(".layers.", f".layers.{i}.")] = _lazy(value, i)
        else:
            arrays[path] = _lazy(value)
    return arrays


def _save_adapter(
    model: OPTPreTrainedModel, lora: LoRA, directory: str | os.PathLike, overwrite: bool, tokenizer: Any
) -> None:
    if tokenizer is not None:
        raise ValueError("of a model with an adapter only that is saved, without a tokenizer: leave out tokenizer=")
    trained = {path: param.get_value() for path, param in named_parameters(model).items() if is_trained(path)}
    with new_directory(directory, overwrite) as new:
        write_adapter(new, trained, lora, model.name_or_path, type(model).__name__)


def write_adapter(
    directory: str | os.PathLike, parameters: Mapping[str, jax.Array], lora: LoRA, base: str | None, cls: str
) -> None:
    """Write an adapter that PEFT loads; see `peft.adapter_files`. All processes of a job call this together."""
    values = {
        path: np.asarray(array) if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
        for path, array in parameters.items()
    }

    def write() -> None:
        path = hub.as_path(directory)
        path.mkdir(parents=True, exist_ok=True)
        for name, content in peft.adapter_files(values, lora, base, cls).items():
            write_content(path / name, content)

    on_first_process(write)


def _lazy(value: jax.Array, *layer: int) -> LazyArray | jax.Array:
    """The array, or one layer of it, as an array that is read in parts.

    (`dynamic_slice` compiles once for all indices and leaves no copy on the host.) An array that is sharded over
    several processes stays a `jax.Array`: each process can read its own shards only, and Orbax writes those.
    """
    if not value.is_fully_addressable:
        return jax.lax.dynamic_index_in_dim(value, layer[0], keepdims=False) if layer else value

    def read(index: tuple[slice, ...]) -> np.ndarray:
        sizes = [1] * len(layer) + [s.stop - s.start for s in index]
        part = jax.lax.dynamic_slice(value, [*layer, *(s.start for s in index)], sizes)
        return np.asarray(part)[(0,) * len(layer)]

    return LazyArray(value.shape[len(layer) :], value.dtype, read)


def set_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The content of a config.json with another stored dtype, under the key that it has: `dtype` or `torch_dtype`."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: dtype}
