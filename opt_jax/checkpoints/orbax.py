"""Arrays on disk: reads and writes Orbax pytrees piece by piece.

A tensor is a `LazyArray`. A few pieces of `chunks.CHUNK_BYTES` are in memory at a time, whatever the size of the
tensors. In a `jax.distributed` job each process writes its part of the pieces.
"""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from opt_jax.checkpoints import chunks, hub
from opt_jax.checkpoints.arrays import LazyArray, empty
from opt_jax.checkpoints.chunks import Index, pieces
from opt_jax.parallel.agreement import agree
from opt_jax.system.disk import disk_errors, without_tracebacks
from opt_jax.system.messages import one_line
from opt_jax.system.reading import json_object, read_small

_MAX_LAYERS = 10_000  # a file that claims more is damaged
_THREADS = 4  # each holds two chunks; some transpose while others wait for the disk
# Chunks that end together share a commit, and an object store commits once a second. (Takes two gigabytes of buffers.)
_REMOTE_THREADS = 64


# Writing ----------------------------------------------------------------------------------------------------


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `LazyArray`s chunk by chunk, where Orbax itself would start all arrays at once, on copies.

    On disk they have the form that NumpyHandler writes, so any Orbax reads them.
    """

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
                store.exception()  # waits, because TensorStore continues what it has begun
            pool.shutdown(cancel_futures=True)
        agree(error)  # otherwise the other processes would continue and wait for this one
        return []

    def _open(self, value: LazyArray, info, arg) -> Any:
        spec = chunks.write_spec(info, arg, value.shape, value.shape, value.dtype)
        return ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)

    def _write(self, value: LazyArray, name: str, store: ts.TensorStore, index: Index) -> None:
        if self.stop.is_set():
            raise InterruptedError
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.empty(2 * chunks.CHUNK_BYTES, np.uint8)
        piece = value.load(index, self._local.buffer)
        # `result` waits for the commit, after which the buffer is free again.
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
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunks.CHUNK_BYTES), tree)

    def save() -> None:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(hub.absolute(directory), args=ocp.args.PyTreeSave(tree, save_args=save_args))

    # In a thread, because Python raises KeyboardInterrupt in the main thread. Raised inside of `save`, it would leave
    # TensorStore writing into a directory that is being removed. Here it waits for the current chunks.
    nbytes = sum(array.nbytes for array in arrays.values())
    with without_tracebacks(), disk_errors(directory, nbytes), ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(save).result()
        except BaseException:
            lazy.stop.set()
            raise


# Reading ----------------------------------------------------------------------------------------------------


def open_stored(directory: Path, verify: bool = True) -> dict[str, LazyArray]:
    """The arrays of an Orbax pytree, dotted path -> array, as `write_arrays` or a training run's checkpoint wrote them.

    Args:
      directory: the directory of the pytree, with `_METADATA`.
      verify: compare each chunk that is read with its checksum. If there are none, warn.

    Raises:
      ValueError: the directory is damaged, or has another form. Reading a damaged array raises it too.
    """
    directory = hub.absolute(directory)
    # The cache is for the index of chunks, which otherwise every array would read again.
    context = ts.Context({"cache_pool#index": {"total_bytes_limit": 100_000_000}})
    try:
        base = {"driver": "ocdbt", "base": hub.array_url(directory), "cache_pool": "cache_pool#index"}
        if not hub.is_remote(directory):
            chunks.check_files(directory)
        # Without Orbax's own metadata reader: it reads all arrays at once and, if one is damaged, its threads print
        # tracebacks. Orbax derives the names from the tree's keys.
        if "tree_metadata" not in json_object(read_small(directory / "_METADATA"), "_METADATA"):
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
        chunk: Any = store.chunk_layout.read_chunk.shape
        arrays[path] = LazyArray(store.shape, store.dtype.numpy_dtype, read, chunk and tuple(chunk), copied=True)
    return arrays


def open_arrays(directory: Path, verify: bool = True) -> dict[str, LazyArray]:
    """As `open_stored`, with the stacked layers of a training run unstacked.

    `....layers.fc1.kernel` [L, ...] becomes `....layers.0.fc1.kernel` [...], and so on.
    """
    arrays: dict[str, LazyArray] = {}
    for path, stored in open_stored(directory, verify).items():
        shape = stored.shape
        before, layers, after = path.partition(".layers.")
        if layers and not after[:1].isdigit():
            if not shape or shape[0] > _MAX_LAYERS:
                raise ValueError(f"{directory}: tensor {path} has shape {shape}, which no stack of layers has")
            chunk = stored.chunk and stored.chunk[1:]
            for i in range(shape[0]):
                read = lambda part, *buffer, x=stored, i=i: x.read((slice(i, i + 1), *part), *buffer)[0]  # noqa: E731
                arrays[f"{before}.layers.{i}.{after}"] = LazyArray(shape[1:], stored.dtype, read, chunk, copied=True)
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

    def read(self, index: Index, buffer: np.ndarray | None = None) -> np.ndarray:
        try:
            if not self.verify:
                return chunks.read_unverified(self.store, index)
            # Not `store.read`, whose result JAX would copy: it is not aligned.
            out = empty(tuple(s.stop - s.start for s in index), self.store.dtype.numpy_dtype, buffer)
            assert out.flags.aligned, "TensorStore would read into a copy"
            ts.array(out).write(self.store[index]).result()
            return out
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
