"""Reads torch's zip files without torch: memory-mapped, lazily, and without running code.

`read_torch` returns `Tensors`: a dict of NumPy views into the mapped file. No data is read before a view is used.

Format: torch's zip as written by `torch.save` since 1.6 (torch/serialization.py, `_save`).
"""

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opt_jax.checkpoints.formats import foreign, unpickle
from opt_jax.checkpoints.formats.mapped_files import Tensors, is_shape, is_size, little_endian, map_file, shown
from opt_jax.checkpoints.formats.unpickle import (
    Refused,
    StubClass,
)
from opt_jax.checkpoints.formats.zip_records import find_records
from opt_jax.system.reading import SMALL_FILE

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_FLOAT8, _UNTYPED = ("float8_e4m3fn", "float8_e5m2"), "bytes"  # they have no typed storage


class TorchTensor(NamedTuple):
    """A tensor as the pickle describes it, not yet checked. Sizes, offset and strides count elements."""

    storage: Any  # ("storage", dtype name, key, location, number of elements)
    offset: Any
    size: Any
    stride: Any
    bits: Any = None  # None, or {"neg": ..., "conj": ...}: operations that torch applies to the numbers on reading


_STATE_DICTS = ("state_dict", "model_state_dict", "module", "model")  # the names that training code gives them
# What training code stores beside tensors: settings with their types, enums, meters, NumPy scalars.
_STUB_MODULES = (
    "metaseq",
    "fairseq",
    "fairscale",
    "omegaconf",
    "argparse",
    "enum",
    "typing",
    "pathlib",
    "deepspeed",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "transformers",
    "accelerate",
    "datetime",
)
_BUILTIN_TYPES = "bool bytearray bytes complex dict float frozenset int list long object set str tuple type unicode"
_STUB_NAMES = {
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTIN_TYPES.split()),
    *(f"torch.{name}" for name in ("bfloat16", "device", "float16", "float32", "float64", "int32", "int64")),
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "_codecs.encode",
    "_operator.getitem",
    "operator.getitem",
    "collections.Counter",
    "collections.defaultdict",
    "collections.deque",
}


def _rebuild_tensor(storage, offset, size, stride, _requires_grad=False, _hooks=None, metadata=None) -> TorchTensor:
    return TorchTensor(storage, offset, size, stride, metadata)


def _rebuild_float8(storage, offset, size, stride, _requires_grad, _hooks, dtype, metadata=None) -> TorchTensor:
    """The tensor in an untyped storage, whose size is in bytes: for float8, in elements."""
    if dtype not in _FLOAT8 or type(storage) is not tuple or storage[1:2] != (_UNTYPED,):
        raise ValueError("a tensor has an unknown dtype")
    return TorchTensor((storage[0], dtype, *storage[2:]), offset, size, stride, metadata)


def _rebuild_parameter(tensor, _requires_grad=False, _hooks=None) -> TorchTensor:
    if not isinstance(tensor, TorchTensor):
        raise ValueError(f"a parameter is made of a {type(tensor).__name__}")
    return tensor


def _size(dims) -> tuple:
    if type(dims) is not tuple:
        raise ValueError(f"torch.Size of a {type(dims).__name__}")
    return dims


_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_float8,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
    "torch.storage.UntypedStorage": _UNTYPED,
}
_GLOBALS |= {f"torch.{storage}": dtype for storage, dtype in _STORAGE_DTYPES.items()}
_GLOBALS |= {f"torch.{dtype}": dtype for dtype in _FLOAT8}


def _find_global(name: str) -> Any:
    if name not in _GLOBALS:
        raise Refused(name)
    return _GLOBALS[name]


def _find_global_or_stub(name: str) -> Any:
    if name in _GLOBALS or not (name.split(".")[0] in _STUB_MODULES or name in _STUB_NAMES):
        return _find_global(name)
    return StubClass(name)


