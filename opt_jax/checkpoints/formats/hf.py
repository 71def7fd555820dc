"""Hugging Face checkpoint directories: finds the weight files and opens their tensors, lazily, under our paths."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from opt_jax.checkpoints import hub
from opt_jax.checkpoints.arrays import Checks, LazyArray, first_difference
from opt_jax.checkpoints.chunks import Index
from opt_jax.checkpoints.formats import bitsandbytes, float8, foreign, gptq, names, quantized
from opt_jax.checkpoints.formats.flax_msgpack import read_flax
from opt_jax.checkpoints.formats.mapped_files import shown
from opt_jax.checkpoints.formats.quantized import QuantizedArray
from opt_jax.checkpoints.formats.safetensors import read_safetensors
from opt_jax.checkpoints.formats.stored import locate
from opt_jax.checkpoints.formats.torch_files import read_torch
from opt_jax.checkpoints.formats.weight_files import WEIGHT_FILES, read_index
from opt_jax.checkpoints.formats.wrappers import is_metaseq, is_no_weight, note_of_prefixes, plain_names, torch_files
from opt_jax.config import OPTConfig

_KINDS = {".safetensors": "safetensors", ".bin": "torch .bin", ".msgpack": "Flax msgpack"}


def open_checkpoint(directory: Path, checks: list[Callable[[], object]] | None = None) -> dict[str, LazyArray]:
    """HF name -> tensor, for the weight file in `directory`, with all shards of an index.

    Args:
      directory: the directory.
      checks: gets the comparisons of tensors that two shards hold.

    Raises:
      FileNotFoundError: there is no weight file, or a shard that the index names is missing.
      ValueError: a damaged file, or an index that contradicts its shards.
    """
    if (first := weight_file(directory)) is None:
        if others := [path.name for path in torch_files(directory)]:
            what = f"has several files of weights ({', '.join(map(shown, others[:5]))}): name one of them"
            raise ValueError(f"{directory} {what} pytorch_model.bin, or put it and config.json into a directory")
        hint = hub.shards_hint(directory) or foreign.hint_of_directory(directory) or _hint_of_names(directory)
        if any(map(is_metaseq, sorted(directory.glob("*.pt"))[:1])):
            hint = f": it is a metaseq checkpoint; convert it with `python -m convert metaseq {directory} DST`"
        raise FileNotFoundError(f"{directory} has no weights: none of {', '.join(WEIGHT_FILES)}{hint}")
    if first.suffix != ".json":
        tensors = _read(first)
        if first.name.endswith("_model_states.pt") and not all(array.size for array in tensors.values()):
            raise ValueError(f"{first} has empty tensors{hub.ZERO_3_HINT}")
        return tensors
    weight_map = read_index(first)
    if missing := [name for name in sorted(set(weight_map.values())) if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{directory / missing[0]} is missing, but {first.name} names it")
    tensors = {}
    for file in sorted(set(weight_map.values())):
        shard = _read(directory / file)
        for name in sorted(tensors.keys() & shard.keys()):
            what = f"{directory / file}: tensor {shown(name)} is in another shard, too, with other numbers"
            if checks is not None:
                checks.append(partial(_check_same, what, tensors[name], shard[name]))
        # An old `save_pretrained` named a tied head in the index and left it out of the shard.
        needed = (n for n, named in weight_map.items() if named == file and not n.endswith("lm_head.weight"))
        if absent := sorted(n for n in needed if n not in shard):
            raise ValueError(
                f"{directory / file}: tensor {shown(absent[0])} is missing, but {first.name} says it is here"
            )
        tensors |= shard
    return tensors


def _hint_of_names(directory: Path) -> str:
    """For the end of an error message: that a file of weights has a name that is not looked for (as AutoGPTQ's)."""
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(names) == 1 and hub.quantization(directory)[1] in (None, "gptq"):
        return f": rename {shown(names[0])} to model.safetensors"
    return hub.quantization_hint(directory)


def weight_file(directory: Path) -> Path | None:
    """The weight file of the directory, or the index of its shards; None without either, or with several."""
    known = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if known is not None:
        return known
    others = torch_files(directory)
    return others[0] if len(others) == 1 else None


def weight_files(directory: Path) -> list[Path]:
    """All files that hold the weights, and the index that names them.

    Raises:
      ValueError: the index is malformed.
    """
    if (first := weight_file(directory)) is None:
        return []
    shards = sorted(set(read_index(first).values())) if first.suffix == ".json" else ()
    return [first, *(directory / name for name in shards)]


def _read(path: Path) -> dict[str, LazyArray]:
    if path.suffix == ".msgpack":
        return read_flax(path)
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    return {name: locate(path, tensors.map, view).lazy() for name, view in tensors.items()}


def open_parameters(directory: Path, config: OPTConfig) -> tuple[dict[str, LazyArray], Checks]:
    """The checkpoint's tensors under our paths and in our orientation, and checks to run before using them.

    An `lm_head.weight` that repeats the tied embedding is left out, and one without an embedding is the embedding. So
    is `decoder.version`, a number that HF's classes ignore too (`_keys_to_ignore_on_load_unexpected`).

    Returns:
      The arrays; functions that compare tensors which are stored twice, and raise ValueError if they differ, or that
      warn of what the names and the tensors hold besides the model.

    Raises:
      FileNotFoundError, ValueError: as `open_checkpoint`; or a tensor that no OPT model has.
    """
    arrays: dict[str, LazyArray] = {}
    checks: list[Callable[[], object]] = []
    stored, more = _gather_quantized(directory, config, open_checkpoint(directory, checks))
    checks += more
    try:
        plain, prefixes = plain_names(stored)
    except ValueError as e:
        raise ValueError(f"{directory}: {e}") from None
    dropped = []
    for full_name, array in stored.items():
        name = plain[full_name]
        if name in ("model.decoder.version", "decoder.version"):
            continue
        try:
            path, transposed = names.from_hf(name)
        except KeyError:
            hint = hub.quantization_hint(directory) or float8.quantized_part(name)
            if is_no_weight(name, array) and not hint:
                dropped.append(shown(full_name))
                continue
            raise ValueError(f"{directory}: tensor {shown(name)} is left over: no OPT model has it{hint}") from None
        array = array.T if transposed and not isinstance(array, QuantizedArray) else array
        if path in arrays:
            checks.append(partial(_check_same, f"{directory}: tensor {name} is there twice", arrays[path], array))
        else:
            arrays[path] = array
    _check_flax(directory, arrays, config)
    arrays = float8.cast(directory, arrays, config)
    embedding = arrays.get("model.decoder.embed_tokens.embedding")
    if config.tie_word_embeddings and "lm_head.kernel" in arrays:
        head = arrays.pop("lm_head.kernel").T
        if embedding is None:
            arrays["model.decoder.embed_tokens.embedding"] = head
        else:
            checks.append(partial(_check_tied, directory, head, embedding))
    checks += (*note_of_prefixes(directory, prefixes), *_note_of_dropped(directory, sorted(dropped)))
    return arrays, (*checks, *quantized.checks_of(arrays, directory))


def _gather_quantized(
    directory: Path, config: OPTConfig, stored: dict[str, LazyArray]
) -> tuple[dict[str, LazyArray], Checks]:
    """The tensors, with a `QuantizedArray` in place of the parts of a quantized matrix; and checks that read data."""
    _, method, settings = hub.quantization(directory)
    dtype = float8.float_dtype(config, stored, "float32")
    if method == "gptq" and any(name.endswith(".qweight") for name in stored):
        return gptq.gather(stored, settings, directory, dtype)
    if method == "bitsandbytes" and bitsandbytes.is_supported(settings):
        return bitsandbytes.gather(stored, directory, dtype), ()
    return stored, ()


def _note_of_dropped(directory: Path, dropped: list[str]) -> Checks:
    """A function that warns of the tensors that were left out; none without any."""
    more = f" and {len(dropped) - 5} more" if len(dropped) > 5 else ""
    text = f"{directory}: left out: {', '.join(dropped[:5])}{more}, which are no weights of an OPT model"
    return (partial(warnings.warn, text, stacklevel=2),) if dropped else ()


def _check_same(what: str, one: LazyArray, other: LazyArray) -> None:
    if first_difference(one, other) is not None:
        raise ValueError(what)


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
    if head.dtype != embedding.dtype:  # peft's cast head is in float32
        head, embedding = (LazyArray(x.shape, np.dtype(np.float32), _in_float32(x)) for x in (head, embedding))
    if first_difference(head, embedding) is not None:
        raise ValueError(
            f"{directory}: tensor lm_head.weight differs from model.decoder.embed_tokens.weight, though the config "
            "ties them: set tie_word_embeddings to false in config.json to keep both"
        )


def _in_float32(array: LazyArray) -> Callable[[Index], np.ndarray]:
    return lambda index: array.read(index).astype(np.float32)


def stored_as(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """A parameter's name and shape in an HF file, for messages."""
    name, transposed = names.to_hf(path)
    return name, shape[::-1] if transposed else shape


def weights_form(directory: Path) -> str:
    """The form of the directory's weights in words, such as "Hugging Face safetensors, 3 files"."""
    first = weight_file(directory)
    if first is None:
        return "no weights"
    kind = next((kind for ending, kind in _KINDS.items() if ending in first.name), f"torch {first.suffix}")
    count = len(set(read_index(first).values())) if first.suffix == ".json" else 1
    return f"Hugging Face {kind}, {count} file{'s' if count > 1 else ''}"
