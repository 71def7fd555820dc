"""Reads the `flax_model.msgpack` files that Hugging Face's Flax classes wrote until transformers 5: lazily.

A file is nested maps of arrays in msgpack, as `flax.serialization.msgpack_serialize` writes them. An array is an
extension of type 1, which contains a msgpack of (shape, name of the dtype, bytes). An array of more than 2^30 bytes is
a map instead: its shape, and the flat chunks of its elements.

Only the structure is read here, and the bytes of arrays later by `pread` (stored.py). The limits below bound the time
and the memory that a file can cost, whatever it says.

Format: https://github.com/msgpack/msgpack/blob/master/spec.md and flax/serialization.py
"""

import bisect
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.chunks import Index, Shape
from opt_jax.checkpoints.formats.mapped_files import is_shape, little_endian, open_file, shown
from opt_jax.checkpoints.formats.safetensors import DTYPES
from opt_jax.checkpoints.formats.stored import Stored, fill
from opt_jax.system.reading import open_regular

_MOST_ENTRIES = 50_000  # of all maps in a file together; OPT-175B has 3,000
_MOST_LEVELS = 12  # of maps in maps; a chunk of a kernel is an entry of the ninth
_LONGEST_TEXT = 100  # bytes of a key, and of the name of a dtype
_CHUNKED = "__msgpack_chunked_array__"


class _Kind(NamedTuple):
    """A type of msgpack: its codes that include the length (or are followed by no length), and those before a length.

    `fixed`: code -> length. `sized`: code -> bytes of the length that follows.
    """

    name: str
    fixed: Mapping[int, int]
    sized: Mapping[int, int]


_MAP = _Kind("a map", {0x80 + n: n for n in range(16)}, {0xDE: 2, 0xDF: 4})
_ARRAY = _Kind("a list", {0x90 + n: n for n in range(16)}, {0xDC: 2, 0xDD: 4})
_TEXT = _Kind("a text", {0xA0 + n: n for n in range(32)}, {0xD9: 1, 0xDA: 2, 0xDB: 4})
_BYTES = _Kind("bytes", {}, {0xC4: 1, 0xC5: 2, 0xC6: 4})
_EXTENSION = _Kind("an array", {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}, {0xC7: 1, 0xC8: 2, 0xC9: 4})
_INTEGER = _Kind("an integer", {}, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})  # the number stands in place of the length
_NDARRAY = 1  # the type of an extension


class _Chunked(NamedTuple):
    """A matrix in chunks: chunk i has its elements from `starts[i]` on, in the order of rows."""

    shape: Shape
    chunks: tuple[Stored, ...]
    starts: tuple[int, ...]

    def lazy(self) -> LazyArray:
        return LazyArray(self.shape, self.chunks[0].dtype, self.read)

    def read(self, index: Index) -> np.ndarray:
        """A copy of the part at the index. Raises as `Stored.read`."""
        rows, columns = index
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), self.chunks[0].dtype)
        runs = out.reshape(1, -1) if out.shape[1] == self.shape[1] else out
        with open_regular(self.chunks[0].path) as file:
            for i, run in enumerate(runs):
                self._fill(file.fileno(), run, (rows.start + i) * self.shape[1] + columns.start)
        return out

    def _fill(self, file: int, run: np.ndarray, start: int) -> None:
        i = bisect.bisect_right(self.starts, start) - 1
        while run.size:
            chunk, skipped = self.chunks[i], start - self.starts[i]
            part = run[: chunk.shape[0] - skipped]
            fill(chunk.path, file, part, chunk.offset + skipped * chunk.dtype.itemsize)
            run, start, i = run[part.size :], start + part.size, i + 1


