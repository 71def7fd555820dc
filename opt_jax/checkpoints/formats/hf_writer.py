"""Writes Hugging Face directories: safetensors files, their index and generation_config.json.

The safetensors library needs all tensors of a file in memory: a shard of 5 GB takes 5 GB. To need less, this module
writes the format itself: a JSON header with the offsets of the tensors, then the tensors, slab by slab. The library
checks each file before the directory is published. Names, order, shards and padding are those of `save_pretrained` in
`transformers`, so the bytes are equal, too.
"""

import ctypes
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from opt_jax.checkpoints import chunks
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats import gptq, names
from opt_jax.checkpoints.formats.quantized import QuantizedArray
from opt_jax.config import OPTConfig
from opt_jax.system.disk import disk_errors, write_content

Progress = Callable[[str, int], None]

DTYPES = {
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
}  # in the order in which safetensors sorts them
# The order of modules and parameters in PyTorch, for all levels together.
ORDER = (
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
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "bias",
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**i for i, unit in enumerate("KMGT", 1)}
_THREADS = min(4, os.cpu_count() or 1)  # each holds two slabs
# The most bytes of one write. For a larger one, Linux takes blocks of 2 MiB for its page cache. A virtual machine may
# have given those back to its host: 2.6 GB in writes of 16 MiB then took 9 s, in writes of this size 0.5 (2026-11-30).
_WRITE_BYTES = 128 << 10
_WRITEBACK_BYTES = 128 << 20  # after so many bytes the disk begins to write them
_SYNC_FILE_RANGE_WRITE = 2  # of <fcntl.h>; Python has no name for it


def parse_size(size: str | int) -> int:
    """The size in bytes. Units are decimal (KB, MB, GB, TB) or binary (KiB, ...); case does not matter.

    Raises:
      ValueError: it is not a size, or is less than one byte.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?|[KMGT]I)B?", str(size).strip().upper())
    nbytes = 0 if match is None else int(Fraction(match[1]) * _UNITS[match[2]])
    if not 1 <= nbytes < 2**63:
        raise ValueError(f"max_shard_size {size!r} is not a size: give a number of bytes, or one like 500MB or 5GiB")
    return nbytes


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written."""

    name: str  # in the file
    path: str  # our parameter path
    array: LazyArray  # in PyTorch's layout


@dataclass(frozen=True)
class File:
    """A safetensors file to be written."""

    name: str
    tensors: Sequence[Tensor]

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


