"""Reads safetensors files: memory-mapped, lazily.

`read_safetensors` returns `Tensors`: a dict of NumPy views into the mapped file. No data is read before a view is used.
The views only say where a tensor lies: `stored.locate` turns them into offsets, and `pread` reads them. The library
`safetensors` reads through its map instead, so a file that is cut short meanwhile kills the process.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.checkpoints.formats.mapped_files import Tensors, is_shape, is_size, little_endian, map_file, shown
from opt_jax.system.reading import unique_keys

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_MAX_HEADER = 10_000_000  # bytes: 70,000 tensors. Parsing malicious JSON takes memory of thirty times its length


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors` file.

    Raises:
      ValueError: the file is truncated or malformed; the message names the file and, if possible, the tensor.
    """
    mapped = map_file(path)
    header, length = _read_header(path, mapped)
    tensors, spans = Tensors(mapped), []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{path}: tensor {shown(name)} has a malformed header entry") from None
        if not (isinstance(dtype, str) and is_shape(shape) and is_size(start, end)):
            raise ValueError(f"{path}: tensor {shown(name)} has a malformed header entry")
        if dtype not in DTYPES:
            raise ValueError(f"{path}: tensor {shown(name)} has dtype {shown(dtype)}, which is not supported")
        if end - start != math.prod(shape) * little_endian(DTYPES[dtype]).itemsize:
            what = f"tensor {shown(name)} ({dtype}, shape {shape})"
            raise ValueError(f"{path}: {what} does not fill its {end - start} bytes")
        spans.append((start, end, name, dtype, shape))

    # The format allows neither gaps nor overlaps, so the tensors in order must account for every byte.
    position, size = 0, len(mapped) - 8 - length
    for start, end, name, dtype, shape in sorted(spans):
        if start != position:
            raise ValueError(f"{path}: tensor {shown(name)} overlaps another or leaves a gap before it")
        if end > size:
            raise ValueError(f"{path} is truncated: tensor {shown(name)} ends at byte {end} of {size}")
        flat = np.frombuffer(mapped, little_endian(DTYPES[dtype]), math.prod(shape), 8 + length + start)
        tensors[name] = flat.reshape(shape)
        position = end
    if position != size:
        raise ValueError(f"{path}: {size - position} bytes after the last tensor belong to none")
    return tensors


def _read_header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    """(name -> unchecked entry of each tensor, length of the header in bytes)."""
    length = int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or length > min(len(mapped) - 8, _MAX_HEADER):
        raise ValueError(f"{path} is truncated or not a safetensors file: its header does not fit")
    try:
        header = json.loads(mapped[8 : 8 + length].decode("utf-8"), object_pairs_hook=unique_keys)
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ is not an object of strings")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: the safetensors header is damaged: {shown(e)}") from None
    return header, length
