"""Parameters of floats that are stored as integers, lazily.

Their parts have the names and shapes that the parameters of `PackedLinear` (model/packed.py) and of `Int8Linear` and
`Int8Embed` (model/quantization.py) have, so an Orbax directory holds these modules as they are. `settings` is what
config.json says of them, under `quantization_config`:

  quant_method: "opt-jax".
  format: 1.
  bits: of all matrices, or a dict path -> bits.
  activation_bits: of the inputs of all matrices, null, or a dict path -> bits (see `PackedLinear`).
  recipe: what made the integers, a dict; null if that is not known.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.checkpoints import chunks
from opt_jax.checkpoints.arrays import Checks, LazyArray
from opt_jax.checkpoints.chunks import Index, Shape
from opt_jax.checkpoints.formats import names
from opt_jax.checkpoints.formats.float8 import float_dtype
from opt_jax.config import OPTConfig
from opt_jax.model.packing import period
from opt_jax.system.messages import shown

METHOD = "opt-jax"
_FORMAT = 1
_PACKED, _INT8 = ("qweight", "scales", "zeros", "order"), ("weight", "scale")
SCALES = ("float16", "bfloat16", "float32")
_BLOCK = 1 << 20  # integers that are unpacked at once, as 4 bytes each


@dataclass(frozen=True, kw_only=True)
class QuantizedArray(LazyArray):
    """A kernel or a table of embeddings that is stored as integers. `read` returns it dequantized, in `dtype`.

    Attributes:
      parts: name of a parameter of the module that computes with the integers -> the array.
      floats: as `read`, for any dtype.
      bits: of the integers.
      activation_bits: see `PackedLinear`.
      order: the values of the part `order`, if there is one.
    """

    parts: Mapping[str, LazyArray]
    floats: Callable[[Index, np.dtype], np.ndarray]
    bits: int = 8
    activation_bits: int | None = None
    order: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def is_packed(self) -> bool:
        """Whether it is of `PackedLinear`."""
        return "qweight" in self.parts

    def dequantized(self, dtype: Any = None) -> LazyArray:
        """The array of floats, which are rounded once to `dtype`."""
        target = np.dtype(dtype or self.dtype)
        return LazyArray(self.shape, target, lambda index: self.floats(index, target), self.chunk)

    def comparable(self) -> dict[str, LazyArray]:
        """The parts, with scales in float32: those that float16 holds exactly may be stored in it."""
        single = np.dtype(np.float32)
        parts = dict(self.parts)
        for name in parts.keys() & {"scales", "scale"}:
            part = parts[name]
            parts[name] = LazyArray(part.shape, single, lambda index, part=part: part.read(index).astype(single))
        return parts


@dataclass(frozen=True)
class Integers:
    """Where the integers of a matrix lie: input k is integer `places[k]` of `words` [W, N], in group `groups[k]`."""

    words: LazyArray
    places: np.ndarray
    groups: np.ndarray
    bits: int
    scales: LazyArray
    zeros: LazyArray

    def floats(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """A part of the dequantized matrix [K, N]. Only the words and groups that it needs are read."""
        rows, columns = index
        places, groups = self.places[rows], self.groups[rows]
        out = np.empty((len(places), columns.stop - columns.start), dtype)
        if not out.size:
            return out
        first_group, first_word = int(groups.min()), int(places.min()) * self.bits // 32
        used = slice(first_group, int(groups.max()) + 1), columns
        scale, zero = (part.load(used).astype(np.float32) for part in (self.scales, self.zeros))
        last_word = -(-(int(places.max()) + 1) * self.bits // 32)
        words = self.words.load((slice(first_word, last_word), columns)).view(np.uint32)
        groups, starts = groups - first_group, places.astype(np.int64) * self.bits - first_word * 32
        for block in blocks(*out.shape):
            integers = unpack(words, starts[block], self.bits)
            out[block] = rounded((integers.astype(np.float32) - zero[groups[block]]) * scale[groups[block]], dtype)
        return out


def packed(
    parts: Mapping[str, LazyArray],
    inputs: int,
    bits: int,
    dtype: np.dtype,
    *,
    order: np.ndarray | None = None,
    activation_bits: int | None = None,
    integers: Integers | None = None,
) -> QuantizedArray:
    """The kernel [inputs, outputs] of a `PackedLinear` with these parts: qweight, scales, zeros, and order if given.

    integers: the same integers as they are stored, which are read to dequantize them. Default: the parts.
    """
    qweight = parts["qweight"]
    if integers is None:
        places, slots = slots_of_inputs(order, inputs), qweight.shape[0] * 32 // bits
        groups = places // (slots // parts["scales"].shape[0])
        integers = Integers(qweight, places, groups, bits, parts["scales"], parts["zeros"])
    floats, shape = integers.floats, (inputs, qweight.shape[1])
    how: Any = dict(parts=parts, floats=floats, bits=bits, activation_bits=activation_bits, order=order)
    return QuantizedArray(shape, dtype, lambda index: floats(index, dtype), qweight.chunk and shape, **how)


def int8(parts: Mapping[str, LazyArray], transposed: bool, dtype: np.dtype) -> QuantizedArray:
    """The kernel of an `Int8Linear` (`transposed`), or the table of an `Int8Embed`, with the parts weight and scale."""
    weight, scale = parts["weight"], parts["scale"]

    def floats(index: Index, dtype: np.dtype) -> np.ndarray:
        rows, columns = index[::-1] if transposed else index
        scales = scale.read((rows, slice(0, 1))).astype(np.float32)
        out = rounded(weight.read((rows, columns)).astype(np.float32) * scales, dtype)
        return out.T if transposed else out

    shape = weight.shape[::-1] if transposed else weight.shape
    read = lambda index: floats(index, dtype)  # noqa: E731
    return QuantizedArray(shape, dtype, read, weight.chunk and shape, parts=parts, floats=floats)


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Float32 values in another dtype.

    Raises:
      ValueError: a finite value overflows.
    """
    with np.errstate(over="ignore"):
        out = values.astype(dtype, copy=False)
    if dtype.itemsize < 4 and (np.isfinite(values) > np.isfinite(out)).any():
        raise ValueError(f"a dequantized matrix has values that {dtype} cannot hold: take float32 or bfloat16")
    return out


