"""The form of arrays in a directory: chunks with checksums; and the checks before TensorStore opens one.

Each chunk is a value of an OCDBT database and ends with its CRC-32C (zarr3's codec `crc32c`), which TensorStore
compares whenever it reads the chunk. The metadata of the arrays are in nodes of the database, which have their own
checksums.

Why not Orbax's v1 API (`orbax.checkpoint.experimental.v1`, tried with 0.12.8 on 2026-11-30): it reads these directories
and can split stacked arrays by layer (`shard_axes`), but its options have no codecs, and the registry of handlers for
leaves, where one that adds them would belong, is not public. What it writes has checksums for the index of chunks only:
with one bit flipped, a checkpoint loaded without an error and with another number. A `CheckpointableHandler`, which is
public, would have to do all else itself that Orbax does here, and join the databases of all processes.
"""

import asyncio
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import future

from opt_jax.system.reading import json_object

Shape = tuple[int, ...]
Index = tuple[slice, ...]

CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_CHECKSUM_BYTES = 4
_BATCH_BYTES = 1 << 30  # of chunks that are encoded, and then committed, together

# Limits on a foreign file. Orbax writes less than 1 kB of metadata and no chunk above 2 GiB.
_MAX_METADATA_BYTES = 64 << 10
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_DEPTH = 12
_MAX_RANK = 8
# The most of one stored chunk. A process reads at least one chunk to fill its shard. TensorStore has buffers as large
# as a chunk, and glibc gives those of 32 MiB and more back to the kernel each time.
CHUNK_BYTES = 16 << 20
_MAX_CHUNK_BYTES = 2 << 30
_MAX_FOLDERS = 6  # inside each other
_WIDTHS = {"bool": 1, "bfloat16": 2} | {
    f"{kind}{8 * width}": width
    for kind, widths in (("int", (1, 2, 4, 8)), ("uint", (1, 2, 4, 8)), ("float", (2, 4, 8)))
    for width in widths
}
_LETTERS = {"b": "bool", "i": "int", "u": "uint", "f": "float"}  # of zarr2's dtypes, as in "<f4"


def pieces(shape: Shape, piece: Sequence[int]) -> Iterator[Index]:
    """The indices that split an array into parts of at most the shape `piece`; a scalar has one part."""
    starts = (range(0, n, step) for n, step in zip(shape, piece, strict=True))
    for corner in product(*starts):
        yield tuple(slice(i, min(i + step, n)) for i, step, n in zip(corner, piece, shape, strict=True))


# Writing ----------------------------------------------------------------------------------------------------


def write_spec(
    info: ocp.type_handlers.ParamInfo, arg: ocp.SaveArgs, shape: Shape, part: Shape, dtype
) -> dict[str, Any]:
    """TensorStore's specification of a new array of shape `shape`; each process writes parts of the shape `part`."""
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=True,
        global_shape=shape,
        local_shape=part,
        dtype=dtype,
        process_index=jax.process_index(),
        arg=arg,
    )
    # Orbax offers no choice of codecs. Its default has checksums for the index of chunks only.
    spec["metadata"]["codecs"] = CODECS
    return spec


def pytree_handler(*handlers: tuple[type, ocp.type_handlers.TypeHandler]) -> ocp.PyTreeCheckpointHandler:
    """A handler that writes trees in the form of this module; `handlers` are (leaf type, its handler)."""
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    # Weights do not compress: zstd makes writing several times slower for a few percent.
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_zarr3=True, use_compression=False)


