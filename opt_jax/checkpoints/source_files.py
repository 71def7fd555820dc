"""Notices if the files of a checkpoint change while it is read."""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from opt_jax.checkpoints import hub
from opt_jax.checkpoints.formats.hf import weight_files


class SourceFiles:
    """Records the state of files before they are read; `check` compares it after reading."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._states = {path: _state(path) for path in paths}

    def add(self, paths: Iterable[Path]) -> None:
        self._states |= {path: _state(path) for path in paths}

    def check(self) -> None:
        """Compare the files with their recorded state.

        Raises:
          ValueError: a file was rewritten, replaced, removed or added since, so the data read may be inconsistent.
        """
        for path, state in self._states.items():
            if _state(path) != state:
                raise ValueError(f"{path} has changed while it was read: run again when nothing writes to it")

    def hash_of_states(self) -> str:
        """A hash of the recorded state, the same on all machines that share the file system."""
        states = sorted((str(path), state and state[:2]) for path, state in self._states.items())
        return hashlib.sha256(repr(states).encode(errors="surrogateescape")).hexdigest()


def files_of_model(directory: Path) -> SourceFiles:
    """All files that are read of a model directory, as `hub.resolve` returns it.

    Raises:
      ValueError: its index of weight files is malformed.
    """
    files = SourceFiles([hub.config_file(directory)])
    for place in () if hub.is_remote(directory) else hub.companion_directories(directory):
        files.add(place / name for name in hub.COMPANION_FILES)
    if hub.is_orbax(directory):
        files.add(_files_below(directory / "params"))
        return files
    files.add(weight_files(directory))
    files.add(directory / name for name in hub.QUANTIZATION_FILES)
    return files


def _files_below(directory: Path) -> Iterator[Path]:
    if hub.is_remote(directory):  # these two files name the data objects in use
        yield from (directory / "_METADATA", directory / "manifest.ocdbt")
    else:
        for folder, _, names in os.walk(directory):
            yield from (Path(folder, name) for name in names)


def _state(path: Path) -> tuple[int, ...] | None:
    """(size, time, ...) of a file; (size, checksum) in a store, whose times are in seconds; None without a file.

    A directory counts as no file, because its time changes when others put files into it.
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
    # st_ctime cannot be set. So it also shows a change by a tool that sets st_mtime, such as `rsync --times`.
    return stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino, stat.st_ctime_ns
