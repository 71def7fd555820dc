"""Opens files that others have written: regular files only, and small ones up to a size. No jax."""

import json
import os
import re
import stat
import warnings
from collections.abc import Mapping
from typing import IO, Any

from opt_jax.system.messages import shown

MOST_LEVELS = 50  # of JSON; those of a tokenizer.json with every option have less than ten
SMALL_FILE = 128 << 20  # bytes: of a config, a tokenizer's file, an index. The largest known has 5 MB


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """The file on this machine, opened for reading, links followed.

    Raises:
      ValueError: a pipe, a device, a directory, ...: reading could wait for ever, or never end.
      OSError: it cannot be opened.
    """
    return open(path, "rb", opener=_open)


def _open(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # a pipe waits for its writer otherwise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return descriptor


def read_small(path: os.PathLike, limit: int = SMALL_FILE) -> bytes:
    """The content of a file of at most `limit` bytes; it may be in an object store, as one of `epath`'s paths.

    Raises:
      ValueError: it is larger, or see `open_regular`.
      OSError: it cannot be read.
    """
    if "://" in os.fspath(path):
        remote: Any = path
        _check_size(path, remote.stat().length, limit)
        return remote.read_bytes()
    with open_regular(path) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, limit)
        return file.read(limit)


def json_object(content: bytes | str, where: object, levels: int = MOST_LEVELS) -> dict[str, Any]:
    """The JSON object that a file holds; `where`: what messages call the file.

    Raises:
      ValueError: it is no JSON, no object, or has objects and lists in each other at more than so many levels. (What
        walks through them calls itself for each, and Python has an end of that.)
    """
    try:
        value = json.loads(content.decode() if isinstance(content, bytes) else content)
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it has more than {levels} levels") from None
    except ValueError as e:
        raise ValueError(f"{where} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where} holds {kind}, not a JSON object")
    layer: list[Any] = [value]
    for _ in range(levels):
        inner = (inside.values() if isinstance(inside, dict) else inside for inside in layer)
        layer = [value for values in inner for value in values if isinstance(value, dict | list)]
    if layer:
        raise ValueError(f"{where} is not valid JSON: it has more than {levels} levels")
    return value


def _check_size(path: os.PathLike, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, more than the {limit:,} that such a file may have")


# Field of a file -> the values that ask for nothing, and what to do instead of any other.
FieldsWithoutEffect = Mapping[str, tuple[tuple, str]]


def asks_for_nothing(value: object, harmless: tuple) -> bool:
    """Whether the value is None or one of the harmless ones. A sequence never is: NumPy would compare its elements."""
    return value is None or not hasattr(value, "__len__") and value in harmless


def note_without_effect(where: object, content: Mapping[str, Any], fields: FieldsWithoutEffect) -> None:
    """Warn of the fields of a file that have no effect. (Python shows a warning once, and so once for each file.)"""
    noted = [name for name in content if name in fields and not asks_for_nothing(content[name], fields[name][0])]
    if noted:
        what = ", ".join(f"{name}={shown(content[name], 60)} ({fields[name][1]})" for name in noted)
        warnings.warn(f"{where}: without effect: {what}", stacklevel=2)


def name_from_outside(name: object, directories: bool = False) -> str:
    """The name, if a file of this name lies inside the directory that it is put into or looked for in.

    Args:
      directories: whether it may lie in a directory there.

    Raises:
      ValueError: it is no name, an absolute one, or leads outside.
    """
    parts = name.split("/") if isinstance(name, str) and directories else [name]
    pattern = r"[^\\\x00-\x1f\x7f]+" if directories else r"[\w-][\w.-]*"
    for part in parts:
        if not isinstance(part, str) or part in (".", "..") or not re.fullmatch(pattern, part):
            raise ValueError(f"{str(name)[:80]!r} is not the name of a file in this directory")
    return "/".join(parts)  # type: ignore[reportArgumentType]