def plan_files(
    cls: str, arrays: Mapping[str, LazyArray], limit: int, quantized: gptq.Writer | None = None
) -> list[File]:
    """The tensors of a model, divided into files of at most `limit` bytes in the way of `huggingface_hub`.

    Source: huggingface_hub's split_state_dict_into_shards_factory.

    Args:
      cls: the class of the model.
      arrays: parameter path -> array in our layout.
      limit: the most bytes of tensors in a file. A larger tensor has a file of its own.
      quantized: writes the arrays that are integers.
    """
    tensors = []
    for path, array in arrays.items():
        name, transposed = names.to_hf(path)
        name = name.removeprefix("model.") if cls == "OPTModel" else name
        if quantized is not None and isinstance(array, QuantizedArray):
            base = name.removesuffix("weight")
            tensors += (Tensor(base + part, path, tensor) for part, tensor in quantized.tensors(path).items())
        else:
            tensors.append(Tensor(name, path, array.T if transposed else array))
    shards: list[list[Tensor]] = []
    current, size = [], 0
    for tensor in sorted(tensors, key=_order):
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
        return [File("model.safetensors", shards[0])]
    return [File(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


def _order(tensor: Tensor) -> list[int]:
    """A key that sorts tensors in the order of a PyTorch state dict."""
    parts = tensor.name.split(".")
    return [int(part) if part.isdigit() else ORDER.index(part) for part in parts if part != "decoder"]


class FileWriter:
    """Writes files block by block; blocks of the next tensors are read while those of the last ones are written.

    Args:
      progress: called after each block with the path of its array and its bytes, by several threads, one at a time.
    """

    def __init__(self, progress: Progress = lambda path, nbytes: None) -> None:
        self._progress = progress
        self._lock, self._local = threading.Lock(), threading.local()
        self._unsent = 0  # bytes that the disk may not have begun to write

    def write_all(self, directory: Path, files: Iterable[File]) -> None:
        """Write new files into the directory."""
        for file in files:
            with disk_errors(directory / file.name, file.nbytes), open(directory / file.name, "xb", buffering=0) as out:
                self.write(out.fileno(), file)
                os.fsync(out.fileno())

    def write(self, fd: int, file: File) -> None:
        """Write the content of `file` to the descriptor."""
        _pwrite(fd, memoryview(file.header), 0)
        offset, blocks = len(file.header), []
        with ThreadPoolExecutor(_THREADS) as pool:

            def write(blocks: Iterable[tuple[Tensor, LazyArray, int, chunks.Index]]) -> None:
                for _ in pool.map(lambda block: self._write_block(fd, *block), blocks):
                    pass

            for tensor in file.tensors:
                array = tensor.array
                block = _block(array)
                # Twice: our own chunks had that size until 2026-11-30.
                if math.prod(block) * array.dtype.itemsize > 2 * chunks.CHUNK_BYTES and array.chunk is not None:
                    # A large chunk, of another program. Blocks of rows would each read it.
                    held = _in_memory(array)
                    write([(tensor, held, offset, index) for index in chunks.pieces(array.shape, _block(held))])
                    del held
                else:
                    blocks += [(tensor, array, offset, index) for index in chunks.pieces(array.shape, block)]
                offset += array.nbytes
            write(blocks)

    def _write_block(self, fd: int, tensor: Tensor, array: LazyArray, offset: int, index: chunks.Index) -> None:
        nbytes = math.prod(s.stop - s.start for s in index) * array.dtype.itemsize
        if len(getattr(self._local, "buffer", "")) < 2 * nbytes:
            self._local.buffer = np.empty(2 * max(nbytes, chunks.CHUNK_BYTES), np.uint8)
        block = array.load(index, self._local.buffer)
        # The block in the file: consecutive bytes if it has complete rows, else a part of each row.
        row = array.nbytes // array.shape[0]
        start = offset + index[0].start * row
        if block.shape[1:] == array.shape[1:]:
            _pwrite(fd, block.reshape(-1).view(np.uint8).data, start)
        else:
            start += index[1].start * array.dtype.itemsize
            for i, part in enumerate(block.view(np.uint8)):
                _pwrite(fd, part.data, start + i * row)
        with self._lock:
            self._progress(tensor.path, nbytes)
            self._unsent += nbytes
            if send := self._unsent >= _WRITEBACK_BYTES:
                self._unsent = 0
        if send:
            _begin_writeback(fd)


def _block(array: LazyArray) -> chunks.Shape:
    """The shape of the blocks that are read at once: as many stored chunks, or rows, as fit into `CHUNK_BYTES`."""
    block = list(array.chunk or (1, *array.shape[1:]))
    for axis in reversed(range(len(block))):  # first along rows, which are consecutive in the file
        fitting = chunks.CHUNK_BYTES // (math.prod(block) * array.dtype.itemsize)
        block[axis] = min(array.shape[axis], block[axis] * max(1, fitting))
    return tuple(block)


def _in_memory(array: LazyArray) -> LazyArray:
    values = array.read(tuple(slice(0, n) for n in array.shape))
    return LazyArray(array.shape, array.dtype, values.__getitem__)


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data[:_WRITE_BYTES], offset)  # which may be less
        data, offset = data[written:], offset + written


def _begin_writeback(fd: int) -> bool:
    """Let the disk begin to write what is in the page cache. Otherwise it begins with the `fsync` at the end.

    Unlike `fsync`, it does not wait until the disk has written; and for an `fsync`, gcsfuse sends the complete file.
    Errors of the disk are left to the `fsync` at the end.

    Returns:
      Whether the system has done so. Only Linux has the call, and not for each file system.
    """
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    return call is not None and call(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE) == 0


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file as HF does."""
    write_content(path, json.dumps(content, indent=2).encode() + b"\n")


def write_descriptions(directory: Path, cls: str, config: OPTConfig, files: Sequence[File]) -> None:
    """Write the index of several files; and, for a causal LM, a generation_config.json if there is none."""
    generation = directory / "generation_config.json"
    if cls == "OPTForCausalLM" and not generation.exists():
        ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(generation, {"_from_model_config": True} | {k: v for k, v in ids.items() if v is not None})
    if len(files) > 1:
        tensors = {tensor.name: (tensor.array, file.name) for file in files for tensor in file.tensors}
        metadata = {
            "total_parameters": sum(array.size for array, _ in tensors.values()),
            "total_size": sum(array.nbytes for array, _ in tensors.values()),
        }
        weight_map = {name: tensors[name][1] for name in sorted(tensors)}
        write_json(directory / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def check_written(directory: Path, files: Iterable[File]) -> None:
    """Compare names, shapes, dtypes and the sizes of the files with what was to be written.

    The safetensors library reads the headers. (metaseq's own merge once "succeeded" with 376 KB of 2.5 GB: its issue
    695.)

    Raises:
      OSError: they differ.
    """
    for file in files:
        path = directory / file.name
        if not path.is_file() or path.stat().st_size != file.nbytes:
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
