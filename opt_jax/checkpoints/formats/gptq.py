"""GPTQ checkpoints in the form of AutoGPTQ and GPTQModel, read and written.

A matrix of a layer with N outputs and K inputs is stored as

  qweight: int32 [K * bits / 32, N], a stream of bits along the inputs, lowest first.
  qzeros: int32 [G, N * bits / 32], as streams along the outputs: the zeros, or in the first form the zeros minus one.
  scales: [G, N].
  g_idx: int32 [K], the group of each input.

and stands for (integer - zero of the group) * scale of the group.

In the first form ("gptq"), a zero of 0 would be stored as 2**bits - 1. Programs disagree about that number: it is read
as 0 or as 2**bits, and some carry or borrow a bit from the next zero. So it is neither read nor written. The second
form ("gptq_v2") has no such number.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.checkpoints.arrays import Checks, LazyArray
from opt_jax.checkpoints.chunks import Index
from opt_jax.checkpoints.formats import names, quantized
from opt_jax.checkpoints.formats.quantized import QuantizedArray
from opt_jax.model.packing import period, slots_of_groups
from opt_jax.system.messages import shown
from opt_jax.system.reading import json_object, read_small

BITS = (2, 3, 4, 8)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
# Fields that say how the integers were chosen, or what computes with them. The numbers are the same for all values.
_WITHOUT_EFFECT = {
    *(
        "quant_method",
        "sym",
        "meta",
        "model_name_or_path",
        "model_file_base_name",
        "tokenizer",
        "dataset",
        "batch_size",
    ),
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "act_group_aware"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize"),
    *("modules_to_not_convert", "pad_token_id", "max_input_length", "model_seqlen", "cache_block_outputs"),
    *("backend", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "inside_layer_modules"),
}
_KNOWN = {"bits", "group_size", "desc_act", "checkpoint_format", "format", "pack_dtype"}


# Reading -------------------------------------------------------------------------------------------------------


def gather(
    stored: Mapping[str, LazyArray], settings: Mapping[str, Any], where: Path, dtype: np.dtype
) -> tuple[dict[str, LazyArray], Checks]:
    """The tensors of a checkpoint, with a `QuantizedArray` X.weight [K, N] in place of X.qweight, X.scales, ...

    Args:
      stored: name in the file -> tensor.
      settings: `quantization_config`, or the content of quantize_config.json.
      where: the directory, for messages.
      dtype: of the dequantized matrices.

    Returns:
      The tensors, and checks that read all zeros, which raise ValueError.

    Raises:
      ValueError: a setting that is not supported, or a tensor that is missing or does not fit.
    """
    bits, group_size, shift = of_file = _settings(settings, where)
    older = where / "quantize_config.json"
    if older.is_file() and _settings(json_object(read_small(older), older), where) != of_file:
        raise ValueError(
            f"{where}: quantize_config.json has other bits, group_size or checkpoint_format than config.json: remove "
            "the one that is wrong"
        )
    gathered, checks = dict(stored), []
    for name in stored:
        base, _, part = name.rpartition(".")
        if part != "qweight":
            continue
        if not re.search(r"\.layers\.\d+\.", name):
            raise ValueError(f"{where}: tensor {shown(name)}: only matrices of layers are read from GPTQ's form")
        if gathered.pop(f"{base}.weight", None) is not None:
            raise ValueError(f"{where}: {shown(base)} has both qweight and weight")
        parts = {part: gathered.pop(f"{base}.{part}") for part in _PARTS if f"{base}.{part}" in gathered}
        try:
            array = _open(parts, bits, group_size, shift, bool(settings.get("desc_act")), dtype)
        except ValueError as e:
            raise ValueError(f"{where}: tensor {shown(base)}.{e}") from None
        gathered[f"{base}.weight"] = array
        if shift:
            checks.append(partial(_check_zeros, array.parts["zeros"], bits, f"{where}: tensor {shown(base)}.qzeros"))
    return gathered, tuple(checks)


def _settings(settings: Mapping[str, Any], where: Path) -> tuple[int, int, int]:
    """(bits, group size, what is added to stored zeros)."""

    def refuse(name: str, hint: str) -> ValueError:
        return ValueError(f"{where}: GPTQ with {name}={shown(settings.get(name), 60)} is not supported: {hint}")

    bits, group_size = settings.get("bits"), settings.get("group_size")
    if type(bits) is not int or bits not in BITS:
        raise refuse("bits", f"{', '.join(map(str, BITS))} are")
    if type(group_size) is not int or not (group_size == -1 or group_size >= 1):
        raise refuse("group_size", "it must be -1 (one group) or a number of inputs")
    if settings.get("pack_dtype") not in (None, "int32", "torch.int32"):
        raise refuse("pack_dtype", "int32 is")
    name = "checkpoint_format" if settings.get("checkpoint_format") is not None else "format"
    form = settings.get(name)
    if form not in (None, "gptq", "gptq_v2"):
        raise refuse(name, "save it as gptq or gptq_v2 with the program that made it")
    if settings.get("format") not in (None, form):
        raise refuse("format", f"checkpoint_format says {form}")
    if type(settings.get("desc_act", False)) is not bool:
        raise refuse("desc_act", "it must be true or false")
    for field, value in settings.items():
        if field not in _KNOWN | _WITHOUT_EFFECT and value not in (None, False, {}, [], ""):
            raise refuse(field, "it may change the numbers; take the model that was quantized")
    return bits, group_size, 0 if form == "gptq_v2" else 1


def _open(
    parts: Mapping[str, LazyArray], bits: int, group_size: int, shift: int, desc_act: bool, dtype: np.dtype
) -> QuantizedArray:
    qweight = _of_dtype(parts, "qweight", ("int32",), 2)
    words, outputs = qweight.shape
    inputs = words * 32 // bits
    if inputs * bits != words * 32 or not inputs * outputs:
        raise ValueError(f"qweight has shape {qweight.shape}, which integers of {bits} bits do not fill")
    size = inputs if group_size == -1 else group_size
    count = -(-inputs // size)
    scales = _of_dtype(parts, "scales", quantized.SCALES, 2)
    qzeros = _of_dtype(parts, "qzeros", ("int32",), 2)
    if scales.shape != (count, outputs):
        what = f"{count} groups of {size} inputs and {outputs} outputs"
        raise ValueError(f"scales has shape {scales.shape}, but bits={bits} and group_size={group_size} say {what}")
    if qzeros.shape[0] != count or qzeros.shape[1] * 32 != outputs * bits:
        raise ValueError(f"qzeros has shape {qzeros.shape}, which {outputs} integers of {bits} bits do not fill")
    if "g_idx" not in parts:
        if desc_act:
            raise ValueError("g_idx is missing, which desc_act=True calls for")
        groups = np.arange(inputs) // size
    else:
        g_idx = _of_dtype(parts, "g_idx", ("int32", "int64"), 1)
        if g_idx.shape != (inputs,):
            raise ValueError(f"g_idx has shape {g_idx.shape}, but qweight has {inputs} inputs of {bits} bits")
        groups = g_idx.load()
        if groups.min() < 0 or groups.max() >= count:
            raise ValueError(f"g_idx has groups from {groups.min()} to {groups.max()}, but there are {count}")
        if (largest := np.bincount(groups).max()) > size:
            raise ValueError(f"g_idx puts {largest} inputs into a group, more than the {size} of group_size")
    order, slots = slots_of_groups(groups, count, bits)
    zeros = _zeros(qzeros, outputs, bits, shift)
    if order is None:
        read = lambda index: qweight.load(index).view(np.uint32)  # noqa: E731
        packed = {"qweight": LazyArray(qweight.shape, np.dtype(np.uint32), read, qweight.chunk)}
    else:
        packed = {
            "qweight": quantized.rearranged(qweight, order, bits, (zeros, slots)),
            "order": LazyArray(order.shape, order.dtype, order.__getitem__),
        }
    integers = quantized.Integers(qweight, np.arange(inputs), groups, bits, scales, zeros)
    parts = packed | {"scales": scales, "zeros": zeros}
    return quantized.packed(parts, inputs, bits, dtype, order=order, integers=integers)


def _of_dtype(parts: Mapping[str, LazyArray], name: str, dtypes: Iterable[str], rank: int) -> LazyArray:
    if name not in parts:
        raise ValueError(f"{name} is missing")
    array = parts[name]
    if array.dtype.name not in dtypes or len(array.shape) != rank:
        raise ValueError(f"{name} is {array.dtype.name} {array.shape}, not {' or '.join(dtypes)} of rank {rank}")
    return array


def _zeros(qzeros: LazyArray, outputs: int, bits: int, shift: int) -> LazyArray:
    """The zeros, uint8 [G, N]."""

    def read(index: Index) -> np.ndarray:
        rows, columns = index
        first = columns.start * bits // 32
        words = qzeros.load((rows, slice(first, -(-columns.stop * bits // 32)))).view(np.uint32)
        starts = np.arange(columns.start, columns.stop) * bits - first * 32
        return quantized.unpack(words.T, starts, bits).T + np.uint8(shift)

    shape = qzeros.shape[0], outputs
    return LazyArray(shape, np.dtype(np.uint8), read, qzeros.chunk and shape)


def _check_zeros(zeros: LazyArray, bits: int, what: str) -> None:
    for part in quantized.pieces(zeros):
        if (part == (2**bits) % 256).any():
            raise ValueError(
                f"{what} holds {2**bits - 1}, which programs read as a zero of 0 or of {2**bits}: save the model as "
                "gptq_v2 with the program that made it"
            )


# Writing -------------------------------------------------------------------------------------------------------


class Writer:
    """Writes the quantized matrices of a model as tensors of GPTQ's form.

    Args:
      arrays: the model's parameters, path -> array.
      recipe: what made the integers. Fields of GPTQ's own settings are written again.

    Attributes:
      settings: `quantization_config` of the config.json.

    Raises:
      ValueError: the form cannot hold the matrices.
    """

    def __init__(self, arrays: Mapping[str, LazyArray], recipe: Any = None) -> None:
        matrices = quantized.quantized_of(arrays)
        for path, array in matrices.items():
            _check_form(path, array)
        first = next(iter(matrices.values()))
        if any(array.bits != first.bits for array in matrices.values()):
            raise _no_form("its matrices have integers of different bits")
        layers = {re.sub(r"\.layers\.\d+\.", ".layers.*.", path) for path in matrices}
        total = len({path.split(".")[3] for path in arrays if ".layers." in path})
        if len(matrices) != len(layers) * total:
            raise _no_form("some matrices are quantized in a part of the layers only")
        self._groups = {path: _groups_of(array) for path, array in matrices.items()}
        sizes = {
            int(np.bincount(g).max()) for path, g in self._groups.items() if matrices[path].parts["scales"].shape[0] > 1
        }
        one_group = [array.shape[0] for array in matrices.values() if array.parts["scales"].shape[0] == 1]
        size = next(iter(sizes), -1)
        if len(sizes) > 1 or size > 0 and any(inputs > size for inputs in one_group):
            raise _no_form("its matrices have groups of different sizes")
        smallest, largest = _extremes(matrices.values())
        if largest > 2**first.bits - 1:
            raise _no_form(f"a zero is {largest}, which {first.bits} bits cannot hold")
        before = recipe if isinstance(recipe, Mapping) and recipe.get("quant_method") == "gptq" else {}
        second_form = smallest == 0 or "gptq_v2" in (before.get("checkpoint_format"), before.get("format"))
        self._shift = 0 if second_form else 1
        self._matrices = matrices
        self.settings = {name: value for name, value in before.items() if name in _WITHOUT_EFFECT} | {
            "quant_method": "gptq",
            "bits": first.bits,
            "group_size": size,
            "desc_act": any(_is_act_order(groups, size) for groups in self._groups.values()),
            "sym": smallest == largest == 2 ** (first.bits - 1),
            "lm_head": False,
            "checkpoint_format": "gptq" if self._shift else "gptq_v2",
            "pack_dtype": "int32",
        }
        if len(layers) < len([name for name in names.TABLE if re.search(r"layers\..*\.kernel$", name)]):
            modules = sorted(path.partition(".*.")[2].removesuffix(".kernel") for path in layers)
            self.settings["modules_in_block_to_quantize"] = [modules]

    def tensors(self, path: str) -> dict[str, LazyArray]:
        """The tensors of the matrix at `path`, by the last part of their names."""
        array, groups = self._matrices[path], self._groups[path].astype(np.int32)
        qweight = array.parts["qweight"]
        if array.order is not None:
            places = quantized.slots_of_inputs(array.order, len(groups))
            qweight = quantized.rearranged(qweight, places, array.bits)
        words = LazyArray(
            qweight.shape, np.dtype(np.int32), lambda index: qweight.load(index).view(np.int32), qweight.chunk
        )
        scales, zeros = array.parts["scales"], array.parts["zeros"]
        return {
            "qweight": words,
            "qzeros": _qzeros(zeros, array.bits, self._shift),
            "scales": _in_float16(scales) if _fits_float16(scales) else scales,
            "g_idx": LazyArray(groups.shape, groups.dtype, groups.__getitem__),
        }


def writer(arrays: Mapping[str, LazyArray], source: Any) -> Writer | None:
    """A writer for the quantized arrays of a model, if there are any. source: see `quantized.settings_of`."""
    settings = quantized.settings_for(arrays, source)
    return None if settings is None else Writer(arrays, settings["recipe"])


def _no_form(why: str) -> ValueError:
    return ValueError(f"GPTQ's form cannot hold this model ({why}): write an Orbax directory, or dequantize it")


def _check_form(path: str, array: QuantizedArray) -> None:
    name = names.to_hf(path)[0].removesuffix(".weight")
    if not array.is_packed or ".layers." not in path:
        raise _no_form(
            f"{name} is int8 with a scale for each output" if not array.is_packed else f"{name} is quantized"
        )
    if array.bits not in BITS:
        raise _no_form(f"{name} has integers of {array.bits} bits; the form has {', '.join(map(str, BITS))}")
    if array.activation_bits is not None:
        raise _no_form(f"{name} rounds its inputs to {array.activation_bits} bits, which the form cannot say")
    for size in array.shape:
        if size * array.bits % 32:
            shape = f"{array.shape[1]} x {array.shape[0]}"
            raise _no_form(f"{name} is {shape}, and {size} integers of {array.bits} bits do not fill words of 32 bits")


def _groups_of(array: QuantizedArray) -> np.ndarray:
    """The group of each input."""
    slots = array.parts["qweight"].shape[0] * 32 // array.bits
    return quantized.slots_of_inputs(array.order, array.shape[0]) // (slots // array.parts["scales"].shape[0])


def _group_size(all_groups: Iterable[np.ndarray]) -> int:
    """The group size of matrices with these groups of inputs; -1 if each has one group only."""
    sizes = [np.bincount(groups) for groups in all_groups]
    of_many = {int(count.max()) for count in sizes if len(count) > 1}
    size = next(iter(of_many), -1)
    if len(of_many) > 1 or size > 0 and any(len(count) != -(-count.sum() // size) for count in sizes):
        raise _no_form("its matrices have groups of different sizes")
    return size


def _is_act_order(groups: np.ndarray, size: int) -> bool:
    return not np.array_equal(groups, np.arange(len(groups)) // (len(groups) if size == -1 else size))


def _extremes(matrices: Iterable[QuantizedArray]) -> tuple[int, int]:
    """The smallest and the largest zero."""
    parts = (part for array in matrices for part in quantized.pieces(array.parts["zeros"]))
    extremes = [(int(part.min()), int(part.max())) for part in parts]
    return min(low for low, _ in extremes), max(high for _, high in extremes)


def _qzeros(zeros: LazyArray, bits: int, shift: int) -> LazyArray:
    per_period = period(bits) * bits // 32

    def read(index: Index) -> np.ndarray:
        rows, columns = index
        first, last = columns.start // per_period, -(-columns.stop // per_period)
        inside = slice(first * period(bits), last * period(bits))
        words = quantized.pack(zeros.load((rows, inside)).T - np.uint8(shift), bits).T.view(np.int32)
        return words[:, columns.start - first * per_period : columns.stop - first * per_period]

    shape = zeros.shape[0], zeros.shape[1] * bits // 32
    return LazyArray(shape, np.dtype(np.int32), read, zeros.chunk and shape)


def _fits_float16(scales: LazyArray) -> bool:
    with np.errstate(over="ignore"):
        return all((part.astype(np.float16) == part.astype(np.float32)).all() for part in quantized.pieces(scales))


def _in_float16(scales: LazyArray) -> LazyArray:
    half = np.dtype(np.float16)
    return LazyArray(scales.shape, half, lambda index: scales.read(index).astype(half), scales.chunk)
