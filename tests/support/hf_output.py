"""Write Hugging Face directories with `convert.to_hf`, and read them with the safetensors library. Not a test."""

import json
from pathlib import Path

import numpy as np
import safetensors

from convert import to_hf
from convert.source import open_directory


def read(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """HF name -> (dtype, shape, bytes). Asserts that an index agrees with the files."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    where = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            assert name not in tensors
            tensors[name] = entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])
            where[name] = file.name
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == where
        assert content["metadata"] == {
            "total_parameters": sum(int(np.prod(shape)) for _, shape, _ in tensors.values()),
            "total_size": sum(len(data) for *_, data in tensors.values()),
        }
    return tensors


def expected(weights: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return {name: (kinds[a.dtype.name], a.shape, a.tobytes()) for name, a in weights.items()}


def write(source: Path, destination: Path, **options) -> Path:
    to_hf.convert(open_directory(source), destination, **options)
    return destination


def hidden(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name.startswith("."))


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}
