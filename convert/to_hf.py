"""Writes an opened checkpoint as a Hugging Face directory: safetensors files, their index, config and tokenizer.

The safetensors library needs all tensors of a file in memory: a shard of 5 GB takes 5 GB. To need less, this module
writes the format itself: a JSON header with the offsets of the tensors, then the tensors, slab by slab. The library
checks each file before the directory is published. Names, order, shards and padding are those of `save_pretrained` in
`transformers`, so the bytes are equal, too.
"""

import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from opt_jax.checkpoints import chunks, directories, hub, orbax, pretrained
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats import names
from opt_jax.parallel import agreement
from opt_jax.system.disk import disk_errors, write_content
from opt_jax.system.temporary import refuse_links

from . import staging
from .checkpoint import Checkpoint
from .to_orbax import cast

Progress = Callable[[str, int], None]

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # in the order in which safetensors sorts them
# The order of modules and parameters in PyTorch, for all levels together.
_ORDER = (
    "model",
    "lm_head",
    "score",
    "qa_outputs",
    "embed_tokens",
    "embed_positions",
    "project_out",
    "project_in",
    "self_attn",
    "self_attn_layer_norm",
    "fc1",
    "fc2",
    "final_layer_norm",
    "layers",
    "k_proj",
    "v_proj",
    "q_proj",
    "out_proj",
    "weight",
    "bias",
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**i for i, unit in enumerate("KMGT", 1)}
_THREADS = min(4, os.cpu_count() or 1)  # each holds a slab
_SAMPLES = 64  # `_Writer._content_hash` hashes at most so many vectors


def convert(
    source: Checkpoint,
    destination: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    shard_of: tuple[int, int] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda name, nbytes: None,
) -> None:
    """Write `source` as a directory that `transformers` loads. It appears complete or not at all.

    All processes of a `jax.distributed` job call this together; each writes some of the files.

    Args:
      dtype: cast the parameters to it. Default: each keeps its dtype, bit for bit.
      max_shard_size: the largest size of the tensors in one file: a number of bytes, or "500MB", "5GB", "5GiB". A
        larger tensor has a file of its own.
      shard_of: (i, n): write every n-th file, from the i-th on, and publish if all others are there; see `unfinished`.
      progress: called after each slab with the path of its array and its size in bytes. Several threads call it, one
        at a time.

    Raises:
      FileExistsError: see `directories.new_directory`; or another worker writes the same file now.
      OSError: the disk is full. With `shard_of`, files that are complete stay for the next run.
      ValueError: a tensor is missing, left over, misshapen, damaged or out of range for `dtype`; the source has changed
        meanwhile; a bad `max_shard_size` or `shard_of`; or the destination was begun from another source or with other
        options.
    """
    job = jax.process_count() > 1
    if shard_of is not None:
        if job:
            raise ValueError("--shard-of is for separate commands: leave it out, the job divides the files itself")
        if not 1 <= shard_of[0] <= shard_of[1]:
            raise ValueError(f"--shard-of {shard_of[0]}/{shard_of[1]}: i/n needs 1 <= i <= n")
    limit = parse_size(max_shard_size)
    agreement.on_first_process(source.check)
    writer = _Writer(source, dtype, limit, progress)
    refuse_links(destination)
    destination = Path(os.path.realpath(destination))
    if job:
        _convert_in_job(writer, destination, overwrite)
    elif shard_of is not None:
        _convert_part(writer, destination, shard_of, overwrite)
    else:
        with directories.new_directory(destination, overwrite, hub.is_model) as new:
            directories.check_space(new, sum(file.nbytes for file in writer.files))
            for file in writer.files:
                with disk_errors(new / file.name, file.nbytes), open(new / file.name, "xb", buffering=0) as out:
                    writer.write(out.fileno(), file)
                    os.fsync(out.fileno())
            writer.write_descriptions(new)
            writer.check_written(new)
        staging.discard(staging.directory_of(destination))  # killed workers may have left it


def parse_size(size: str | int) -> int:
    """The size in bytes. Units are decimal (KB, MB, GB, TB) or binary (KiB, ...); case does not matter.

    Raises:
      ValueError: it is not a size, or is less than one byte.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?|[KMGT]I)B?", str(size).strip().upper())
    nbytes = 0 if match is None else int(Fraction(match[1]) * _UNITS[match[2]])
    if not 1 <= nbytes < 2**63:
        raise ValueError(f"--max-shard-size {size!r} is not a size: give a number of bytes, or one like 500MB or 5GiB")
    return nbytes


# Files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    name: str  # in the file
    path: str  # our parameter path
    transposed: bool
    array: LazyArray  # in PyTorch's layout


@dataclass(frozen=True)
class _File:
    name: str
    tensors: Sequence[_Tensor]

    @cached_property
    def header(self) -> bytes:
        """The length of the JSON in 8 bytes, then the JSON, padded so that the first tensor is aligned to 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.array.nbytes
            kind, shape = DTYPES[tensor.array.dtype.name], list(tensor.array.shape)
            entries[tensor.name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.array.nbytes for tensor in self.tensors)