class ShardHandler(ocp.type_handlers.ArrayHandler):
    """Writes `jax.Array`s: each process writes the chunks of its shards, and replicas divide theirs among them.

    On disk they have the form that NumpyHandler writes, so any Orbax reads them, on any devices.
    """

    def typestr(self) -> str:
        return ocp.type_handlers.NumpyHandler().typestr()

    async def serialize(self, values: Sequence[Any], infos, args=None):
        """Returns when the arrays may be donated; the result waits for the disk."""
        local_shards = []
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            spec = write_spec(info, arg, value.shape, value.sharding.shard_shape(value.shape), value.dtype)
            chunk = spec["metadata"]["chunk_grid"]["configuration"]["chunk_shape"]
            local_shards.append((info, spec, chunks_of_process(value, chunk)))
        for _, _, shards in local_shards:
            for shard, _ in shards:
                shard.data.copy_to_host_async()
        writes = [(info, spec, list(on_host(shards))) for info, spec, shards in local_shards]
        return [future.CommitFutureAwaitingContractedSignals(self._write(writes), name="shards")]

    async def _write(self, writes: Sequence[tuple[Any, dict[str, Any], list[tuple[Index, np.ndarray]]]]) -> None:
        opening = []
        for info, spec, _ in writes:
            await info.await_path_creation()
            opening.append(ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context))
        stores = await _all(opening)
        batch, size = [], 0
        for store, (_, _, chunks) in zip(stores, writes, strict=True):
            for index, values in chunks:
                if size + values.nbytes > _BATCH_BYTES:
                    await _all(batch)
                    batch, size = [], 0
                # `values` is a copy that nothing changes.
                batch.append(store[index].write(values, can_reference_source_data_indefinitely=True))
                size += values.nbytes
        await _all(batch)


