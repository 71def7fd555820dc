"""Reads files that others have written: regular files only, small files up to a limit. No jax."""

import json
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import IO, Any

from opt_jax.system.messages import one_line, shown

MOST_LEVELS = 50  # of JSON; a tokenizer.json with every option has less than ten
SMALL_FILE = 128 << 20  # the most bytes of a config, a tokenizer file or an index. The largest known has 5 MB


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """The local file, opened for reading. Links are followed.

    Raises:
      ValueError: it is a pipe, a device, a directory, ...: reading could wait for ever, or never end.
      OSError: it cannot be opened.
    """
    return open(path, "rb", opener=_open)


def _open(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # otherwise opening a pipe waits for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return descriptor


def read_small(path: os.PathLike, limit: int = SMALL_FILE) -> bytes:
    """The content of a file of at most `limit` bytes. It may be in an object store, as an `epath` path.

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
    """The JSON object in the content of a file.

    Args:
      content: the content.
      where: the file, for messages.
      levels: the most levels of nested objects and lists. (Recursive code would otherwise exceed Python's limit.)

    Raises:
      ValueError: it is not JSON, not an object, has more levels, or names something twice.
    """
    try:
        value = json.loads(content.decode() if isinstance(content, bytes) else content, object_pairs_hook=unique_keys)
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of the pairs, for `json.loads`, which would take the last of two values of the same name.

    Raises:
      ValueError: a name is there twice.
    """
    unique = dict(pairs)
    if len(unique) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{one_line(counts.most_common(1)[0][0], 100)} is there twice")
    return unique


def _check_size(path: os.PathLike, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, more than the {limit:,} that such a file may have")


# Field of a file -> its neutral values, and what to do instead of setting any other.
FieldsWithoutEffect = Mapping[str, tuple[tuple[Any, ...], str]]


def asks_for_nothing(value: object, harmless: tuple) -> bool:
    """Whether the value is None or one of `harmless`. False for a list or array, whose elements NumPy would compare."""
    return value is None or (isinstance(value, str) or not hasattr(value, "__len__")) and value in harmless


def note_without_effect(where: object, content: Mapping[str, Any], fields: FieldsWithoutEffect) -> None:
    """Warn of the fields of a file that have no effect. Python shows the warning once for each file."""
    noted = [name for name in content if name in fields and not asks_for_nothing(content[name], fields[name][0])]
    if noted:
        names = {name: name if name.isidentifier() and len(name) < 60 else shown(name, 60) for name in noted}
        what = ", ".join(f"{names[name]}={shown(content[name], 60)} ({fields[name][1]})" for name in noted[:20])
        what += f", and {len(noted) - 20} more" if len(noted) > 20 else ""
        warnings.warn(f"{where}: without effect: {what}", stacklevel=2)


def name_from_outside(name: object, directories: bool = False) -> str:
    """The name, after checking that it is the name of a file inside of a directory.

    Args:
      name: a name from a foreign file or server.
      directories: whether the name may contain directories.

    Raises:
      ValueError: it is not a name, is absolute, or leads out of the directory.
    """
    parts = name.split("/") if isinstance(name, str) and directories else [name]
    pattern = r"[^\\\x00-\x1f\x7f]+" if directories else r"[\w-][\w.-]*"
    for part in parts:
        if not isinstance(part, str) or part in (".", "..") or not re.fullmatch(pattern, part):
            raise ValueError(f"{str(name)[:80]!r} is not the name of a file in this directory")
    return "/".join(parts)  # type: ignore[reportArgumentType]
