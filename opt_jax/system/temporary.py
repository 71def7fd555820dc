"""Files and directories that are written under a temporary name and then renamed. No jax.

The next process that writes the same file or directory removes what a killed process has left, and nothing else. It
recognises such a directory by the file `MARKER` in it, which is also its lock, and such a file by its name.
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
from typing import Any, BinaryIO

from opt_jax.system.disk import disk_errors
from opt_jax.system.reading import read_small

MARKER = ".opt-jax"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def refuse_links(*paths: str | os.PathLike) -> None:
    """Raise FileExistsError if a name to be written or cleared is a symbolic link, whose target may not be ours."""
    for path in map(Path, paths):  # Path removes a trailing slash, with which the link would be followed
        if path.is_symlink():
            raise FileExistsError(
                f"{path} is a symbolic link to {os.readlink(path)}, and links are neither written nor cleared: "
                "remove it, or name what it points to"
            )


# Directories ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TemporaryPlace:
    """A temporary directory.

    Attributes:
      path: the directory.
      names: pattern of the names that we put into it. A directory with any other name in it is left alone.
    """

    path: Path
    names: str

    @contextmanager
    def locked(self, wait: bool = True) -> Iterator[None]:
        """A context that has the lock of the directory. Creates the directory, or takes it over from an ended process.

        Args:
          wait: wait for a process that has the lock.

        Raises:
          FileExistsError: the directory is a link, or holds other files than ours; or it is in use, without `wait`.
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
            except FileNotFoundError:  # its last owner has just removed it
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
        """Remove our files in the directory. The caller has the lock."""
        for name in os.listdir(self.path):
            if name != MARKER and self._is_ours(name):
                path = self.path / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove(self) -> None:
        """Remove the directory. The caller has the lock. Files that cannot be removed, or are not ours, stay."""
        with suppress(OSError):
            self.clear()
            (self.path / MARKER).unlink()  # last, so that a directory with files in it has the marker
            self.path.rmdir()


# Locks ------------------------------------------------------------------------------------------------------


def lock_file(path: str | os.PathLike, wait: bool = False) -> int | None:
    """A descriptor of the file, which is created if necessary. It has the lock until it is closed or the process ends.

    Returns:
      The descriptor; None if the last owner of the lock has removed the file.

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
    """Whether the open file is still the file at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _lock(fd: int, wait: bool = False) -> bool:
    """Whether the lock was acquired."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        # Some Lustre and NFS mounts have no locks, and NFS has no locks of directories (EBADF).
        if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF):
            raise
    return True


# Files ------------------------------------------------------------------------------------------------------


@contextmanager
def new_file(path: str | os.PathLike, nbytes: int | None = None) -> Iterator[BinaryIO]:
    """A context with a file that replaces `path` when the block ends, and is removed if it raises.

    Args:
      path: the final name.
      nbytes: the size that the file will have, for the error of a full disk.

    Raises:
      FileExistsError: `path` is a link, or not a regular file; or another process is writing it now.
      IsADirectoryError: `path` is a directory.
    """
    path = Path(path)
    _refuse_no_file(path)
    part = _part_of(path)
    # If two processes start at the same time, one of them sees the other's file, which is locked.
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
            os.fsync(file.fileno())  # so that even after a crash of the machine the name has the complete content
            refuse_links(path)
            os.rename(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Replace the file by one with this content. On failure the old file stays.

    Args:
      path: may be in an object store, as one of `epath`'s paths.
      content: of a small file.

    Raises:
      FileExistsError, IsADirectoryError, OSError: see `new_file`.
    """
    if "://" in os.fspath(path):
        remote: Any = path
        remote.write_bytes(content)  # an object appears when it is complete
        return
    with new_file(path, len(content)) as file:
        file.write(content)


def check_new_file(path: str | os.PathLike, is_ours: Callable[[bytes], bool], what: str) -> None:
    """Check, before the work whose result it will hold, that a file can be written.

    Args:
      path: the file.
      is_ours: whether the content of an existing file may be replaced. An empty file always may.
      what: what such a file is, for messages.

    Raises:
      FileExistsError: a file exists that may not be replaced; or see `new_file`.
      IsADirectoryError, OSError: see `new_file`.
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
        raise FileExistsError(f"{path} is a pipe or a device, which is never replaced by a file: choose another name")


def _part_of(path: Path) -> Path:
    # A unique name, so that two writers never share a file, even if locks do not work across machines.
    return path.with_name(f"{path.name}.opt-jax-{uuid.uuid4().hex}.part")


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """A context that no other of our processes enters for this directory at the same time.

    It waits for two seconds at most. (Our processes hold the lock briefly; another program might keep it.)
    """
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
    """The temporary files of `new_file` in the directory, of killed and of running processes.

    Args:
      directory: the directory.
      name: a regular expression for the final names.
    """
    pattern = re.compile(f"{name}\\.opt-jax-[0-9a-f]{{32}}\\.part", re.DOTALL)
    names = [entry for entry in os.listdir(directory) if pattern.fullmatch(entry)]
    return [directory / entry for entry in sorted(names) if not os.path.islink(directory / entry)]


def in_use(part: Path) -> bool:
    """Whether a process is writing this temporary file."""
    try:
        fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _lock(fd)
    finally:
        os.close(fd)
