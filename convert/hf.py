"""Hugging Face checkpoint directories: finds the weight files and presents their tensors under our paths, lazily."""

import json
from pathlib import Path

import numpy as np

from convert import names
from convert.torch_files import Tensors, read_safetensors, read_torch
from opt_jax.config import OPTConfig

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


def open_checkpoint(directory: Path) -> Tensors:
    """All tensors of the first of WEIGHT_FILES that is in `directory`, shards joined: HF name -> memory-mapped view.

    Raises:
      FileNotFoundError: there is no weight file, or a shard that the index names is missing.
      ValueError: a damaged file, or an index that contradicts its shards.
    """
    found = [directory / name for name in WEIGHT_FILES if (directory / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{directory} has no weights: none of {', '.join(WEIGHT_FILES)}")
    if found[0].suffix != ".json":
        return _read(found[0])
    index = found[0]
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in files):
            raise ValueError("it names files outside its directory")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index} is not an index of weight files: {e}") from None
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{directory / missing[0]} is missing, but {index.name} names it")
    tensors = Tensors()
    for name in files:
        shard = _read(directory / name)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{directory / name}: tensor {twice[0]} is in another shard, too")
        if absent := sorted(n for n, file in weight_map.items() if file == name and n not in shard):
            raise ValueError(f"{directory / name}: tensor {absent[0]} is missing, but {index.name} says it is here")
        tensors.update(shard)
        tensors.maps += shard.maps
    return tensors


def _read(path: Path) -> Tensors:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def open_parameters(directory: Path, config: OPTConfig) -> Tensors:
    """The checkpoint's tensors under our paths and in our orientation (kernels are transposed views).

    An `lm_head.weight` that repeats the tied embedding is left out, after comparing the two bit by bit.

    Raises:
      FileNotFoundError, ValueError: as `open_checkpoint`; a tensor no OPT model has; a tied head that differs.
    """
    source, tensors = open_checkpoint(directory), Tensors()
    tensors.maps = source.maps
    for name, array in source.items():
        try:
            path, transposed = names.from_hf(name)
        except KeyError:
            raise ValueError(f"{directory}: tensor {name} is left over: no OPT model has it") from None
        if path in tensors:
            raise ValueError(f"{directory}: tensor {name} is there twice, with and without 'model.' in front")
        tensors[path] = array.T if transposed else array
    embedding = tensors.get("model.decoder.embed_tokens.embedding")
    if config.tie_word_embeddings and "lm_head.kernel" in tensors and embedding is not None:
        if not _equal(tensors.pop("lm_head.kernel").T, embedding):
            raise ValueError(
                f"{directory}: tensor lm_head.weight differs from model.decoder.embed_tokens.weight, though the config "
                "ties them: set tie_word_embeddings to false in config.json to keep both"
            )
        tensors.release()
    return tensors


def _equal(a: np.ndarray, b: np.ndarray, rows: int = 4096) -> bool:
    """Bit by bit (a NaN equals itself), some rows at a time."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(a[i : i + rows].tobytes() == b[i : i + rows].tobytes() for i in range(0, len(a), rows))


def describe(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """A parameter's name and shape as they are in an HF file, for messages."""
    name, transposed = names.to_hf(path)
    return name, shape[::-1] if transposed else shape
