"""A summary of what a checkpoint holds, and the comparison of two checkpoints."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from opt_jax.checkpoints.arrays import LazyArray, first_difference
from opt_jax.checkpoints.formats import hf
from opt_jax.checkpoints.formats.quantized import QuantizedArray
from opt_jax.config import OPTConfig

from .checkpoint import Checkpoint

# Besides equal tensors, equal models have these fields equal. Dropout rates may differ.
_COMPARED = [
    field.name
    for field in dataclasses.fields(OPTConfig)
    if "drop" not in field.name and field.name not in ("extra", "init_std")
]
_SHOWN = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_dim",
    "word_embed_proj_dim",
    "vocab_size",
    "max_position_embeddings",
    "activation_function",
    "do_layer_norm_before",
    "_remove_final_layer_norm",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "tie_word_embeddings",
)


def summary(opened: Checkpoint) -> Iterator[str]:
    """Lines of text: format, class, config, totals, and each tensor with its HF name. No data is read."""
    yield f"{opened.where}: {opened.format}"
    yield f"class: {opened.raw_config['architectures'][0]}"
    yield "config: " + ", ".join(f"{name}={getattr(opened.config, name)}" for name in _SHOWN)
    dtypes = Counter(_dtype(array) for array in opened.arrays.values())
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    yield f"{len(opened.arrays)} tensors ({kinds}), {opened.parameters:,} parameters, {opened.nbytes:,} bytes"
    for name, (dtype, shape, nbytes) in _tensors(opened).items():
        yield f"  {name:<55} {dtype:<9} {shape:<15} {nbytes:>14,}"


def _dtype(array: LazyArray) -> str:
    return f"{array.bits}-bit" if isinstance(array, QuantizedArray) else array.dtype.name


def _tensors(opened: Checkpoint) -> dict[str, tuple[str, str, int]]:
    """HF name -> dtype, shape and bytes. Equal neighbouring layers are one, as `layers.0-11`, with the bytes of all."""
    others: dict[str, tuple[str, str, int]] = {}
    layers: dict[int, dict[str, tuple[str, str, int]]] = {}
    prefix = ""
    for path, array in opened.arrays.items():
        name, shape = hf.stored_as(path, array.shape)
        entry = _dtype(array), "x".join(map(str, shape)), array.nbytes
        if match := re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", name):
            prefix = match[1]
            layers.setdefault(int(match[2]), {})[match[3]] = entry
        else:
            others[name] = entry
    grouped = dict(sorted(others.items()))
    numbers = sorted(layers)
    while numbers:
        first = numbers[0]
        count = next((i for i, n in enumerate(numbers) if n != first + i or layers[n] != layers[first]), len(numbers))
        label = str(first) if count == 1 else f"{first}-{first + count - 1}"
        for rest, (dtype, shape, nbytes) in sorted(layers[first].items()):
            grouped[f"{prefix}{label}{rest}"] = dtype, shape, nbytes * count
        numbers = numbers[count:]
    return grouped


def compare(ours: Checkpoint, theirs: Checkpoint, progress: Callable[[str, int], None]) -> str | None:
    """The first difference between two checkpoints as a line of text, or None.

    Compares the class, the config, and names, shapes, dtypes and every bit of the tensors.

    Args:
      progress: called after each tensor with its path and its size in bytes.
    """
    a, b = (opened.raw_config["architectures"][0] for opened in (ours, theirs))
    if a != b:
        return f"class: {a} in {ours.where}, but {b} in {theirs.where}"
    for name in _COMPARED:
        a, b = getattr(ours.config, name), getattr(theirs.config, name)
        if a != b:
            return f"config: {name} is {a} in {ours.where}, but {b} in {theirs.where}"
    for path in [*theirs.arrays, *ours.arrays]:
        for one, other in ((ours, theirs), (theirs, ours)):
            if path not in one.arrays:
                return f"tensor {hf.stored_as(path, ())[0]} of {other.where} is not in {one.where}"
    for path, b in theirs.arrays.items():
        a, (name, transposed) = ours.arrays[path], hf.names.to_hf(path)
        if isinstance(a, QuantizedArray) and isinstance(b, QuantizedArray):
            if part := _different_part(a, b):
                return f"tensor {name} is quantized to other {part} in {ours.where} than in {theirs.where}"
            progress(path, b.nbytes)
            continue
        if isinstance(a, QuantizedArray) or isinstance(b, QuantizedArray):
            return f"tensor {name} is {_dtype(a)} in {ours.where}, but {_dtype(b)} in {theirs.where}"
        if a.dtype != b.dtype or a.shape != b.shape:
            (_, left), (_, right) = hf.stored_as(path, a.shape), hf.stored_as(path, b.shape)
            what = f"{a.dtype.name} {left} in {ours.where}, but {b.dtype.name} {right} in {theirs.where}"
            return f"tensor {name} is {what}"
        where = first_difference(a, b)
        if where is not None:
            element = tuple(slice(i, i + 1) for i in where)
            left, right = (_shown(x.load(element)) for x in (a, b))
            index = list(where[::-1] if transposed else where)
            return f"tensor {name} at {index} is {left} in {ours.where}, but {right} in {theirs.where}"
        progress(path, b.nbytes)
    return None


def _different_part(a: QuantizedArray, b: QuantizedArray) -> str | None:
    """The name of the first part that differs."""
    if (a.shape, a.bits, a.activation_bits) != (b.shape, b.bits, b.activation_bits):
        return "shapes or bits"
    left, right = a.comparable(), b.comparable()
    if left.keys() != right.keys():
        return "parts"
    return next((name for name in left if first_difference(left[name], right[name]) is not None), None)


def _shown(number: np.ndarray) -> str:
    """The number as text. NaN is shown with its bits, because NaNs may differ in them."""
    value = number.item()
    return f"{value} (0x{number.tobytes()[::-1].hex()})" if value != value else repr(value)
