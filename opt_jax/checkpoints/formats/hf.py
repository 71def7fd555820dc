"""Hugging Face checkpoint directories: finds the weight files and opens their tensors, lazily, under our paths."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from opt_jax.checkpoints import hub
from opt_jax.checkpoints.arrays import Checks, LazyArray, first_difference
from opt_jax.checkpoints.download import WEIGHT_FILES, read_index
from opt_jax.checkpoints.formats import float8, foreign, names
from opt_jax.checkpoints.formats.flax_msgpack import read_flax
from opt_jax.checkpoints.formats.mapped_files import shown
from opt_jax.checkpoints.formats.safetensors import read_safetensors
from opt_jax.checkpoints.formats.stored import locate
from opt_jax.checkpoints.formats.torch_files import read_torch
from opt_jax.config import OPTConfig

_KINDS = {".safetensors": "safetensors", ".bin": "torch .bin", ".msgpack": "Flax msgpack"}


def open_checkpoint(directory: Path) -> dict[str, LazyArray]:
    """HF name -> tensor, for the first of WEIGHT_FILES that is in `directory`, with all shards of an index.

    Raises:
      FileNotFoundError: there is no weight file, or a shard that the index names is missing.
      ValueError: a damaged file, or an index that contradicts its shards.
    """
    if (first := weight_file(directory)) is None:
        hint = foreign.hint_of_directory(directory) or hub.quantization_hint(directory)
        raise FileNotFoundError(f"{directory} has no weights: none of {', '.join(WEIGHT_FILES)}{hint}")
    if first.suffix != ".json":
        return _read(first)
    weight_map = read_index(first)
    if missing := [name for name in sorted(set(weight_map.values())) if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{directory / missing[0]} is missing, but {first.name} names it")
    tensors: dict[str, LazyArray] = {}
    for name in sorted(set(weight_map.values())):
        shard = _read(directory / name)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{directory / name}: tensor {shown(twice[0])} is in another shard, too")
        if absent := sorted(n for n, file in weight_map.items() if file == name and n not in shard):
            raise ValueError(
                f"{directory / name}: tensor {shown(absent[0])} is missing, but {first.name} says it is here"
            )
        tensors |= shard
    return tensors


def weight_file(directory: Path) -> Path | None:
    """The weight file of the directory, or the index of its shards; None without either."""
    return next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)


def _read(path: Path) -> dict[str, LazyArray]:
    if path.suffix == ".msgpack":
        return read_flax(path)
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    return {name: locate(path, tensors.map, view).lazy() for name, view in tensors.items()}


def open_parameters(directory: Path, config: OPTConfig) -> tuple[dict[str, LazyArray], Checks]:
    """The checkpoint's tensors under our paths and in our orientation, and comparisons to run before using them.

    An `lm_head.weight` that repeats the tied embedding is left out. So is `decoder.version`, a number that HF's classes
    ignore too (`_keys_to_ignore_on_load_unexpected`).

    Returns:
      The arrays; functions that compare tensors which are stored twice, and raise ValueError if they differ.

    Raises:
      FileNotFoundError, ValueError: as `open_checkpoint`; or a tensor that no OPT model has.
    """
    arrays: dict[str, LazyArray] = {}
    for name, array in open_checkpoint(directory).items():
        if name in ("model.decoder.version", "decoder.version"):
            continue
        try:
            path, transposed = names.from_hf(name)
        except KeyError:
            what = f"tensor {shown(name)} is left over: no OPT model has it"
            hint = hub.quantization_hint(directory) or float8.quantized_part(name)
            raise ValueError(f"{directory}: {what}{hint}") from None
        if path in arrays:
            raise ValueError(f"{directory}: tensor {name} is there twice, with and without 'model.' in front")
        arrays[path] = array.T if transposed else array
    _check_flax(directory, arrays, config)
    arrays = float8.cast(directory, arrays, config)
    embedding, checks = arrays.get("model.decoder.embed_tokens.embedding"), []
    if config.tie_word_embeddings and "lm_head.kernel" in arrays and embedding is not None:
        checks.append(partial(_check_tied, directory, arrays.pop("lm_head.kernel").T, embedding))
    return arrays, tuple(checks)


def _check_flax(directory: Path, arrays: Mapping[str, LazyArray], config: OPTConfig) -> None:
    first, norm = weight_file(directory), "model.decoder.final_layer_norm.scale"
    if first is None or ".msgpack" not in first.name or norm in arrays:
        return
    if config.has_final_layer_norm and config.layer_norm_elementwise_affine:
        raise ValueError(
            f"{first}: model/decoder/final_layer_norm is missing, as in the Flax files of facebook/opt-13b: convert "
            "from the PyTorch files of the same model (pytorch_model*.bin)"
        )


def _check_tied(directory: Path, head: LazyArray, embedding: LazyArray) -> None:
    if first_difference(head, embedding) is not None:
        raise ValueError(
            f"{directory}: tensor lm_head.weight differs from model.decoder.embed_tokens.weight, though the config "
            "ties them: set tie_word_embeddings to false in config.json to keep both"
        )


def stored_as(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """A parameter's name and shape in an HF file, for messages."""
    name, transposed = names.to_hf(path)
    return name, shape[::-1] if transposed else shape


def weights_form(directory: Path) -> str:
    """The form of the directory's weights in words, such as "Hugging Face safetensors, 3 files"."""
    first = weight_file(directory)
    if first is None:
        return "no weights"
    kind = next(kind for ending, kind in _KINDS.items() if ending in first.name)
    count = len(set(read_index(first).values())) if first.suffix == ".json" else 1
    return f"Hugging Face {kind}, {count} file{'s' if count > 1 else ''}"
