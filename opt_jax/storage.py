"""Arrays on disk: reads and writes Orbax pytrees piece by piece, and makes directories appear all at once.

A tensor is a `LazyArray`: shape, dtype, and how to read any part of it. What is in memory at a time is a few pieces of
`CHUNK_BYTES`, whatever the size of the tensors. In a `jax.distributed` job each process writes its part of the pieces.
"""

import errno
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from opt_jax import chunks, hub
from opt_jax.chunks import Index, Shape, pieces
from opt_jax.disk import disk_errors, free_bytes, without_tracebacks
from opt_jax.reading import one_line, read_small
from opt_jax.temporary import MARKER, TemporaryPlace, refuse_links

Checks = tuple[Callable[[], object], ...]  # comparisons put off because they read data; each raises ValueError

CHUNK_BYTES = 32 << 20  # of one stored chunk at most: what a process must read at least to fill its shard
_MAX_LAYERS = 10_000  # more are damage, not depth
_THREADS = 4  # each holds a chunk or two; while some wait for the disk, others transpose
# Chunks that end together share a commit, of which an object store does one in a second. (A gigabyte of buffers.)
_REMOTE_THREADS = 32


@dataclass(frozen=True)
class LazyArray:
    """An array that is somewhere else: in a file, in an Orbax directory, in parts to be joined.

    Attributes:
      read: the part at an index with one slice (start and stop, step 1) per dimension. May be a view of any strides
        and alignment, of memory that changes later: use `load`, which copies.
      in_chunks: it is stored as a grid of chunks, and reading any part of one reads all of it.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    in_chunks: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> "LazyArray":
        return LazyArray(self.shape[::-1], self.dtype, lambda index: self.read(index[::-1]).T, self.in_chunks)

    def load(self, index: Sequence[slice] | None = None, buffer: np.ndarray | None = None) -> np.ndarray:
        """A C-contiguous copy, in native byte order, of the whole or of the part at `index`.

        buffer: uint8 [at least as many bytes]; the copy is made there (new memory costs as much time as copying).
        """
        index = (slice(None),) * len(self.shape) if index is None else index
        view = self.read(tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True)))
        buffer = np.empty(view.size * self.dtype.itemsize, np.uint8) if buffer is None else buffer
        out = buffer[: view.size * self.dtype.itemsize].view(self.dtype.newbyteorder("=")).reshape(view.shape)
        copy_blocked(out, view)
        return out


def copy_blocked(out: np.ndarray, view: np.ndarray) -> None:
    """out[...] = view. NumPy alone reads a transposed matrix column by column: five times slower than this."""
    if view.ndim == 2 and view.strides[0] < view.strides[1]:
        for start in range(0, view.shape[1], 16):
            out[:, start : start + 16] = view[:, start : start + 16]
    else:
        out[...] = view


def first_difference(a: LazyArray, b: LazyArray) -> tuple[int, ...] | None:
    """The index of the first element whose bits differ (a NaN equals itself); () if shape or dtype do; None: equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return ()
    row = max(1, math.prod(a.shape[1:])) * a.dtype.itemsize
    for index in pieces(a.shape, (max(1, CHUNK_BYTES // row), *a.shape[1:])[: len(a.shape)]):
        ours, theirs = (x.load(index) for x in (a, b))
        bits = f"u{a.dtype.itemsize}"
        if (differ := ours.view(bits) != theirs.view(bits)).any():
            where = np.argwhere(differ)[0]
            return tuple(int(i) + s.start for i, s in zip(where, index, strict=True))
    return None


# Writing ----------------------------------------------------------------------------------------------------


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `LazyArray`s chunk by chunk (Orbax alone starts all arrays at once, on copies). On disk they are what
    NumpyHandler writes: any Orbax reads them."""

    def __init__(self, threads: int, progress: Callable[[str, int], None]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.stop = threading.Event()  # set: the next chunk raises
        self._threads, self._progress, self._lock = threads, progress, threading.Lock()
        self._local = threading.local()

    async def serialize(self, values: Sequence[Any], infos, args=None):
        error, pool, opening = None, ThreadPoolExecutor(self._threads), []
        try:
            for info in infos:
                await info.await_path_creation()
            for what in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                opening.append(self._open(*what))
            stores = [store.result() for store in opening]
            stored = [
                (value, info.name, store, index)
                for value, info, store in zip(values, infos, stores, strict=True)
                for index in pieces(value.shape, store.chunk_layout.write_chunk.shape)
            ]
            mine = stored[jax.process_index() :: jax.process_count()]
            for written in [pool.submit(self._write, *chunk) for chunk in mine]:
                written.result()
        except Exception as e:
            error = e
        finally:
            for store in opening:
                store.exception()  # waits: TensorStore goes on with what it has begun
            pool.shutdown(cancel_futures=True)
        agree(error)  # here, or the other processes would go on and wait for this one
        return []

    def _open(self, value: LazyArray, info, arg) -> Any:
        spec = chunks.write_spec(info, arg, value.shape, value.shape, value.dtype)
        return ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)

    def _write(self, value: LazyArray, name: str, store: ts.TensorStore, index: Index) -> None:
        if self.stop.is_set():
            raise InterruptedError
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.empty(CHUNK_BYTES, np.uint8)
        piece = value.load(index, self._local.buffer)
        # The buffer is free again when the write has been committed, which is what `result` waits for.
        store[index].write(piece, can_reference_source_data_indefinitely=True).result()
        with self._lock:
            self._progress(name, piece.nbytes)


def write_arrays(
    directory: Path,
    arrays: Mapping[str, LazyArray | jax.Array],
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Write arrays, dotted path -> array, as an Orbax pytree to the new `directory`.

    All processes of a `jax.distributed` job must call this together; each reads and writes its part.

    progress: called after each chunk with its array's path and its bytes, by several threads, one at a time.

    Raises:
      ValueError: see `hub.check_array_path`.
    """
    hub.check_array_path(directory)
    tree, lazy = nest(arrays), _LazyHandler(_REMOTE_THREADS if hub.is_remote(directory) else _THREADS, progress)
    handler = chunks.pytree_handler((LazyArray, lazy), (jax.Array, chunks.ShardHandler()))
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)

    def save() -> None:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(hub.absolute(directory), args=ocp.args.PyTreeSave(tree, save_args=save_args))

    # In a thread, because Ctrl-C is for the main one: amid TensorStore's work it would leave writes behind that go on,
    # in a directory that is being removed. So it waits here for the chunks at hand.
    nbytes = sum(array.nbytes for array in arrays.values())
    with without_tracebacks(), disk_errors(directory, nbytes), ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(save).result()
        except BaseException:
            lazy.stop.set()
            raise


def agree(error: Exception | None) -> None:
    """Raise on every process if one of them has an error: its own where it is, a reference to that one elsewhere."""
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(error is not None)))
        if len(failed) and error is None:
            raise OSError(f"process {failed[0]} failed: see its message")
    if error is not None:
        raise error


