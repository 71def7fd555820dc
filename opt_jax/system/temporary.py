"""Files and directories that are written beside their final name; only these are ever cleared. No jax.

What a killed process has left behind is cleared by the next one that writes the same thing. It is known by what no
other program leaves there: a directory by the file `MARKER` in it, which is its lock as well; a file by its name.
"""

import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from opt_jax.system.disk import disk_errors
from opt_jax.system.reading import read_small

MARKER = ".opt-jax"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def refuse_links(*paths: str | os.PathLike) -> None:
    """Raise FileExistsError if a name to be written or cleared is a symbolic link: what it points to is not ours."""
    for path in map(Path, paths):  # without a slash at the end, behind which lies what the link points to
        if path.is_symlink():
            raise FileExistsError(
                f"{path} is a symbolic link to {os.readlink(path)}, and links are neither written nor cleared: "
                "remove it, or name what it points to"
            )


# Directories ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TemporaryPlace:
    """A directory that comes and goes.

    Attributes:
      names: pattern of all that is put into it. With anything else in it, the directory is left alone.
    """

    path: Path
    names: str

    @contextmanager
    def locked(self, wait: bool = True) -> Iterator[None]:
        """Create the directory, or take it over from a process that has ended; no other has the lock until the block
        ends.

        wait: for a process that has the lock.

        Raises:
          FileExistsError: the directory is a link, or holds what is not ours; or, without `wait`, is in use.
        """
        lock = self._lock(wait)
        try:
            yield
        finally:
            os.close(lock)

    def _lock(self, wait: bool) -> int:
        marker = self.path / MARKER
        while True:
            refuse_links(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._check_content()
                if (lock := lock_file(marker, wait)) is not None:
                    return lock
            except FileNotFoundError:  # removed by its last owner in this moment
                continue
            except BlockingIOError:
                raise FileExistsError(f"{self.path} is in use: another process is writing this now") from None

    def _check_content(self) -> None:
        names = os.listdir(self.path)
        foreign = sorted(name for name in names if not self._is_ours(name))
        if names and MARKER not in names or foreign:
            name = (foreign or sorted(names))[0]
            raise FileExistsError(
                f"{self.path} holds {name}, which opt-jax did not put there, so it is not cleared: move it elsewhere"
            )

    def _is_ours(self, name: str) -> bool:
        known = name == MARKER or re.fullmatch(self.names, name) is not None
        return known and not os.path.islink(self.path / name)

    def clear(self) -> None:
        """Remove what is in the directory; for who has the lock."""
        for name in os.listdir(self.path):
            if name != MARKER and self._is_ours(name):
                path = self.path / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove(self) -> None:
        """Remove the directory, for who has the lock. What cannot be removed, or is not ours, stays."""
        with suppress(OSError):
            self.clear()
            (self.path / MARKER).unlink()  # last: while anything is left, it carries the marker
            self.path.rmdir()


# Locks ------------------------------------------------------------------------------------------------------


def lock_file(path: str | os.PathLike, wait: bool = False) -> int | None:
    """A descriptor of the file, created if need be. It has the lock until it is closed, or this process ends.

    None: the file was removed by who had the lock, so it is of no use.

    Raises:
      BlockingIOError: another process has the lock, and `wait` is false.
    """
    lock = os.open(path, _FLAGS, 0o666)
    try:
        if not _lock(lock, wait):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
        if is_same(lock, path):
            return lock
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def is_same(fd: int, path: str | os.PathLike) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _lock(fd: int, wait: bool = False) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        # Some Lustre and NFS mounts have no locks; NFS has none of directories (EBADF).
        if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF):
            raise
    return True


# Files ------------------------------------------------------------------------------------------------------


@contextmanager
def new_file(path: str | os.PathLike, nbytes: int | None = None) -> Iterator[BinaryIO]:
    """A file whose content becomes `path` when the block ends, in place of what is there, and vanishes if it raises.

    nbytes: how many it will have, for the error of a full disk.

    Raises:
      FileExistsError: `path` is a link, or no regular file; or another process is writing it now.
      IsADirectoryError: it is a directory.
    """
    path = Path(path)
    _refuse_no_file(path)
    part = _part_of(path)
    # Of two that begin in the same moment one sees the other, which has its lock.
    with disk_errors(path, nbytes), _alone_in(path.parent):
        for left in unfinished_files(path.parent, re.escape(path.name)):
            if in_use(left):
                raise FileExistsError(f"{left}: another process is writing this file now")
            left.unlink(missing_ok=True)
        file = open(os.open(part, _FLAGS | os.O_EXCL, 0o666), "w+b")
        _lock(file.fileno())
    with disk_errors(path, nbytes), file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())  # who sees the name, after a crash of the machine too, sees all of the content
            refuse_links(path)
            os.rename(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Write the file as a whole. If that fails, what was there before stays.

    Raises:
      FileExistsError, IsADirectoryError, OSError: see `new_file`.
    """
    with new_file(path, len(content)) as file:
        file.write(content)


def check_new_file(path: str | os.PathLike, is_ours: Callable[[bytes], bool], what: str) -> None:
    """Raise before the work what `new_file` would raise behind it.

    is_ours: of the content of a file that is there; it is replaced by `what` only if it is one itself, or empty.

    Raises:
      FileExistsError: there is another file.
      FileExistsError, IsADirectoryError, OSError: see `new_file`.
    """
    path = Path(path)
    _refuse_no_file(path)
    if path.exists() and (content := read_small(path)) and not is_ours(content):
        raise FileExistsError(f"{path} is there already, and is not {what}: move it elsewhere, or choose another name")
    with disk_errors(path):
        part = _part_of(path)
        os.close(os.open(part, _FLAGS | os.O_EXCL, 0o666))
        part.unlink(missing_ok=True)


def _refuse_no_file(path: Path) -> None:
    refuse_links(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is a pipe or a device, which no file takes the place of: choose another name")


def _part_of(path: Path) -> Path:
    # A name of its own: even where locks do not reach across machines, two writers never share a file.
    return path.with_name(f"{path.name}.opt-jax-{uuid.uuid4().hex}.part")


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """For a moment: no other process is in such a block for this directory. Who keeps the lock for long is not one of
    ours, and is not waited for."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(200):
            if _lock(lock):
                break
            time.sleep(0.01)
        yield
    finally:
        os.close(lock)


def unfinished_files(directory: Path, name: str = ".*") -> list[Path]:
    """What `new_file` was writing in the directory, for files whose names match, when it was killed; or is writing."""
    pattern = re.compile(f"{name}\\.opt-jax-[0-9a-f]{{32}}\\.part", re.DOTALL)
    names = [entry for entry in os.listdir(directory) if pattern.fullmatch(entry)]
    return [directory / entry for entry in sorted(names) if not os.path.islink(directory / entry)]


def in_use(part: Path) -> bool:
    """Whether a process is writing this unfinished file."""
    try:
        fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _lock(fd)
    finally:
        os.close(fd)
