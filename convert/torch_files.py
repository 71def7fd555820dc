"""Reads safetensors and torch zip files without torch: memory-mapped, lazily, and without running code.

Both readers give `Tensors`: a dict of numpy views into the mapped file. Nothing is read before a view is used.

Formats: https://github.com/huggingface/safetensors#format; torch's zip as written by `torch.save` since 1.6
(torch/serialization.py, `_save`).
"""

import io
import json
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes: the limit of the safetensors library


class Tensors(dict[str, np.ndarray]):
    """Tensor name -> read-only view into memory-mapped files. Views may be strided and unaligned: copy to use."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[mmap.mmap] = []

    def release(self) -> None:
        """Give back the memory of the pages read so far. The views stay valid: the pages are read again on use."""
        for mapped in self.maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, read-only.

    Raises:
      ValueError: the file is empty or a Git LFS pointer.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} is empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if mapped[:24] == b"version https://git-lfs.":
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")
    return mapped


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name).newbyteorder("<")


# safetensors ------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors` file.

    Raises:
      ValueError: the file is truncated or malformed; names the file and, where there is one, the tensor.
    """
    mapped = map_file(path)
    length = int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or length > min(len(mapped) - 8, _MAX_HEADER):
        raise ValueError(f"{path} is truncated or not a safetensors file: its header does not fit")
    try:
        header = json.loads(mapped[8 : 8 + length], object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
        header.pop("__metadata__", None)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: the safetensors header is damaged: {e}") from None

    tensors, spans = Tensors(), []
    tensors.maps.append(mapped)
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not all(_is_size(n) for n in (*shape, start, end)):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{path}: tensor {name} has a malformed header entry") from None
        if not isinstance(dtype, str) or dtype not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {dtype}, which is not supported")
        if end - start != math.prod(shape) * _dtype(_SAFETENSORS_DTYPES[dtype]).itemsize:
            raise ValueError(f"{path}: tensor {name} ({dtype}, shape {shape}) does not fill its {end - start} bytes")
        spans.append((start, end, name, dtype, shape))

    # The format allows neither gaps nor overlaps, so walking the tensors in order accounts for every byte.
    position, size = 0, len(mapped) - 8 - length
    for start, end, name, dtype, shape in sorted(spans):
        if start != position:
            raise ValueError(f"{path}: tensor {name} overlaps another or leaves a gap before it")
        if end > size:
            raise ValueError(f"{path} is truncated: tensor {name} ends at byte {end} of {size}")
        flat = np.frombuffer(mapped, _dtype(_SAFETENSORS_DTYPES[dtype]), math.prod(shape), 8 + length + start)
        tensors[name] = flat.reshape(shape)
        position = end
    if position != size:
        raise ValueError(f"{path}: {size - position} bytes after the last tensor belong to none")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return dict(pairs)


def _is_size(n: Any) -> bool:
    return type(n) is int and n >= 0


# torch zip --------------------------------------------------------------------------------------------------


class TorchTensor(NamedTuple):
    """A tensor as the pickle describes it, unchecked; sizes, offset and strides count elements."""

    storage: Any  # ("storage", dtype name, key, location, number of elements)
    offset: Any
    size: Any
    stride: Any


class Stub:
    """Stands for an object of a foreign class, which is never imported: what the pickle says of it, as plain data.

    Attributes:
      name: module and class. args: what it is made with. state: what it is restored to, usually a dict (None: nothing).
      items: what is put into it as a container: values, or pairs of key and value.
    """

    name = ""
    __slots__ = ("args", "items", "state")

    def __new__(cls, *args, **kwargs):
        stub = super().__new__(cls)
        stub.args, stub.state, stub.items = args, None, []
        return stub

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:  # called by BUILD, which would set any attribute, on classes too, without it
        self.state = state

    def __setitem__(self, key, value) -> None:
        self.items.append((key, value))

    def append(self, value) -> None:
        self.items.append(value)

    add = append


# What the training code keeps beside tensors: settings with their types, enums, meters, numbers of NumPy.
_STUB_MODULES = ("metaseq", "fairseq", "fairscale", "omegaconf", "argparse", "enum", "typing", "pathlib")
_BUILTIN_TYPES = "bool bytearray bytes complex dict float frozenset int list long object set str tuple type unicode"
_STUB_NAMES = {
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTIN_TYPES.split()),
    *(f"torch.{name}" for name in ("bfloat16", "device", "float16", "float32", "float64", "int32", "int64")),
    "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct", "_codecs.encode", "_operator.getitem",
    "operator.getitem", "collections.Counter", "collections.defaultdict", "collections.deque",
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Builds plain data from a torch pickle: dicts, lists, numbers, strings and `TorchTensor`.

    Only the globals of `allowed` exist; with `stubs` those of the names above, too, as a `Stub`. What they stand for
    cannot be changed by the pickle's later instructions either (BUILD sets attributes): strings, built-in types, bound
    methods, and classes of stubs, which are this unpickler's own.
    """

    def __init__(self, file, path: Path, stubs: bool = False):
        super().__init__(file)
        self.path, self.stubs = path, stubs
        self.refused: str | None = None
        self.allowed: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
            "torch._utils._rebuild_parameter": self._rebuild_parameter,
            "torch.Size": self._size,
        } | {f"torch.{storage}": dtype for storage, dtype in _STORAGE_DTYPES.items()}

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in self.allowed:
            if not self.stubs or (module.split(".")[0] not in _STUB_MODULES and wanted not in _STUB_NAMES):
                self.refused = wanted
                raise pickle.UnpicklingError(f"refused {wanted}")
            self.allowed[wanted] = type("Stub", (Stub,), {"name": wanted, "__slots__": ()})
        return self.allowed[wanted]

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def _rebuild_tensor(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
        return TorchTensor(storage, offset, size, stride)

    def _rebuild_parameter(self, tensor, requires_grad=False, hooks=None):
        return tensor

    def _size(self, dims):
        if type(dims) not in (tuple, list):
            raise pickle.UnpicklingError(f"torch.Size of a {type(dims).__name__}")
        return tuple(dims)


class TorchFile:
    """A torch zip file: `content` is the saved object, with a `TorchTensor` for each tensor; `view` gives its array.

    Args:
      stubs: read objects of the training code's classes as a `Stub`, instead of refusing the file.

    Raises:
      ValueError: truncated, another format, or a pickle that asks for anything but tensors (names what it asked for).
    """

    def __init__(self, path: Path, stubs: bool = False):
        self.path, self.map = path, map_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
            raise ValueError(f"{path}: {self._what_else()}") from None
        self._records = {info.filename: info for info in infos}
        pickles = [name for name in self._records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(infos) != len(self._records):
            raise ValueError(f"{path} is a zip file, but not one written by torch.save")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self._prefix + "byteorder" in self._records and self._bytes("byteorder") != b"little":
            raise ValueError(f"{path} was written on a big-endian machine: save it again on a little-endian one")
        self.content = self._unpickle(stubs)

    def _what_else(self) -> str:
        start = self.map[:262]
        if start[:2] == b"PK":
            return "damaged zip file (truncated download?)"
        if start[257:262] == b"ustar" or b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in start[:20]:
            return "the format of torch before 1.6: load it with torch, and torch.save it again"
        return "not a file written by torch.save, or truncated"

    def _unpickle(self, stubs: bool) -> Any:
        unpickler = _Unpickler(io.BytesIO(self._bytes("data.pkl")), self.path, stubs)
        try:
            return unpickler.load()
        except Exception as e:  # a damaged pickle can raise nearly anything
            if unpickler.refused:
                raise ValueError(
                    f"{self.path}: refused, because the pickle in it asks for {unpickler.refused}; "
                    "only tensors in dictionaries are read"
                ) from None
            raise ValueError(f"{self.path}: the pickle in it is damaged: {e or type(e).__name__}") from None

    def _span(self, record: str) -> tuple[int, int]:
        """(start, length) in the file of a record's bytes."""
        info = self._records.get(self._prefix + record)
        if info is None:
            raise ValueError(f"record {record} is not in the file")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"record {record} is compressed or encrypted, which torch.save never does")
        # The padding that aligns the data is in the local header only; the central directory says 0.
        header = self.map[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"record {record} has a damaged header")
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if start + info.file_size > len(self.map):
            raise ValueError(f"record {record} is truncated")
        return start, info.file_size

    def _bytes(self, record: str) -> bytes:
        try:
            start, length = self._span(record)
        except ValueError as e:
            raise ValueError(f"{self.path}: {e}") from None
        return self.map[start : start + length]

    def view(self, tensor: TorchTensor) -> np.ndarray:
        """The tensor's elements in the mapped file. Raises ValueError where they would lie outside their storage."""
        offset, size, stride = tensor.offset, tensor.size, tensor.stride
        try:
            _, dtype_name, key, _, numel = tensor.storage
            if dtype_name not in _STORAGE_DTYPES.values() or not isinstance(key, str) or len(size) != len(stride):
                raise ValueError
            if not all(_is_size(n) for n in (numel, offset, *size, *stride)):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError("malformed tensor description") from None
        dtype = _dtype(dtype_name)
        start, length = self._span(f"data/{key}")
        if numel * dtype.itemsize > length:
            raise ValueError(f"its storage {key} has {length} bytes, not {numel} elements of {dtype}")
        if 0 in size:
            return np.zeros(size, dtype)
        if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= numel:
            raise ValueError(f"it reaches beyond its storage {key} of {numel} elements")
        flat = np.frombuffer(self.map, dtype, numel - offset, start + offset * dtype.itemsize)
        strides = [step * dtype.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(flat, size, strides, writeable=False)


def read_torch(path: Path) -> Tensors:
    """The tensors of a state dict saved by `torch.save` (`pytorch_model.bin`).

    Raises:
      ValueError: as `TorchFile`, or the file holds something other than a flat dictionary of tensors.
    """
    file = TorchFile(path)
    if not isinstance(file.content, dict):
        raise ValueError(f"{path} holds a {type(file.content).__name__}, not a state dict")
    tensors = Tensors()
    tensors.maps.append(file.map)
    for name, value in dict.items(file.content):
        if not isinstance(name, str) or not isinstance(value, TorchTensor):
            raise ValueError(f"{path}: entry {name!r} is a {type(value).__name__}, where a state dict has tensors")
        try:
            tensors[name] = file.view(value)
        except ValueError as e:
            raise ValueError(f"{path}: tensor {name}: {e}") from None
    return tensors