def on_every_process(action: Callable[[], object]) -> None:
    """Run `action` on all processes, which fail together if one does."""
    error = None
    try:
        action()
    except Exception as e:
        error = e
    agree(error)


def on_first_process(action: Callable[[], object]) -> None:
    """Run `action` on process 0 alone; the others wait for it, and fail if it does."""
    on_every_process(action if jax.process_index() == 0 else lambda: None)


# Directories ------------------------------------------------------------------------------------------------


@contextmanager
def new_directory(
    path: str | os.PathLike, overwrite: bool = False, replaceable: Callable[[Path], bool] = hub.is_orbax
) -> Iterator[Path]:
    """A temporary directory beside `path` that becomes `path` when the block ends, and vanishes if it raises. In an
    object store, which renames no directories, `path` itself: what is there is a model once it has its config.json,
    which is to be written last, and what `overwrite` replaces goes at the start.

    What a killed process has left behind is cleaned up by the next one with the same `path`, and nothing else is (see
    `temporary.py`). All processes of a `jax.distributed` job enter and leave together.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false, or it is not `replaceable`; it or the temporary directory
        is a link; the latter holds what is not ours; or another process is writing it now.
    """
    if hub.is_remote(path):
        remote = epath.Path(path)
        on_first_process(lambda: _begin_remote(remote, overwrite))
        try:
            yield hub.as_path(path)
        except BaseException:
            if jax.process_index() == 0:
                _clear_remote(remote)
            raise
        on_first_process((remote / MARKER).unlink)
        return
    refuse_links(path := hub.as_path(path))
    path = Path(os.path.realpath(path))
    place = TemporaryPlace(path.with_name(f".{path.name}.new"), "new|old")
    new, old = place.path / "new", place.path / "old"

    def begin() -> None:
        check_destination(path, overwrite, replaceable)
        held.enter_context(place.locked(wait=False))
        held.callback(place.remove)
        if old.exists() and not path.exists():  # killed between the two renamings below
            old.rename(path)
            check_destination(path, overwrite, replaceable)
        place.clear()
        new.mkdir()

    def publish() -> None:
        check_destination(path, overwrite, replaceable)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:  # whatever went wrong, Ctrl-C included
            if old.exists() and not path.exists():
                old.rename(path)

    with ExitStack() as held:  # of process 0: the lock, until nothing is left to do
        on_first_process(begin)
        yield new
        on_first_process(publish)


def _begin_remote(path: epath.Path, overwrite: bool) -> None:
    _check_remote(path, overwrite)
    (path / MARKER).write_bytes(b"")  # now all that is here may be cleared, also by the next one if this one is killed
    (path / "config.json").unlink(missing_ok=True)
    _clear_remote(path, but=MARKER)