async def _all(futures: Sequence[Any]) -> list[Any]:
    """The results, once all have ended: a future that went on after an error would call a closed event loop."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def chunks_of_process(array: jax.Array, chunk: Sequence[int]) -> list[tuple[jax.Shard, list[Index]]]:
    """(shard, indices of chunks inside the shard) that this process writes."""
    shape = array.sharding.shard_shape(array.shape)
    replicas = len(array.sharding.device_set) * math.prod(shape) // max(1, array.size)
    shares = ((s, list(pieces(shape, chunk))[s.replica_id :: replicas]) for s in array.addressable_shards)
    return [(shard, indices) for shard, indices in shares if indices]


def on_host(shards: Sequence[tuple[jax.Shard, list[Index]]]) -> Iterator[tuple[Index, np.ndarray]]:
    """(index in the global array, values) of each chunk."""
    for shard, indices in shards:
        # On a CPU the host's copy shares its buffer with the array, which the next step may overwrite (donation).
        values = np.array(shard.data) if shard.device.platform == "cpu" else np.asarray(shard.data)
        corner = [s.start or 0 for s in shard.index]
        for index in indices:
            yield tuple(slice(s.start + i, s.stop + i) for s, i in zip(index, corner, strict=True)), values[index]


# Reading ----------------------------------------------------------------------------------------------------


def check_files(directory: Path) -> None:
    """Check that the local `directory` holds only regular files and directories; links are followed.

    Raises:
      ValueError: it holds anything else (reading a pipe would wait for ever), or a manifest larger than Orbax writes.
    """
    folders = [(directory, 0)]
    while folders:
        folder, depth = folders.pop()
        for path in folder.iterdir():
            if path.is_dir():
                if depth < _MAX_FOLDERS:  # we read nothing deeper, and links may form a circle
                    folders.append((path, depth + 1))
            elif not path.is_file():
                raise ValueError(f"{path} is not a regular file")
            elif path.name == "manifest.ocdbt" and path.stat().st_size > _MAX_MANIFEST_BYTES:
                raise ValueError(f"{path} is larger than a manifest may be ({_MAX_MANIFEST_BYTES:,} bytes)")


def array_specs(database: Mapping[str, Any], context: ts.Context) -> tuple[dict[str, dict[str, Any]], bool]:
    """The arrays of an OCDBT database: name -> TensorStore's specification to read it; and whether all have checksums.

    Reading a missing chunk will be an error; TensorStore's default is zeros.

    Raises:
      ValueError: there is no array, or metadata that Orbax does not write. (Some of these would crash TensorStore.)
    """
    store = ts.KvStore.open(dict(database), context=context).result()
    kinds = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
    keys = [(key, end) for key in store.list().result() for end in kinds if key.endswith(end.encode())]
    reading = [store.read(key) for key, _ in keys]
    specs, checked = {}, True
    for (key, end), content in sorted(zip(keys, reading, strict=True), key=lambda item: item[0][0]):
        checked &= _check_metadata(key.decode(), content.result().value, kinds[end])
        name = key.decode().removesuffix(end)
        if name in specs:
            raise ValueError(f"{name} is there twice, in zarr's formats 2 and 3: write the checkpoint again")
        kvstore = {**database, "path": name + "/"}
        specs[name] = {"driver": kinds[end], "kvstore": kvstore, "fill_missing_data_reads": False}
    if not specs:
        raise ValueError("it holds no arrays: manifest.ocdbt is missing, or names none")
    return specs, checked


def _check_metadata(key: str, content: bytes, driver: str) -> bool:
    """Whether the array's chunks have checksums.

    Raises:
      ValueError: the content is not an array's metadata, or not as Orbax writes it.
    """
    if len(content) > _MAX_METADATA_BYTES:
        raise ValueError(f"{key}: {len(content):,} bytes of metadata are more than an array has")
    try:
        metadata = json_object(content, "it", _MAX_DEPTH)
        zarr3 = driver == "zarr3"
        grid = metadata["chunk_grid"]["configuration"] if zarr3 else metadata
        shape, chunk = metadata["shape"], grid["chunk_shape" if zarr3 else "chunks"]
        dtype = metadata["data_type"] if zarr3 else _zarr2_dtype(metadata["dtype"])
        sizes = [n for n in (*shape, *chunk) if type(n) is int and 0 <= n < 2**48]
        if len(sizes) != len(shape) + len(chunk) or len(shape) != len(chunk) or len(shape) > _MAX_RANK:
            raise ValueError(f"shape {str(shape)[:80]} in chunks of {str(chunk)[:80]}")
        if dtype not in _WIDTHS:
            raise ValueError(f"dtype {str(dtype)[:40]}")
        if any(not 1 <= c <= max(1, n) for c, n in zip(chunk, shape, strict=True)):
            raise ValueError(f"chunks of {chunk} do not fit into shape {shape}")
        if (nbytes := math.prod(chunk) * _WIDTHS[dtype]) > _MAX_CHUNK_BYTES:
            raise ValueError(f"chunks of {nbytes:,} bytes, more than {_MAX_CHUNK_BYTES:,}")
        codecs = metadata["codecs"] if zarr3 else []
        while codecs and codecs[0]["name"] == "sharding_indexed":
            codecs = codecs[0]["configuration"]["codecs"]
        return "crc32c" in [codec["name"] for codec in codecs]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        what = e if isinstance(e, ValueError) else "a field is missing, or of another type than it should be"
        raise ValueError(f"{key} is damaged: {what}") from None


def _zarr2_dtype(name: str) -> str:
    match = re.fullmatch(r"[<>|]([biuf])([1248])", name)
    return f"{_LETTERS[match[1]]}{8 * int(match[2])}".replace("bool8", "bool") if match else name


def read_unverified(store: ts.TensorStore, index: Index) -> np.ndarray:
    """The part of an array at `index`, without comparing checksums.

    TensorStore always compares them, so this function reads the chunks' bytes itself.

    Raises:
      ValueError: a chunk is missing or has another size, or the array does not have the form of this module.
    """
    metadata = store.spec().to_json()["metadata"]
    assert store.kvstore is not None
    codecs = [{"configuration": CODECS[0]["configuration"], **codec} for codec in metadata["codecs"][:1]]
    if [*codecs, *metadata["codecs"][1:]] != CODECS:  # (the values of one byte have no order)
        raise ValueError("its chunks can only be read with their checksums")
    chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    dtype = store.dtype.numpy_dtype
    out = np.empty([s.stop - s.start for s in index], dtype)
    numbers = [range(s.start // c, -(-s.stop // c)) for s, c in zip(index, chunk, strict=True)]
    for place in product(*numbers):
        key = "/".join(["c", *map(str, place)])
        content = store.kvstore.read(key).result()
        if content.state != "value" or len(content.value) != math.prod(chunk) * dtype.itemsize + _CHECKSUM_BYTES:
            raise ValueError(f"chunk {key} is missing, or has another size")
        values = np.frombuffer(content.value, dtype, math.prod(chunk)).reshape(chunk)
        first = [i * c for i, c in zip(place, chunk, strict=True)]
        inside = [(max(s.start, f), min(s.stop, f + c)) for s, f, c in zip(index, first, chunk, strict=True)]
        to = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(inside, index, strict=True))
        out[to] = values[tuple(slice(a - f, b - f) for (a, b), f in zip(inside, first, strict=True))]
    return out
