"""Arrays on disk: reads and writes Orbax pytrees piece by piece, and makes directories appear all at once.

Nothing here knows what a model is. A tensor is a `LazyArray`: shape, dtype, and how to read any part of it. What is in
memory at a time is a few pieces of `CHUNK_BYTES`, whatever the size of the tensors.
"""

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

Shape = tuple[int, ...]
Index = tuple[slice, ...]

CHUNK_BYTES = 32 << 20  # of one stored chunk at most: what a process must read at least to fill its shard
_THREADS = min(4, os.cpu_count() or 1)  # each holds a chunk or two


@dataclass(frozen=True)
class LazyArray:
    """An array that is somewhere else: in a mapped file, in an Orbax directory, in parts to be joined.

    Attributes:
      read: the part at an index with one slice (start and stop, step 1) per dimension. May be a view of any strides
        and alignment, of memory that changes later: use `load`, which copies.
      release: gives back the memory that reading has taken (pages of mapped files).
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    release: Callable[[], None] = lambda: None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> "LazyArray":
        return LazyArray(self.shape[::-1], self.dtype, lambda index: self.read(index[::-1]).T, self.release)

    def load(self, index: Sequence[slice] | None = None) -> np.ndarray:
        """A C-contiguous copy, in native byte order, of the whole or of the part at `index`."""
        index = (slice(None),) * len(self.shape) if index is None else index
        view = self.read(tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True)))
        out = np.empty(view.shape, self.dtype.newbyteorder("="))
        copy_blocked(out, view)
        self.release()
        return out


def copy_blocked(out: np.ndarray, view: np.ndarray) -> None:
    """out[...] = view. NumPy alone reads a transposed matrix column by column: five times slower than this."""
    if view.ndim == 2 and view.strides[0] < view.strides[1]:
        for start in range(0, view.shape[1], 16):
            out[:, start : start + 16] = view[:, start : start + 16]
    else:
        out[...] = view


# Writing ----------------------------------------------------------------------------------------------------


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `LazyArray`s chunk by chunk (Orbax alone starts all arrays at once, on copies). On disk they are what
    NumpyHandler writes: any Orbax reads them. Several processes write each its part of the chunks."""

    def __init__(self, progress: Callable[[str, int], None]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._progress, self._count, self._lock = progress, 0, threading.Lock()

    async def serialize(self, values: Sequence[Any], infos, args=None):
        with ThreadPoolExecutor(_THREADS) as pool:
            for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                await info.await_path_creation()
                self._write(pool, value, info, arg)
        return []

    def _write(self, pool: ThreadPoolExecutor, value: LazyArray, info, arg) -> None:
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=info.is_ocdbt_checkpoint,
            global_shape=value.shape,
            local_shape=value.shape,
            dtype=value.dtype,
            process_index=jax.process_index(),
            arg=arg,
        )
        store = ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context).result()

        def write(index: Index) -> None:
            piece = value.load(index)
            store[index].write(piece, can_reference_source_data_indefinitely=True).result()
            with self._lock:
                self._progress(info.name, piece.nbytes)

        mine = []
        for index in pieces(value.shape, store.chunk_layout.write_chunk.shape):
            if self._count % jax.process_count() == jax.process_index():
                mine.append(index)
            self._count += 1
        for _ in pool.map(write, mine):
            pass


def pieces(shape: Shape, piece: Sequence[int]) -> Iterator[Index]:
    """The indices of the parts of an array that are at most `piece` large; () has one."""
    starts = (range(0, n, step) for n, step in zip(shape, piece, strict=True))
    for corner in product(*starts):
        yield tuple(slice(i, min(i + step, n)) for i, step, n in zip(corner, piece, shape, strict=True))


def write_arrays(
    directory: Path, arrays: Mapping[str, LazyArray], progress: Callable[[str, int], None] = lambda name, nbytes: None
) -> None:
    """Write arrays, dotted path -> array, as an Orbax pytree to the new `directory`.

    All processes of a `jax.distributed` job must call this together; each reads and writes its part.

    progress: called after each chunk with its array's path and its bytes, by several threads, one at a time.
    """
    tree = nest(arrays)
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyHandler(progress)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # Weights do not compress: zstd makes writing several times slower for a few percent.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree, save_args=save_args))


# Reading ----------------------------------------------------------------------------------------------------


def open_arrays(directory: Path) -> dict[str, LazyArray]:
    """The arrays of an Orbax pytree, dotted path -> array, as `write_arrays` or a training run's checkpoint wrote them.

    Layers stacked by a training run (`....layers.fc1.kernel`, [L, ...]) appear one by one (`....layers.0.fc1.kernel`).

    Raises:
      ValueError: the directory is damaged, or has a form that is not ours. So does reading an array whose data are.
    """
    directory = directory.absolute()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree: Any = checkpointer.metadata(directory).item_metadata
        if tree is None:  # Orbax keeps the reason to itself
            raise ValueError("its metadata are damaged or do not belong to its data")
        leaves = flatten(tree.tree)
        zarr3 = json.loads((directory / "_METADATA").read_bytes()).get("use_zarr3", False)
        found = {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in leaves.items()}
    except Exception as e:  # Orbax and TensorStore raise nearly anything for a damaged checkpoint
        raise ValueError(f"{directory} cannot be read: {' '.join(str(e).split())}") from e
    arrays: dict[str, LazyArray] = {}
    for path, (shape, dtype) in found.items():
        stored = _Stored(directory, path, "zarr3" if zarr3 else "zarr")
        before, layers, after = path.partition(".layers.")
        if layers and not after[:1].isdigit():
            for i in range(shape[0]):
                read = lambda index, stored=stored, i=i: stored.read((slice(i, i + 1), *index))[0]  # noqa: E731
                arrays[f"{before}.layers.{i}.{after}"] = LazyArray(shape[1:], dtype, read)
        else:
            arrays[path] = LazyArray(shape, dtype, stored.read)
    return arrays


@dataclass
class _Stored:
    """One array of an Orbax directory; opened when it is first read."""

    directory: Path
    name: str
    driver: str
    store: Any = None

    def read(self, index: Index) -> np.ndarray:
        try:
            if self.store is None:
                base = f"file://{self.directory}/"
                kvstore = {"driver": "ocdbt", "base": base, "path": f"{self.name}/"}
                self.store = ts.open({"driver": self.driver, "kvstore": kvstore}, read=True, open=True).result()
            return self.store[index].read().result()
        except ValueError as e:
            raise ValueError(f"{self.directory}: tensor {self.name} cannot be read: {' '.join(str(e).split())}") from e


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
