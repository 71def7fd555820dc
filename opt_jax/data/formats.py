"""Refuses files of formats that are not read, by their endings and first bytes. No jax."""

import re
from typing import Any, NoReturn

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", ".jl", ".jsonlines", ".ndjson")
_ARROW = rb"ARROW1|\xff\xff\xff\xff"
TABLES = {".parquet": rb"PAR1", ".arrow": _ARROW, ".feather": _ARROW}  # ending -> how such a file begins
_UNPACK = "unpack it first"
_EXPORT = 'write its texts to a .jsonl file, {"text": ...} in each line'
_RENAME = "if it has an object in each line, name it .jsonl"
_ENDINGS = {
    ".tgz": ("tar", _UNPACK),
    ".zstd": ("zstd", "name it .zst"),
    **{f".{name}": (name, _UNPACK) for name in ("7z", "bz2", "lz4", "rar", "tar", "xz", "zip")},
    **{
        f".{name}": (name, _EXPORT)
        for name in (
            "avro",
            "doc",
            "docx",
            "epub",
            "h5",
            "hdf5",
            "orc",
            "pdf",
            "pickle",
            "pkl",
            "safetensors",
            "sqlite",
            "tfrecord",
            "xls",
            "xlsx",
        )
    },
    ".npz": ("npz", "save its array of token ids as .npy"),
    ".bin": ("binary", "save token ids as .npy"),
}
_FIRST_BYTES = (
    (rb"\x1f\x8b", "gzip", "add .gz to its name"),
    (rb"\x28\xb5\x2f\xfd", "zstd", "add .zst to its name"),
    (rb"BZh[1-9]1AY&SY", "bz2", _UNPACK),
    (rb"\xfd7zXZ\0", "xz", _UNPACK),
    (rb"\x04\x22\x4d\x18", "lz4", _UNPACK),
    (rb"7z\xbc\xaf", "7z", _UNPACK),
    (rb"PK(\x03\x04|\x05\x06)", "zip", _UNPACK),
    (rb".{257}ustar", "tar", _UNPACK),
    (rb"PAR1", "parquet", "name it .parquet"),
    (_ARROW, "arrow", "name it .arrow"),
    (rb"\x93NUMPY", "NumPy", "name it .npy"),
    (rb"\s*%PDF-", "PDF", _EXPORT),
    (rb"%!PS", "PostScript", _EXPORT),
    (rb"\{\\rtf", "RTF", _EXPORT),
    (rb"Obj\x01", "avro", _EXPORT),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "save it as UTF-8"),
    (rb"version https://git-lfs\.", "a Git LFS pointer", "fetch the file that it stands for: git lfs pull"),
)
_ARRAY = re.compile(rb'(\xef\xbb\xbf)?\s*\[\s*(\{\s*"|"([^"\\]|\\.)*"\s*,\s*["\d])', re.DOTALL)
_OBJECT = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"([^"\\]|\\.)*"\s*:', re.DOTALL)  # JSON; prose does not begin so


def check_ending(file: Any, ending: str, compression: str) -> None:
    """Check that files with these endings are read.

    Raises:
      ValueError: the ending says that it has another format.
    """
    if ending in _ENDINGS:
        _refuse(file, *_ENDINGS[ending])
    if compression and ending in (*TABLES, ".npy"):
        _refuse(file, f"{ending[1:]} inside of {COMPRESSED[compression]}", "unpack it first")


def check_head(file: Any, head: bytes, ending: str) -> None:
    """Check that the first bytes of a file, decompressed, are those of its format.

    Raises:
      ValueError: they say that it has another format.
    """
    if ending in TABLES:
        if not re.match(TABLES[ending], head):
            what = f"does not begin as a file in the format {ending[1:]}"
            raise ValueError(f"{file}: {what}: its ending is wrong, or it is damaged")
        return
    for pattern, kind, remedy in _FIRST_BYTES:
        if re.match(pattern, head, re.DOTALL):
            _refuse(file, kind, remedy)
    if b"\0" in head:
        _refuse(file, "binary", _EXPORT)
    if ending != ".json" and _ARRAY.match(head):
        _refuse(file, "JSON", "if it is an array of objects, name it .json")
    if ending not in (*JSON_LINES, ".json") and _OBJECT.match(head):
        _refuse(file, "JSON", _RENAME)


def _refuse(file: Any, kind: str, remedy: str) -> NoReturn:
    raise ValueError(f"{file}: {kind} is a format that is not read as text: {remedy}")