class _Scanner:
    """Reads the structure of a file. `names`: the keys that lead to the current entry."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file, self._size = path, file, os.fstat(file.fileno()).st_size
        self._entries = 0
        self.names: list[str] = []

    def document(self) -> dict[str, Any]:
        """The nested maps of the file, with a `Stored` for each array.

        Raises:
          ValueError: the file is truncated, or has anything else in it.
        """
        code = self._number(1)
        tree = self._map(self._length(code, _MAP), 1)
        if (rest := self._size - self._file.tell()) > 0:
            raise ValueError(f"{rest:,} bytes follow after its end")
        return tree

    def _value(self, level: int) -> Any:
        code = self._number(1)
        if code < 0x80:
            return code
        if code in (0xC2, 0xC3):
            return code == 0xC3
        if code in _INTEGER.sized:
            return self._length(code, _INTEGER)
        if code in _MAP.fixed or code in _MAP.sized:
            return self._map(self._length(code, _MAP), level)
        return self._array(self._length(code, _EXTENSION))

    def _map(self, count: int, level: int) -> dict[str, Any]:
        self._entries += count
        if level > _MOST_LEVELS or self._entries > _MOST_ENTRIES:
            raise ValueError("it has more maps in maps, or more entries, than a checkpoint has")
        content: dict[str, Any] = {}
        for _ in range(count):
            key = self._text()
            if key in content:
                raise ValueError(f"the key {shown(key)} is there twice")
            self.names.append(key)
            content[key] = self._value(level + 1)
            self.names.pop()
        return content

    def _array(self, length: int) -> Stored:
        """The array in an extension of this length, whose type comes next."""
        kind, end = self._number(1), self._file.tell() + length
        if kind != _NDARRAY:
            raise ValueError(f"it is an extension of type {kind}, not an array")
        if self._length(self._number(1), _ARRAY) != 3:
            raise ValueError("the array is not described by shape, dtype and bytes")
        dimensions = self._length(self._number(1), _ARRAY)
        shape = tuple(self._integer() for _ in range(dimensions)) if dimensions <= 32 else None
        name = self._text()
        if name not in DTYPES.values():
            raise ValueError(f"dtype {shown(name)} is not supported")
        dtype, nbytes = little_endian(name), self._length(self._number(1), _BYTES)
        start = self._file.tell()
        if shape is None or not is_shape(shape) or math.prod(shape) * dtype.itemsize != nbytes:
            raise ValueError(f"{name} of shape {shown(shape)} does not fill its {nbytes} bytes")
        if start + nbytes != end:
            raise ValueError(f"its bytes end at {start + nbytes}, but the array at {end}")
        if end > self._size:
            raise ValueError(f"the file is truncated: the array ends at byte {end} of {self._size}")
        self._file.seek(end)
        return Stored(self._path, start, shape, _strides(shape, dtype.itemsize), dtype)

    def _integer(self) -> int:
        code = self._number(1)
        return code if code < 0x80 else self._length(code, _INTEGER)

    def _text(self) -> str:
        length = self._length(self._number(1), _TEXT)
        if length > _LONGEST_TEXT:
            raise ValueError(f"a key or the name of a dtype has {length} bytes")
        return self._bytes(length).decode("utf-8", "backslashreplace")

    def _length(self, code: int, kind: _Kind) -> int:
        """The length that a code of this kind includes, or that follows it."""
        if code in kind.fixed:
            return kind.fixed[code]
        if code not in kind.sized:
            raise ValueError(f"msgpack's code 0x{code:02x} is not {kind.name}")
        return self._number(kind.sized[code])

    def _number(self, width: int) -> int:
        return int.from_bytes(self._bytes(width), "big")

    def _bytes(self, count: int) -> bytes:
        content = self._file.read(count)
        if len(content) < count:
            raise ValueError(f"the file is truncated at byte {self._size}")
        return content


def _strides(shape: Shape, itemsize: int) -> Shape:
    return tuple(math.prod(shape[i + 1 :]) * itemsize for i in range(len(shape)))


def read_flax(path: Path) -> dict[str, LazyArray]:
    """The arrays of a `flax_model.msgpack`, or of one of its shards. A name is the keys, joined by "/".

    Raises:
      ValueError: the file is truncated or malformed; the message names the file and, if possible, the array.
      OSError: it cannot be read.
    """
    with open_file(path) as file:
        scanner = _Scanner(path, file)
        try:
            tree = scanner.document()
        except ValueError as e:
            where = f"entry {shown('/'.join(scanner.names))}: " if scanner.names else ""
            raise ValueError(f"{path} is damaged, or no msgpack file of Flax: {where}{e}") from None
    arrays: dict[str, LazyArray] = {}
    for name, value in _leaves(tree, ""):
        try:
            array = _joined(value) if isinstance(value, dict) else value
        except ValueError as e:
            raise ValueError(f"{path}: entry {shown(name)}: {e}") from None
        if not isinstance(array, Stored | _Chunked) or name in arrays:
            what = "is there twice" if name in arrays else f"is {shown(value)}, not an array"
            raise ValueError(f"{path}: entry {shown(name)} {what}")
        arrays[name] = array.lazy()
    return arrays


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of all entries that are not maps, or are an array in chunks."""
    for key, value in tree.items():
        if isinstance(value, dict) and _CHUNKED not in value:
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _joined(value: dict[str, Any]) -> _Chunked:
    """The array in chunks."""
    shape, chunks = (_in_order(value.get(key)) for key in ("shape", "chunks"))
    if value.keys() != {_CHUNKED, "shape", "chunks"} or not shape or not is_shape(shape) or len(shape) != 2:
        raise ValueError("an array in chunks is not described by the shape of a matrix and chunks")
    if not chunks or not all(isinstance(chunk, Stored) and len(chunk.shape) == 1 for chunk in chunks):
        raise ValueError("a chunk is not an array of one dimension")
    if len({chunk.dtype for chunk in chunks}) > 1:
        raise ValueError("its chunks have different dtypes")
    *starts, size = itertools.accumulate((chunk.shape[0] for chunk in chunks), initial=0)
    if size != math.prod(shape):
        raise ValueError(f"its chunks have {size} elements, but its shape is {shape}")
    return _Chunked(shape, chunks, tuple(starts))


def _in_order(content: Any) -> tuple:
    """The values of a tuple, which Flax writes as a map from "0", "1", ...; () if it is anything else."""
    keys = [str(i) for i in range(len(content))] if isinstance(content, dict) else []
    return tuple(content[key] for key in keys) if keys and content.keys() == set(keys) else ()
