"""A tensor in a file: where it is, and how to read any part of it.

By `pread`, not through a mapping: if a mapped file is truncated meanwhile, or its disk fails, the process dies without
a word (SIGBUS), and the pages that were looked at count as its memory.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.chunks import Index, Shape
from opt_jax.system.reading import open_regular


class Stored(NamedTuple):
    """Offset and strides in bytes."""

    path: Path
    offset: int
    shape: Shape
    strides: Shape
    dtype: np.dtype

    def lazy(self) -> LazyArray:
        return LazyArray(self.shape, self.dtype, self.read)

    def read(self, index: Index) -> np.ndarray:
        """A copy of the part at the index; of a matrix in rows or columns exactly its bytes are read.

        Raises:
          ValueError: the file is shorter than when it was opened, or no regular file any more.
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
                out = np.empty(shape, self.dtype)
                if steps == dense:
                    self._fill(file, out, start)
                else:  # some columns: row by row
                    for i in range(shape[0]):
                        self._fill(file, out[i], start + i * steps[0])
                return out
            if len(shape) == 2 and steps[0] < steps[1]:  # stored in columns: as the transposed matrix's rows
                return self._replace(shape=self.shape[::-1], strides=self.strides[::-1]).read(index[::-1]).T
            extent = sum((n - 1) * step for n, step in zip(shape, self.strides, strict=True)) + item
            run = np.empty(extent, np.uint8)  # transposed, expanded, ...: all from its first to its last byte
            self._fill(file, run, start)
            return np.ndarray(shape, self.dtype, run.data, 0, self.strides)

    def _fill(self, file: int, out: np.ndarray, offset: int) -> None:
        data = out.reshape(-1).view(np.uint8).data
        while data:
            count = os.preadv(file, [data], offset)
            if count == 0:
                raise ValueError(f"{self.path} is shorter than it was when it was opened: something is writing to it")
            data, offset = data[count:], offset + count


def locate(path: Path, mapped, view: np.ndarray) -> Stored:
    """Where a view of the mapped file lies in it."""
    base = np.frombuffer(mapped, np.uint8).ctypes.data
    offset = view.ctypes.data - base if view.size else 0
    return Stored(path, offset, view.shape, view.strides, view.dtype)
