"""The lock of a run directory: one start of a run at a time may write to it."""

import os
import socket
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from etils import epath

from opt_jax.checkpoints.hub import is_remote
from opt_jax.system.reading import open_regular
from opt_jax.system.temporary import lock_file, refuse_links
from opt_jax.training.files import LOCK

_MOST_BYTES = 1000  # no more is read of a lock file


class RunLock:
    """The lock that a process holds while it writes to a run directory. In a job, process 0 holds it.

    `take` is the first to touch a file. The end of the `with` block releases the lock.

    On a disk, the file `LOCK` names the holder and is locked while that process lives, so that others are refused. An
    object store has no locks, and with a lease a run would wait after a preemption. There the newest start takes the
    run over, and `check` raises in an older one before its next write.
    """

    def __init__(self, output: epath.Path):
        self._output, self._path = output, output / LOCK
        self._name: bytes | None = None
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._name is None:
            return
        # In an object store the file stays, because an older start may still compare it with its own name.
        if not is_remote(self._output) and self._read() == self._name:
            self._path.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._name = self._descriptor = None

    def take(self, create: bool = True) -> None:
        """Take the lock. Does nothing if this process has it.

        Args:
          create: create the lock file. Otherwise take the lock only if an earlier start has left its file.

        Raises:
          FileExistsError: another process holds it, or the lock file is a link or not a regular file.
        """
        if self._name is not None or not create and (is_remote(self._output) or not self._path.exists()):
            return
        since = datetime.now(UTC).isoformat(" ", "seconds")
        name = f"process {os.getpid()} on {socket.gethostname()}, since {since} (start {uuid.uuid4().hex})\n".encode()
        self._output.mkdir(parents=True, exist_ok=True)
        if is_remote(self._output):
            self._path.write_bytes(name)
        else:
            self._descriptor = self._lock()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, name, 0)
        self._name = name

    def _lock(self) -> int:
        refuse_links(self._path)
        if self._path.exists() and not Path(self._path).is_file():
            raise FileExistsError(f"{self._path} is not a regular file, so it is not a run's lock: move it elsewhere")
        while True:
            try:
                if (descriptor := lock_file(self._path)) is not None:
                    return descriptor
            except BlockingIOError:
                raise FileExistsError(
                    f"{self._output} is in use by {self._holder()}: wait for it, end it, or choose another --output"
                ) from None

    def check(self) -> None:
        """Check that this process still has the lock. Call this before each write.

        Raises:
          FileExistsError: another start has taken the run over.
          FileNotFoundError: the run directory is gone.
        """
        if self._name is not None and (holder := self._read()) != self._name:
            if not self._output.exists():
                raise FileNotFoundError(
                    f"{self._output} was removed or moved during the run, so nothing more is written: put it back and "
                    "start again with the same command, which goes on from its last checkpoint"
                )
            who = f"{self._holder()} has taken it over" if holder else f"{LOCK} is gone from it"
            raise FileExistsError(f"{self._output} is no longer this process's: {who}, so nothing more is written")

    def _read(self) -> bytes:
        """The content of the lock file; b"" if there is none."""
        with suppress(FileNotFoundError, IsADirectoryError, ValueError):  # ValueError: it is not a regular file
            with self._path.open("rb") if is_remote(self._path) else open_regular(self._path) as file:
                return file.read(_MOST_BYTES)
        return b""

    def _holder(self) -> str:
        """The holder's name from the lock file, in one printable line."""
        text = " ".join(self._read().decode(errors="replace").partition(" (start ")[0].split())
        return text if text.isprintable() and text else "another process"
