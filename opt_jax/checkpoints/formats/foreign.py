"""Recognises files of weights in formats that are not read, by their names and first bytes, and says what to do."""

import re
from collections.abc import Iterable
from pathlib import Path

from opt_jax.checkpoints.formats.mapped_files import shown
from opt_jax.system.reading import open_regular

_TAKE_THE_SOURCE = "take the safetensors or PyTorch files that it was made from"
_SAVE_AGAIN = (
    "load it with transformers 4 (OPTForCausalLM.from_pretrained(DIRECTORY, from_tf=True)), and save_pretrained"
)
# (pattern of a file's name, pattern of its first bytes, what it is, what to do)
_FORMATS = (
    (r"\.(h5|hdf5|keras)(\.index\.json)?$", rb"\x89HDF", "a TensorFlow checkpoint (HDF5)", _SAVE_AGAIN),
    (r"\.gguf$|ggml[^/]*\.bin$", rb"GGUF|GGML|lmgg|fmgg|tjgg|algg", "a GGUF file (llama.cpp)", _TAKE_THE_SOURCE),
    (r"\.onnx([._]data)?$", None, "an ONNX graph", _TAKE_THE_SOURCE),
    (r"openvino[^/]*\.(bin|xml)$", None, "an OpenVINO model", _TAKE_THE_SOURCE),
    (r"\.tflite$", rb"....TFL3", "a TensorFlow Lite model", _TAKE_THE_SOURCE),
    (r"\.(mlmodel|mlpackage)$", None, "a Core ML model", _TAKE_THE_SOURCE),
    (r"\.ot$", None, "a rust-bert model", _TAKE_THE_SOURCE),
)


def by_first_bytes(start: bytes) -> str | None:
    """What a file that begins so is, and what to do; None for an unknown one."""
    return next((_says(*rest) for _, magic, *rest in _FORMATS if magic and re.match(magic, start, re.DOTALL)), None)


def by_name(name: str) -> str | None:
    """What a file of this name is, and what to do; None for an unknown one."""
    return next((_says(*rest) for ending, _, *rest in _FORMATS if re.search(ending, name.lower())), None)


def _says(kind: str, remedy: str) -> str:
    return f"{kind}, which is not read: {remedy}"


def of_file(path: Path) -> str | None:
    """What the file is, and what to do; None if it may be one of those that are read.

    Raises:
      ValueError, OSError: as `open_regular`.
    """
    if (says := by_name(path.name)) is not None:
        return says
    with open_regular(path) as file:
        return by_first_bytes(file.read(16))


def hint(names: Iterable[str]) -> str:
    """For the end of an error message: which of the files that a model has is in a format that is not read; or ""."""
    return next((f"; {shown(name)} is {says}" for name in sorted(names) if (says := by_name(name))), "")


def hint_of_directory(directory: Path) -> str:
    """As `hint`, for the files of a directory on a disk and its sub-directory `onnx`."""
    return hint(str(path.relative_to(directory)) for part in ("*", "onnx/*") for path in directory.glob(part))
