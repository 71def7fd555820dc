"""Refuses files that are neither text nor JSON lines, by their endings and first bytes. No jax."""

import re
from pathlib import Path
from typing import NoReturn

from opt_jax.system.reading import open_regular

_UNPACK = "unpack it first"
_EXPORT = 'write its texts to a .jsonl file, {"text": ...} in each line'
_RENAME = "if it has an object in each line, name it .jsonl"
_ENDINGS = {
    **dict.fromkeys((".gz", ".tgz"), ("gzip", _UNPACK)),
    **dict.fromkeys((".zst", ".zstd"), ("zstd", _UNPACK)),
    **{f".{name}": (name, _UNPACK) for name in ("7z", "bz2", "lz4", "rar", "tar", "xz", "zip")},
    **{
        f".{name}": (name, _EXPORT)
        for name in (
            "arrow",
            "avro",
            "csv",
            "doc",
            "docx",
            "epub",
            "feather",
            "h5",
            "hdf5",
            "orc",
            "parquet",
            "pdf",
            "pickle",
            "pkl",
            "safetensors",
            "sqlite",
            "tfrecord",
            "tsv",
            "xls",
            "xlsx",
        )
    },
    ".json": ("JSON", f"{_RENAME}; else {_EXPORT}"),
    **dict.fromkeys((".jl", ".jsonlines", ".ndjson"), ("JSON lines", "name it .jsonl")),
    ".npz": ("npz", "save its array of token ids as .npy"),
    ".bin": ("binary", "save token ids as .npy"),
}
_FIRST_BYTES = (
    (rb"\x1f\x8b", "gzip", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "zstd", _UNPACK),
    (rb"BZh[1-9]1AY&SY", "bz2", _UNPACK),
    (rb"\xfd7zXZ\0", "xz", _UNPACK),
    (rb"\x04\x22\x4d\x18", "lz4", _UNPACK),
    (rb"7z\xbc\xaf", "7z", _UNPACK),
    (rb"PK(\x03\x04|\x05\x06)", "zip", _UNPACK),
    (rb".{257}ustar", "tar", _UNPACK),
    (rb"PAR1", "parquet", _EXPORT),
    (rb"ARROW1|\xff\xff\xff\xff", "arrow", _EXPORT),
    (rb"\x93NUMPY", "NumPy", "name it .npy"),
    (rb"\s*%PDF-", "PDF", _EXPORT),
    (rb"%!PS", "PostScript", _EXPORT),
    (rb"\{\\rtf", "RTF", _EXPORT),
    (rb"Obj\x01", "avro", _EXPORT),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "save it as UTF-8"),
    (rb"version https://git-lfs\.", "a Git LFS pointer", "fetch the file that it stands for: git lfs pull"),
    (rb"(\xef\xbb\xbf)?\s*\[\s*(\{\s*\"|\"([^\"\\]|\\.)*\"\s*,\s*[\"\d])", "JSON", _EXPORT),
)
_OBJECT = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"([^"\\]|\\.)*"\s*:', re.DOTALL)  # JSON; prose does not begin so
_HEAD = 4096


def check_format(path: Path) -> None:
    """Check that a file is text or, if named .jsonl, JSON lines.

    Raises:
      ValueError: its ending or its first bytes say that it has another format.
      OSError: it cannot be read.
    """
    ending = path.suffix.lower()
    if ending in _ENDINGS:
        _refuse(path, *_ENDINGS[ending])
    with open_regular(path) as file:
        head = file.read(_HEAD)
    for pattern, kind, remedy in _FIRST_BYTES:
        if re.match(pattern, head, re.DOTALL):
            _refuse(path, kind, remedy)
    if b"\0" in head:
        _refuse(path, "binary", _EXPORT)
    if ending != ".jsonl" and _OBJECT.match(head):
        _refuse(path, "JSON", _RENAME)


def _refuse(path: Path, kind: str, remedy: str) -> NoReturn:
    raise ValueError(f"{path}: {kind} is a format that is not read as text: {remedy}")
