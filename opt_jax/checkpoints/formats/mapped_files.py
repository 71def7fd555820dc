"""Files of arrays, mapped into memory: what the readers of safetensors and of torch's files share."""

import math
import mmap
import os
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from opt_jax.system.reading import open_regular

_MAX_SIZE = 1 << 60  # elements; NumPy counts bytes in 63 bits
_MAX_DIMENSIONS = 32


class Tensors(dict[str, np.ndarray]):
    """Tensor name -> read-only view into the mapped file, with any strides and alignment. See `stored.locate`."""

    def __init__(self, mapped: mmap.mmap) -> None:
        super().__init__()
        self.map = mapped


def open_file(path: Path) -> IO[bytes]:
    """The file, opened for reading.

    Raises:
      ValueError: the file is empty, a Git LFS pointer or not a regular file (`open_regular`).
      OSError: it cannot be read.
    """
    file = open_regular(path)
    try:
        _check_start(path, file.read(24))
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _check_start(path: Path, start: bytes) -> None:
    if not start:
        raise ValueError(f"{path} is empty")
    if start == b"version https://git-lfs.":
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, read-only; those of a file in an object store, in memory. Raises as `open_file`."""
    if "://" in os.fspath(path):
        content = path.read_bytes()
        _check_start(path, content[:24])
        mapped = mmap.mmap(-1, len(content))
        mapped.write(content)
        return mapped
    with open_file(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def little_endian(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name)).newbyteorder("<")


def is_size(*numbers: Any) -> bool:
    return all(type(n) is int and 0 <= n < _MAX_SIZE for n in numbers)


def is_shape(shape: Any) -> bool:
    """Whether it is a shape that a NumPy array can have."""
    if type(shape) not in (list, tuple) or len(shape) > _MAX_DIMENSIONS or not is_size(*shape):
        return False
    return math.prod(n or 1 for n in shape) < _MAX_SIZE


def shown(what: Any) -> str:
    """A name or text from a file for use in a message: no control characters, at most 160 characters."""
    text = str(what)
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return text if len(text) <= 160 else f"{text[:100]}...{text[-50:]}"