def _check_remote(path: epath.Path, overwrite: bool) -> None:
    names = [entry.name for entry in path.iterdir()] if path.exists() else []
    if "config.json" in names and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or pass overwrite=True (--overwrite)")
    if MARKER in names:  # of a process that was killed
        parts = {name.partition(".orbax-checkpoint-tmp")[0] for name in names} - {MARKER}
        foreign = next((name for name in parts if not hub.is_model_file(name)), None)
    elif names and not ("config.json" in names and hub.is_orbax(path)):
        raise FileExistsError(f"{path} holds {names[0]}, but is not a model directory: choose another name")
    else:
        foreign = hub.foreign_file(path) if names else None
    if foreign:
        raise FileExistsError(f"{path} holds {foreign}, which is no part of a model: choose another name")


def _clear_remote(path: epath.Path, but: str = "") -> None:
    entries = [entry for entry in path.iterdir() if entry.name != but] if path.exists() else []
    for entry in sorted(entries, key=lambda entry: entry.name == MARKER):  # the marker last
        entry.rmtree() if entry.is_dir() else entry.unlink()


def check_destination(path: Path, overwrite: bool, replaceable: Callable[[Path], bool] = hub.is_orbax) -> None:
    """Raise FileExistsError where `new_directory` would refuse to write."""
    if hub.is_remote(path):
        return _check_remote(epath.Path(path), overwrite)
    refuse_links(path)
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or pass overwrite=True (--overwrite)")
    if not (replaceable(path) or path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is not a model directory, so it will not be overwritten: remove it yourself")
    if foreign := hub.foreign_file(path):
        raise FileExistsError(
            f"{path} holds {foreign}, which is no part of a model, so it will not be overwritten: move it elsewhere"
        )


def check_space(path: Path, nbytes: int) -> None:
    """Raise OSError unless `nbytes` more fit on the disk where `path` is to be, if it is on one."""
    if hub.is_remote(path):
        return
    if (free := free_bytes(path)) < nbytes:
        what = f"{nbytes / 1e6:,.1f} MB are needed, but {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{what}: make room there, or choose another disk", str(path))


# Reading ----------------------------------------------------------------------------------------------------


def open_stored(directory: Path, verify: bool = True) -> dict[str, LazyArray]:
    """The arrays of an Orbax pytree, dotted path -> array, as `write_arrays` or a training run's checkpoint wrote them.

    verify: compare each chunk that is read with its checksum. Where there are none, a warning says so.

    Raises:
      ValueError: the directory is damaged, or has a form that is not ours. So does reading an array whose data are.
    """
    directory = hub.absolute(directory)
    # With a cache for the index of chunks, or every array would read it anew.
    context = ts.Context({"cache_pool#index": {"total_bytes_limit": 100_000_000}})
    try:
        base = {"driver": "ocdbt", "base": hub.array_url(directory), "cache_pool": "cache_pool#index"}
        if not hub.is_remote(directory):
            chunks.check_files(directory)
        # Not by way of Orbax's own metadata: it reads them all at once and, when one is damaged, its threads print
        # tracebacks. The names are what it makes of a tree's keys.
        if "tree_metadata" not in json.loads(read_small(directory / "_METADATA")):
            raise ValueError("_METADATA describes no tree")
        specs, checked = chunks.array_specs(base, context)
        opening = {path: ts.open(spec, read=True, open=True, context=context) for path, spec in specs.items()}
        stores = {path: store.result() for path, store in opening.items()}
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{directory} cannot be read: {one_line(e)}") from e
    if verify and not checked:
        warnings.warn(
            f"{directory.parent} has no checksums: an older version wrote it, and damage in it goes unnoticed; write "
            "it again to add them",
            stacklevel=2,
        )
    arrays: dict[str, LazyArray] = {}
    for path, store in stores.items():
        read = _Stored(directory, path, store, verify or not checked).read
        arrays[path] = LazyArray(store.shape, store.dtype.numpy_dtype, read, in_chunks=True)
    return arrays


def open_arrays(directory: Path, verify: bool = True) -> dict[str, LazyArray]:
    """`open_stored`, where layers that a training run has stacked (`....layers.fc1.kernel`, [L, ...]) appear one by one
    (`....layers.0.fc1.kernel`)."""
    arrays: dict[str, LazyArray] = {}
    for path, stored in open_stored(directory, verify).items():
        shape = stored.shape
        before, layers, after = path.partition(".layers.")
        if layers and not after[:1].isdigit():
            if not shape or shape[0] > _MAX_LAYERS:
                raise ValueError(f"{directory}: tensor {path} has shape {shape}, which no stack of layers has")
            for i in range(shape[0]):
                read = lambda index, stored=stored, i=i: stored.read((slice(i, i + 1), *index))[0]  # noqa: E731
                arrays[f"{before}.layers.{i}.{after}"] = LazyArray(shape[1:], stored.dtype, read, in_chunks=True)
        else:
            arrays[path] = stored
    return arrays


@dataclass
class _Stored:
    """One array of an Orbax directory."""

    directory: Path
    name: str
    store: ts.TensorStore
    verify: bool

    def read(self, index: Index) -> np.ndarray:
        try:
            return self.store[index].read().result() if self.verify else chunks.read_unverified(self.store, index)
        except ValueError as e:
            raise ValueError(f"{self.directory}: tensor {self.name} cannot be read: {one_line(e)}") from e


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
