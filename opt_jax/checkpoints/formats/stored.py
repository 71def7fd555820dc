"""A tensor in a file: its offset and strides, and how to read any part of it.

It is read by `pread` and not through a memory map. If a mapped file is truncated, or its disk fails, SIGBUS kills the
process without a message; and mapped pages that were read count as the process's memory.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opt_jax.checkpoints.arrays import LazyArray, empty
from opt_jax.checkpoints.chunks import Index, Shape
from opt_jax.system.reading import open_regular


class Stored(NamedTuple):
    """A tensor in a file. `offset` and `strides` are in bytes."""

    path: Path
    offset: int
    shape: Shape
    strides: Shape
    dtype: np.dtype

    def lazy(self) -> LazyArray:
        return LazyArray(self.shape, self.dtype, self.read, copied=True)

    def read(self, index: Index, buffer: np.ndarray | None = None) -> np.ndarray:
        """A copy of the part at the index. Of rows or columns of a matrix exactly their bytes are read.

        Args:
          index: one slice per dimension.
          buffer: see `LazyArray.load`.

        Raises:
          ValueError: the file is shorter than when it was opened, or is no longer a regular file.
          OSError: it cannot be read.
        """
        shape = tuple(s.stop - s.start for s in index)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        start = self.offset + sum(s.start * step for s, step in zip(index, self.strides, strict=True))
        with open_regular(self.path) as opened:
            file = opened.fileno()
            item = self.dtype.itemsize
            dense = tuple(math.prod(shape[i + 1 :]) * item for i in range(len(shape)))
            steps = tuple(step if n > 1 else d for step, n, d in zip(self.strides, shape, dense, strict=True))
            if steps == dense or len(shape) > 1 and steps[1:] == dense[1:] and steps[0] >= dense[0]:
                out = empty(shape, self.dtype, buffer)
                if steps == dense:
                    fill(self.path, file, out, start)
                else:  # some columns: read row by row
                    for i in range(shape[0]):
                        fill(self.path, file, out[i], start + i * steps[0])
                return out
            if len(shape) == 2 and steps[0] < steps[1]:  # stored by columns: read as rows of the transposed matrix
                transposed = self._replace(shape=self.shape[::-1], strides=self.strides[::-1])
                return transposed.read(index[::-1], buffer).T
            extent = sum((n - 1) * step for n, step in zip(shape, self.strides, strict=True)) + item
            run = np.empty(extent, np.uint8)  # any other strides: read all bytes from the first to the last
            fill(self.path, file, run, start)
            return np.ndarray(shape, self.dtype, run.data, 0, self.strides)


def fill(path: Path, file: int, out: np.ndarray, offset: int) -> None:
    """Read the bytes of `out`, a contiguous array, from the file of this descriptor. Raises as `Stored.read`."""
    data = out.reshape(-1).view(np.uint8).data
    while data:
        count = os.preadv(file, [data], offset)
        if count == 0:
            raise ValueError(f"{path} is shorter than it was when it was opened: something is writing to it")
        data, offset = data[count:], offset + count


def locate(path: Path, mapped, view: np.ndarray) -> Stored:
    """The place in the file of `view`, an array that is a view of the file's memory map `mapped`."""
    base = np.frombuffer(mapped, np.uint8).ctypes.data
    offset = view.ctypes.data - base if view.size else 0
    return Stored(path, offset, view.shape, view.strides, view.dtype)


def open_tensor(path: Path, mapped, view: np.ndarray) -> LazyArray:
    """The same as a lazy array; of a file in an object store, which is in memory, the view itself."""
    if "://" in os.fspath(path):
        return LazyArray(view.shape, view.dtype, view.__getitem__)
    return locate(path, mapped, view).lazy()