# Bits ----------------------------------------------------------------------------------------------------------


def pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [S, N], S a multiple of `period(bits)` -> uint32 [S * bits / 32, N]: `packing.pack` for NumPy's arrays."""
    values = integers.reshape(-1, period(bits), integers.shape[1])
    words = np.zeros((len(values), period(bits) * bits // 32, integers.shape[1]), np.uint32)
    for i in range(period(bits)):
        word, shift = divmod(i * bits, 32)
        value = values[:, i].astype(np.uint32)
        words[:, word] |= value << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= value >> np.uint32(32 - shift)
    return words.reshape(-1, integers.shape[1])


def unpack(words: np.ndarray, starts: np.ndarray, bits: int) -> np.ndarray:
    """The integers, uint8 [len(starts), N], that start at these bits of the streams `words`, uint32 [W, N]."""
    word, shift = np.divmod(starts, 32)
    shift = shift.astype(np.uint32)[:, None]
    values = words[word] >> shift
    if (straddling := shift[:, 0] + bits > 32).any():
        values[straddling] |= words[word[straddling] + 1] << (np.uint32(32) - shift[straddling])
    return (values & np.uint32(2**bits - 1)).astype(np.uint8)


def blocks(count: int, width: int) -> Iterator[slice]:
    """Parts of `count` rows of so many integers, for `unpack`."""
    step = max(1, _BLOCK // max(1, width))
    yield from (slice(start, min(start + step, count)) for start in range(0, count, step))


def slots_of_inputs(order: np.ndarray | None, inputs: int) -> np.ndarray:
    """The slot of each input."""
    if order is None:
        return np.arange(inputs)
    slots = np.empty(inputs, np.int64)
    filled = order < inputs
    slots[order[filled]] = np.flatnonzero(filled)
    return slots


def rearranged(words: LazyArray, places: np.ndarray, bits: int, fill: tuple[LazyArray, int] | None = None) -> LazyArray:
    """Packed integers in another order: uint32 [S * bits / 32, N], whose integer s is integer `places[s]` of `words`.

    A place outside of `words` gets the zero of its group, if `fill` is given: zeros [G, N], and slots of a group.
    """
    count = words.shape[0] * 32 // bits
    per_period, step = period(bits) * bits // 32, period(bits)

    def read(index: Index) -> np.ndarray:
        rows, columns = index
        stored = words.load((slice(0, words.shape[0]), columns)).view(np.uint32)
        first, last = rows.start // per_period, -(-rows.stop // per_period)
        out = np.empty(((last - first) * per_period, stored.shape[1]), np.uint32)
        for block in blocks(last - first, step * stored.shape[1]):
            slots = np.arange((first + block.start) * step, (first + block.stop) * step)
            integers = unpack(stored, np.minimum(places[slots], count - 1).astype(np.int64) * bits, bits)
            if fill is not None and len(outside := np.flatnonzero(places[slots] >= count)):
                zeros, size = fill
                integers[outside] = zeros.load((slice(0, zeros.shape[0]), columns))[slots[outside] // size]
            out[block.start * per_period : block.stop * per_period] = pack(integers, bits)
        start = rows.start - first * per_period
        return out[start : start + rows.stop - rows.start]

    shape = len(places) * bits // 32, words.shape[1]
    return LazyArray(shape, np.dtype(np.uint32), read, words.chunk and shape)


# Orbax ---------------------------------------------------------------------------------------------------------


def gather(arrays: Mapping[str, LazyArray], where: Path, config: OPTConfig, settings: Any) -> dict[str, LazyArray]:
    """The arrays of an Orbax directory, with a `QuantizedArray` in place of the parts of each.

    Args:
      arrays: path of a parameter -> array.
      where: the directory, for messages.
      config: the architecture.
      settings: `quantization_config` of the config.json; of other methods the arrays stay as they are.

    Raises:
      ValueError: a setting is unknown, or an array that is missing or has another shape or dtype than it says.
    """
    if not isinstance(settings, Mapping) or settings.get("quant_method") != METHOD:
        return dict(arrays)
    if settings.get("format") != _FORMAT:
        what = f"quantization_config has format {shown(settings.get('format'))}"
        raise ValueError(f"{where}: {what}, and this version reads {_FORMAT}: update opt-jax")
    gathered = dict(arrays)
    for name in arrays:
        base, _, part = name.rpartition(".")
        if part not in ("qweight", "weight"):
            continue
        path = names.EMBEDDING if f"{base}.embedding" == names.EMBEDDING else f"{base}.kernel"
        parts = {n: gathered.pop(f"{base}.{n}") for n in (*_PACKED, *_INT8) if f"{base}.{n}" in gathered}
        try:
            names.to_hf(path)
            open_parts = _open_packed if part == "qweight" else _open_int8
            gathered[path] = open_parts(parts, path, config, settings)
        except KeyError:
            raise ValueError(f"{where}: tensor {name} is left over: the config has no place for it") from None
        except ValueError as e:
            raise ValueError(f"{where}: tensor {base}.{e}") from None
    return gathered


def _open_packed(parts: dict[str, LazyArray], path: str, config: OPTConfig, settings: Mapping[str, Any]) -> LazyArray:
    bits, activation_bits = (_setting(settings, name, path) for name in ("bits", "activation_bits"))
    if type(bits) is not int or not 2 <= bits <= 8 or activation_bits not in (None, bits if bits == 8 else None):
        what = f"bits {shown(bits, 40)} and activation_bits {shown(activation_bits, 40)}"
        raise ValueError(f"qweight cannot have the {what} of quantization_config")
    inputs = config.ffn_dim if path.endswith("fc2.kernel") else config.hidden_size
    slots = parts["order"].size if "order" in parts else inputs
    outputs = parts["qweight"].shape[-1:]
    _expect(parts, "qweight", ("uint32",), (slots * bits // 32, *outputs))
    if "scales" not in parts or parts["scales"].dtype.name not in SCALES or len(parts["scales"].shape) != 2:
        raise ValueError("scales is missing, or is no matrix of floats")
    groups = parts["scales"].shape[0]
    _expect(parts, "scales", SCALES, (groups, *outputs))
    if "zeros" in parts:
        _expect(parts, "zeros", ("uint8",), (groups, *outputs))
    else:
        parts["zeros"] = _constant(2 ** (bits - 1), parts["scales"].shape)
    if not groups or slots % (groups * period(bits)):
        raise ValueError(f"scales has {groups} groups, which do not divide {slots} inputs into words of 32 bits")
    order = None
    if "order" in parts:
        _expect(parts, "order", ("int32",), (slots,))
        order = parts["order"].load()
        filled = order[order != inputs]
        if slots < inputs or not np.array_equal(np.sort(filled), np.arange(inputs)):
            raise ValueError(f"order does not name each of {inputs} inputs once")
    if activation_bits is not None and (groups > 1 or any((part != 128).any() for part in pieces(parts["zeros"]))):
        raise ValueError(f"activation_bits {activation_bits} takes a symmetric matrix with one group")
    dtype = float_dtype(config, parts, "float32")
    return packed(parts, inputs, bits, dtype, order=order, activation_bits=activation_bits)


def _open_int8(parts: dict[str, LazyArray], path: str, config: OPTConfig, _settings: Mapping[str, Any]) -> LazyArray:
    shape = parts["weight"].shape
    if parts["weight"].dtype != np.int8 or len(shape) != 2:
        raise ValueError(f"weight of shape {shape} is {parts['weight'].dtype.name}, not a matrix of int8")
    _expect(parts, "scale", ("float32",), (shape[0], 1))
    return int8(parts, path.endswith("kernel"), float_dtype(config, parts, "float32"))


def _setting(settings: Mapping[str, Any], name: str, path: str) -> Any:
    value = settings.get(name)
    return value.get(path) if isinstance(value, Mapping) else value


def _expect(parts: Mapping[str, LazyArray], name: str, dtypes: tuple[str, ...], shape: Shape) -> None:
    got = (parts[name].dtype.name, parts[name].shape) if name in parts else None
    if got is None:
        raise ValueError(f"{name} is missing")
    if got[0] not in dtypes or got[1] != shape:
        raise ValueError(f"{name} is {got[0]} {got[1]}, but {' or '.join(dtypes)} {shape} is expected")


def _constant(value: int, shape: Shape) -> LazyArray:
    def read(index: Index) -> np.ndarray:
        return np.full([s.stop - s.start for s in index], value, np.uint8)

    return LazyArray(shape, np.dtype(np.uint8), read)


def expand(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The arrays to write to an Orbax directory: the inverse of `gather`."""
    expanded: dict[str, LazyArray] = {}
    for path, array in arrays.items():
        if isinstance(array, QuantizedArray):
            base = path.rpartition(".")[0]
            expanded |= {f"{base}.{name}": part for name, part in array.parts.items()}
        else:
            expanded[path] = array
    return expanded


def settings_for(arrays: Mapping[str, LazyArray], source: Any) -> dict[str, Any] | None:
    """`quantization_config` of an Orbax directory with these arrays; None if all are floats. See `settings_of`."""
    quantized = quantized_of(arrays)
    bits = {path: array.bits for path, array in quantized.items()}
    return settings_of(bits, {path: array.activation_bits for path, array in quantized.items()}, source)


def settings_of(bits: Mapping[str, int], activation_bits: Mapping[str, int | None], source: Any) -> Any:
    """`quantization_config` of matrices, path -> bits; None without any.

    source: the `quantization_config` of where they come from: if it is of this form its recipe is kept, else it is the
      recipe.
    """
    if not bits:
        return None
    recipe = source.get("recipe") if isinstance(source, Mapping) and source.get("quant_method") == METHOD else source
    return {
        "quant_method": METHOD,
        "format": _FORMAT,
        "bits": _one_or_all(bits),
        "activation_bits": _one_or_all(activation_bits),
        "recipe": recipe,
    }


def _one_or_all(values: Mapping[str, Any]) -> Any:
    return dict(values) if len(set(values.values())) > 1 else next(iter(values.values()))


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The content of a config.json with these settings as its `quantization_config`; without one, if they are None."""
    content = {name: value for name, value in config.items() if name != "quantization_config"}
    return content if settings is None else content | {"quantization_config": settings}


def quantized_of(arrays: Mapping[str, LazyArray]) -> dict[str, QuantizedArray]:
    return {path: array for path, array in arrays.items() if isinstance(array, QuantizedArray)}


def dequantized(
    arrays: Mapping[str, LazyArray], config: OPTConfig, dtype: str | None, where: Path
) -> tuple[dict[str, LazyArray], OPTConfig]:
    """The arrays and the config of the model with floats for integers, in `dtype`; None: each in that of its own.

    Raises:
      ValueError: all are floats already.
    """
    floats = {path: array.dequantized(dtype) for path, array in quantized_of(arrays).items()}
    if not floats:
        raise ValueError(f"dequantize=True (--dequantize) is for quantized models, and {where} holds floats")
    extra = {name: value for name, value in config.extra.items() if name != "quantization_config"}
    return {**arrays, **floats}, dataclasses.replace(config, extra=extra)


def refuse(arrays: Mapping[str, LazyArray], where: Path, what: str | None, remedy: str) -> None:
    """Raise ValueError if there are integers, and `what`, if it is given, takes floats."""
    if (quantized := quantized_of(arrays)) and what:
        name = names.to_hf(next(iter(quantized)))[0]
        raise ValueError(f"{where}: {name} is quantized, and {what} takes matrices of floats: {remedy}")


def checks_of(arrays: Mapping[str, LazyArray], where: Path) -> Checks:
    """Functions that read all scales, and raise ValueError if one is not finite."""
    return tuple(partial(_check_scales, path, array, where) for path, array in quantized_of(arrays).items())


def _check_scales(path: str, array: QuantizedArray, where: Path) -> None:
    scales = array.parts["scales" if array.is_packed else "scale"]
    if not all(np.isfinite(part.astype(np.float32)).all() for part in pieces(scales)):
        raise ValueError(f"{where}: the scales of {names.to_hf(path)[0]} are not all finite")


def pieces(matrix: LazyArray) -> Iterator[np.ndarray]:
    """The matrix, some rows at a time."""
    rows = max(1, chunks.CHUNK_BYTES // 4 // max(1, matrix.shape[1]))
    return (matrix.load(index) for index in chunks.pieces(matrix.shape, (rows, matrix.shape[1])))