class TorchFile:
    """A torch zip file. `content` is the saved object, with a `TorchTensor` for each tensor; `view` returns its array.

    Args:
      path: the file.
      stubs: read objects of the training code's classes as `Stub`s, instead of refusing the file.
      like: another file that was read in this way. If the pickles differ in nothing but floats, such as the times of
        shards of one checkpoint, `content` is that of the other file.

    Raises:
      ValueError: the file is truncated, has another format, or its pickle asks for anything but tensors (named).
    """

    def __init__(self, path: Path, stubs: bool = False, like: "TorchFile | None" = None):
        self.path, self.map = path, map_file(path)
        if self.map[:2] != b"PK":
            raise ValueError(f"{path}: {self._what_else()}")
        try:
            self._records = find_records(self.map)
        except ValueError as e:
            raise ValueError(f"{path} is a damaged zip file (truncated download?): {shown(e)}") from None
        pickles = [name for name in self._records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"{path} is a zip file, but not one written by torch.save")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self._prefix + "byteorder" in self._records and self._bytes("byteorder") != b"little":
            raise ValueError(f"{path} was written on a big-endian machine: save it again on a little-endian one")
        if (size := self._records[self._prefix + "data.pkl"][1]) > SMALL_FILE:
            raise ValueError(f"{path}: the pickle in it has {size:,} bytes, more than the {SMALL_FILE:,} that are read")
        self._pickled = self._bytes("data.pkl")
        if like is not None and unpickle.differ_in_floats(like._pickled, self._pickled, like._floats):
            self.content, self._floats = like.content, like._floats
            return
        self._floats: list[int] = []
        try:
            self.content = unpickle.loads(self._pickled, _find_global_or_stub if stubs else _find_global, self._floats)
        except Refused as e:
            raise Refused(
                f"{path}: refused, because the pickle in it asks for {shown(e)}; only tensors in dictionaries are read"
            ) from None
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}: the pickle in it is damaged: {shown(e)}") from None

    def _what_else(self) -> str:
        start = self.map[:262]
        if start[257:262] == b"ustar" or b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in start[:20]:
            return "the format of torch before 1.6: load it with torch, and torch.save it again"
        return foreign.by_first_bytes(start) or "not a file written by torch.save, or truncated"

    def _bytes(self, record: str) -> bytes:
        start, length, crc = self._records[self._prefix + record]
        content = self.map[start : start + length]
        if crc and crc != zlib.crc32(content):
            raise ValueError(f"{self.path}: record {record} is damaged: its checksum is wrong")
        return content

    def view(self, tensor: TorchTensor) -> np.ndarray:
        """The tensor as a view into the mapped file.

        Raises:
          ValueError: its elements would lie outside of its storage, or the stored numbers are not its values.
        """
        if tensor.bits is not None and tensor.bits != {}:
            raise ValueError(
                "torch's neg or conj bit is set, so its values are not the numbers stored: "
                "save tensor.resolve_conj().resolve_neg()"
            )
        offset, size, stride = tensor.offset, tensor.size, tensor.stride
        try:
            kind, dtype_name, key, _, numel = tensor.storage
        except (TypeError, ValueError):
            raise ValueError("malformed tensor description") from None
        known = kind == "storage" and dtype_name in (*_STORAGE_DTYPES.values(), *_FLOAT8) and isinstance(key, str)
        if not (known and is_shape(size) and is_size(numel, offset) and type(stride) in (tuple, list)):
            raise ValueError("malformed tensor description")
        if len(stride) != len(size) or not is_size(*stride):
            raise ValueError("malformed tensor description")
        dtype = little_endian(dtype_name)
        if f"{self._prefix}data/{key}" not in self._records:
            raise ValueError(f"record data/{shown(key)} is not in the file")
        start, length, _ = self._records[f"{self._prefix}data/{key}"]  # a checksum of all data would cost a reading
        if numel * dtype.itemsize != length:
            raise ValueError(f"its storage {shown(key)} has {length} bytes, not {numel} elements of {dtype}")
        if 0 in size:
            return np.zeros(size, dtype)
        if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= numel:
            raise ValueError(f"it reaches beyond its storage {shown(key)} of {numel} elements")
        if math.prod(size) > len(self.map):  # strides of 0 repeat elements, so a small file could claim any size
            raise ValueError(f"shape {tuple(size)} is larger than the whole file")
        strides = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True)]
        return np.ndarray(size, dtype, self.map, start + offset * dtype.itemsize, strides)


def read_torch(path: Path) -> Tensors:
    """The tensors of a state dict saved by `torch.save` (`pytorch_model.bin`).

    The state dict may be inside of a training checkpoint, whose other entries are not read. Plain numbers and texts
    beside tensors are left out.

    Raises:
      ValueError: as `TorchFile`, or the file does not hold a dictionary of tensors.
    """
    try:
        file = TorchFile(path)
        state = _state_dict(file.content)
    except Refused:
        file = TorchFile(path, stubs=True)
        state = _state_dict(file.content)
        if state is file.content:
            raise
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    beside = (str, int, float, type(None)) if any(isinstance(value, TorchTensor) for value in state.values()) else ()
    tensors = Tensors(file.map)
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, beside) and not name.endswith((".weight", ".bias")):
            continue
        if not isinstance(name, str) or not isinstance(value, TorchTensor):
            kind = type(value).__name__
            raise ValueError(f"{path}: entry {shown(name)} is a {kind}, where a state dict has tensors")
        try:
            tensors[name] = file.view(value)
        except ValueError as e:
            raise ValueError(f"{path}: tensor {shown(name)}: {e}") from None
    return tensors


def _is_parameter(entry: tuple[Any, Any]) -> bool:
    """Whether an entry of a dictionary is a parameter, and not a tensor beside it, such as the loss of a script."""
    name, value = entry
    return isinstance(value, TorchTensor) and isinstance(name, str) and "." in name


def _state_dict(content: Any) -> Any:
    """The state dict in the content of a training checkpoint, such as Lightning's or DeepSpeed's; else the content."""
    for _ in range(3):  # a dictionary may contain itself
        if not isinstance(content, dict) or any(map(_is_parameter, content.items())):
            break
        inner = [content[name] for name in _STATE_DICTS if isinstance(content.get(name), dict)]
        content = inner[0] if inner else content
    return content
