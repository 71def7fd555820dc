"""Lazy arrays: shape, dtype, and a function that reads any part of an array that is not in memory."""

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from opt_jax.checkpoints import chunks
from opt_jax.checkpoints.chunks import Shape, pieces

_ALIGNMENT = 64  # bytes; XLA's on a CPU
_HUGE_PAGES_FROM = 4 << 20  # bytes; for such arrays NumPy asks for huge pages
Checks = tuple[Callable[[], object], ...]  # comparisons that are run later because they read data; raise ValueError


@dataclass(frozen=True)
class LazyArray:
    """An array that is not in memory: in a file, in an Orbax directory, or in parts to be joined.

    Attributes:
      read: returns the part at an index with one slice (start and stop, step 1) per dimension. It may be a view with
        any strides and alignment, of memory that changes later. `load` returns a copy.
      chunk: the array is stored as a grid of chunks of this shape, and reading a part of a chunk reads the complete
        chunk. None: any part can be read alone.
      copied: what `read` returns is a copy of which nobody else has a view, so `load` need not copy it again. This
        `read` also takes a buffer (see `load`) to put the copy into.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[..., np.ndarray]
    chunk: Shape | None = None
    copied: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> "LazyArray":  # noqa: N802  (as numpy.ndarray.T)
        chunk = None if self.chunk is None else self.chunk[::-1]
        read = lambda index, *buffer: self.read(index[::-1], *buffer).T  # noqa: E731
        return LazyArray(self.shape[::-1], self.dtype, read, chunk, self.copied)

    def load(self, index: Sequence[slice] | None = None, buffer: np.ndarray | None = None) -> np.ndarray:
        """A C-contiguous copy, in native byte order, of the array or of the part at `index`.

        Args:
          index: one slice per dimension; None: the complete array.
          buffer: uint8 [at least twice the bytes of the part], aligned to the dtype: memory for the result, and for
            what it is copied from. The next call with it overwrites the result. (To allocate takes as long as to copy.)
        """
        index = (slice(None),) * len(self.shape) if index is None else index
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True))
        view = self.read(index) if buffer is None or not self.copied else self.read(index, buffer)
        dtype = self.dtype.newbyteorder("=")
        if self.copied and view.flags.c_contiguous and view.dtype == dtype:
            return view
        out = empty(view.shape, dtype, None if buffer is None else buffer[len(buffer) // 2 :])
        copy_blocked(out, view)
        return out


def empty(shape: Shape, dtype: np.dtype, buffer: np.ndarray | None = None) -> np.ndarray:
    """An uninitialised array in `buffer` (uint8), or in new memory that JAX can use on a CPU without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    if buffer is None and nbytes >= _HUGE_PAGES_FROM:
        # A virtual machine returns free huge pages to its host, and to get one back takes longer than 512 small ones
        # that were freed just now. JAX asks for none, either.
        buffer = np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    elif buffer is None:
        buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
        buffer = buffer[-buffer.ctypes.data % _ALIGNMENT :]
    return buffer[:nbytes].view(dtype).reshape(shape)


def copy_blocked(out: np.ndarray, view: np.ndarray) -> None:
    """out[...] = view. NumPy alone reads a transposed matrix column by column: five times slower than this."""
    if view.ndim == 2 and view.strides[0] < view.strides[1]:
        for start in range(0, view.shape[1], 16):
            out[:, start : start + 16] = view[:, start : start + 16]
    else:
        out[...] = view


def first_difference(a: LazyArray, b: LazyArray) -> tuple[int, ...] | None:
    """The index of the first element whose bits differ (equal NaNs do not); () if shape or dtype differ; else None."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return ()
    row = max(1, math.prod(a.shape[1:])) * a.dtype.itemsize
    for index in pieces(a.shape, (max(1, chunks.CHUNK_BYTES // row), *a.shape[1:])[: len(a.shape)]):
        ours, theirs = (x.load(index) for x in (a, b))
        bits = f"u{a.dtype.itemsize}"
        if (differ := ours.view(bits) != theirs.view(bits)).any():
            where = np.argwhere(differ)[0]
            return tuple(int(i) + s.start for i, s in zip(where, index, strict=True))
    return None