def _split(tensors: Sequence[_Tensor], limit: int) -> list[_File]:
    """The tensors, divided into files of at most `limit` bytes in the way of `huggingface_hub`.

    Source: huggingface_hub's split_state_dict_into_shards_factory.
    """
    shards: list[list[_Tensor]] = []
    current, size = [], 0
    for tensor in tensors:
        if tensor.array.nbytes > limit:
            shards.append([tensor])
            continue
        if size + tensor.array.nbytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(tensor)
        size += tensor.array.nbytes
    shards += [current] if current else []
    dtypes = [*DTYPES]
    for shard in shards:  # the widest dtype first, so that all tensors are aligned; then by name, as safetensors does
        shard.sort(key=lambda tensor: (dtypes.index(tensor.array.dtype.name), tensor.name))
    if len(shards) == 1:
        return [_File("model.safetensors", shards[0])]
    return [_File(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


class _Writer:
    """The files to write, which are the same in all workers, and the methods that write them."""

    def __init__(self, source: Checkpoint, dtype: str | None, limit: int, progress: Progress) -> None:
        self.source, self.dtype, self.limit = source, dtype, limit
        self._progress, self._lock, self._local = progress, threading.Lock(), threading.local()
        self.cls: str = source.raw_config["architectures"][0]
        tensors = [self._tensor(path) for path in source.arrays]
        self.files = _split(sorted(tensors, key=_order), limit)

    def _tensor(self, path: str) -> _Tensor:
        name, transposed = names.to_hf(path)
        if self.cls == "OPTModel":
            name = name.removeprefix("model.")
        array = cast(self.source, path, self.dtype)
        return _Tensor(name, path, transposed, array.T if transposed else array)

    def plan(self) -> dict[str, Any]:
        """The plan (`staging.join`) by which workers notice that they do not write the same files."""
        return {
            "source": os.path.realpath(self.source.where),
            "content": self._content_hash(),
            "dtype": self.dtype,
            "max_shard_size": self.limit,
            "files": {file.name: file.nbytes for file in self.files},
        }

    def _content_hash(self) -> str:
        """A hash of the config, the files' sizes and times, some vectors, and one row of each of a few matrices.

        To hash all data would take too long.
        """
        description = [self.cls, dict(self.source.raw_config), self.source.files.hash_of_states()]
        digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
        arrays = self.source.arrays
        for path in sorted(arrays):
            digest.update(f"{path} {arrays[path].shape} {arrays[path].dtype}\n".encode())
        vectors = sorted(path for path in arrays if len(arrays[path].shape) == 1)
        matrices = sorted(arrays.keys() - set(vectors))
        for path in vectors[:: len(vectors) // _SAMPLES + 1] + matrices[:: len(matrices) // 4 + 1]:
            first = [slice(None)] if path in vectors else [slice(0, 1), slice(None)]
            digest.update(arrays[path].load(first).tobytes())
        return digest.hexdigest()

    def write(self, fd: int, file: _File) -> None:
        """Write the content of `file` to the descriptor."""
        _pwrite(fd, memoryview(file.header), 0)
        offset = len(file.header)
        with ThreadPoolExecutor(_THREADS) as pool:
            for tensor in file.tensors:
                self._write_tensor(fd, offset, tensor, pool)
                offset += tensor.array.nbytes

    def _write_tensor(self, fd: int, offset: int, tensor: _Tensor, pool: ThreadPoolExecutor) -> None:
        held = dataclasses.replace(self.source, arrays={tensor.path: self._in_memory(tensor.path)})
        array = cast(held, tensor.path, self.dtype)
        array = array.T if tensor.transposed else array
        row = array.nbytes // array.shape[0]
        rows = max(1, chunks.CHUNK_BYTES // row)

        def write(index: chunks.Index) -> None:
            if len(getattr(self._local, "buffer", "")) < rows * row:
                self._local.buffer = np.empty(max(rows * row, chunks.CHUNK_BYTES), np.uint8)
            piece = array.load(index, self._local.buffer)
            _pwrite(fd, piece.reshape(-1).view(np.uint8).data, offset + index[0].start * row)
            with self._lock:
                self._progress(tensor.path, piece.nbytes)

        for _ in pool.map(write, orbax.pieces(array.shape, (rows, *array.shape[1:]))):
            pass

    def _in_memory(self, path: str) -> LazyArray:
        """The array at `path`. If it is stored in chunks, it is read into memory.

        A slab of rows in PyTorch's layout is a slab of columns in ours. To read these one by one would read each chunk
        several times.
        """
        array = self.source.arrays[path]
        if not array.in_chunks:
            return array
        values = array.read(tuple(slice(0, n) for n in array.shape))
        return LazyArray(array.shape, array.dtype, values.__getitem__)

    def write_descriptions(self, directory: Path) -> None:
        """Write all other files: config, tokenizer, generation config, index. Then check that the source is unchanged.

        Raises:
          ValueError: the source has changed since it was opened.
        """
        raw, config = self.source.raw_config, self.source.config
        _write_json(directory / "config.json", raw if self.dtype is None else pretrained.set_dtype(raw, self.dtype))
        pretrained.copy_companions(self.source.companions, directory)
        generation = directory / "generation_config.json"
        if self.cls == "OPTForCausalLM" and not generation.exists():
            ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            _write_json(generation, {"_from_model_config": True} | {k: v for k, v in ids.items() if v is not None})
        if len(self.files) > 1:
            nbytes = sum(tensor.array.nbytes for file in self.files for tensor in file.tensors)
            weight_map = {tensor.name: file.name for file in self.files for tensor in file.tensors}
            metadata = {"total_parameters": self.source.parameters, "total_size": nbytes}
            _write_json(
                directory / "model.safetensors.index.json",
                {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))},
            )
        self.source.files.check()  # after the last reading

    def check_written(self, directory: Path) -> None:
        """Compare names, shapes, dtypes and the sizes of the files with what was to be written.

        The safetensors library reads the headers. See `to_orbax.check_written`.

        Raises:
          OSError: they differ.
        """
        for file in self.files:
            path = directory / file.name
            if not staging.complete(path, file.nbytes):
                raise OSError(f"{path} does not have its {file.nbytes} bytes: nothing was published")
            expected = {t.name: (DTYPES[t.array.dtype.name], list(t.array.shape)) for t in file.tensors}
            try:
                with safetensors.safe_open(path, "numpy") as opened:
                    slices = {name: opened.get_slice(name) for name in opened.keys()}
                    written = {name: (entry.get_dtype(), entry.get_shape()) for name, entry in slices.items()}
            except safetensors.SafetensorError as e:
                raise OSError(f"{path}: safetensors cannot read it ({e}): nothing was published") from None
            for name in expected.keys() | written.keys():
                ours, theirs = expected.get(name), written.get(name)
                if ours != theirs:
                    raise OSError(f"{path}: {name} was to be {ours}, but is {theirs} on disk: nothing was published")


def _order(tensor: _Tensor) -> list[int]:
    """A key that sorts tensors in the order of a PyTorch state dict."""
    parts = names.to_hf(tensor.path)[0].split(".")
    return [int(part) if part.isdigit() else _ORDER.index(part) for part in parts if part != "decoder"]


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while data:  # os.pwrite may write less
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_content(path, json.dumps(content, indent=2).encode() + b"\n")


# Several processes ---------------------------------------------------------------------------------------------


def unfinished(destination: Path) -> list[str]:
    """The names of the files that are missing before `destination` is published; [] if it is, or none was begun."""
    return staging.unfinished(staging.directory_of(destination))


def _convert_part(writer: _Writer, destination: Path, shard_of: tuple[int, int], overwrite: bool) -> None:
    """Write the i-th of n parts of the files, and publish the destination if all are complete."""
    if shard_of[0] > len(writer.files):  # this part is empty
        return
    directories.check_destination(destination, overwrite, hub.is_model)
    directory, plan = staging.directory_of(destination), writer.plan()
    staging.join(directory, plan)
    _write_part(writer, directory, shard_of)
    place = staging.place_of(directory)
    with place.locked():
        current_plan = staging.read_plan(directory)
        if current_plan != plan:  # another worker found all files complete and published them
            if current_plan is None:
                place.remove()
            if not hub.is_model(destination):
                raise OSError(f"{directory} was removed while parts of {destination} were written to it: start again")
        elif not staging.unfinished(directory):
            with directories.new_directory(destination, overwrite, hub.is_model) as new:
                _collect(writer, directory, new)
            place.remove()


def _convert_in_job(writer: _Writer, destination: Path, overwrite: bool) -> None:
    """Write the files in all processes of a `jax.distributed` job. An error in one process is raised in all."""
    directory = staging.directory_of(destination)

    def begin() -> None:
        directories.check_destination(destination, overwrite, hub.is_model)
        if staging.read_plan(directory) not in (None, writer.plan()):
            staging.discard(directory)  # a killed job left it; if it is in use, it stays and `join` raises

    agreement.on_first_process(begin)
    error = None
    try:
        staging.join(directory, writer.plan())
        _write_part(writer, directory, (jax.process_index() + 1, jax.process_count()))
    except Exception as e:
        error = e
    try:
        agreement.agree(error)
        with directories.new_directory(destination, overwrite, hub.is_model) as new:
            agreement.on_first_process(lambda: _collect(writer, directory, new))
    finally:
        if jax.process_index() == 0:
            staging.discard(directory)


def _write_part(writer: _Writer, directory: Path, shard_of: tuple[int, int]) -> None:
    """Write the i-th of n parts of the files to the shared directory, but for files that are complete already."""
    part = writer.files[shard_of[0] - 1 :: shard_of[1]]
    missing = [file for file in part if not staging.complete(directory / file.name, file.nbytes)]
    directories.check_space(directory, sum(file.nbytes for file in missing))
    for file in missing:
        with staging.new_file(directory, file.name, file.nbytes) as fd:
            writer.write(fd, file)
            writer.source.files.check()


def _collect(writer: _Writer, directory: Path, new: Path) -> None:
    """Write all other files into `new`, and move the weights there after all that may fail."""
    writer.write_descriptions(new)
    for file in writer.files:
        os.rename(directory / file.name, new / file.name)
    writer.check_written(new)
