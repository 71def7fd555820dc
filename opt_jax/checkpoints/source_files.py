"""Whether the files of a checkpoint stay as they are while it is read."""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from opt_jax.checkpoints import hub
from opt_jax.checkpoints.download import WEIGHT_FILES, read_index


class SourceFiles:
    """Remembers files as they are now, before they are read; `check` compares when all has been read."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._states = {path: _state(path) for path in paths}

    def add(self, paths: Iterable[Path]) -> None:
        self._states |= {path: _state(path) for path in paths}

    def check(self) -> None:
        """
        Raises:
          ValueError: a file was rewritten, replaced, removed or added since: what was read may be a mixture.
        """
        for path, state in self._states.items():
            if _state(path) != state:
                raise ValueError(f"{path} has changed while it was read: run again when nothing writes to it")

    def fingerprint(self) -> str:
        """Equal for equal files on all machines that share their file system."""
        states = sorted((str(path), state and state[:2]) for path, state in self._states.items())
        return hashlib.sha256(repr(states).encode(errors="surrogateescape")).hexdigest()


def files_of_model(directory: Path) -> SourceFiles:
    """All that is read of a directory that `hub.resolve` found.

    Raises:
      ValueError: its index of weight files is none.
    """
    files = SourceFiles([hub.config_file(directory)])
    for place in () if hub.is_remote(directory) else hub.companion_directories(directory):
        files.add(place / name for name in hub.COMPANION_FILES)
    if hub.is_orbax(directory):
        files.add(_files_below(directory / "params"))
        return files
    first = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if first is not None:
        files.add([first])
        files.add(directory / name for name in (read_index(first).values() if first.suffix == ".json" else ()))
    return files


def _files_below(directory: Path) -> Iterator[Path]:
    if hub.is_remote(directory):  # objects of data have names of their own; these two say which ones count
        yield from (directory / "_METADATA", directory / "manifest.ocdbt")
    else:
        for folder, _, names in os.walk(directory):
            yield from (Path(folder, name) for name in names)


def _state(path: Path) -> tuple[int, ...] | None:
    """Size and time first; in a store, where times are in seconds, size and checksum. None: no file is there.

    A directory is no file: nothing is read of it, and its time changes with what others put into it.
    """
    try:
        if hub.is_remote(path):
            content = path.read_bytes()
            return len(content), zlib.crc32(content)
        if not path.is_file():
            return None
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    # Its last time is of any change, and nobody can set it: a tool that sets the time of a file to that of another
    # one, as `rsync --times` does, is seen.
    return stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino, stat.st_ctime_ns
