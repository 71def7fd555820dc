"""Errors of the operating system in one line: the path, what failed, what to do. No jax.

Python, TensorStore, Orbax and XLA each report a full disk in another form. `disk_errors` turns all of these into an
OSError, and `error_line` returns the line that the commands print. `warning_lines` prints warnings in the same form.
"""

import errno
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opt_jax.system.messages import one_line

_REMOVED = "it, or a directory above it, was removed or moved: put it back, or choose another place"
_ROOM = "make room there, then start the same command again"
_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "the file system or `ulimit -f` allows no larger files: choose another place",
    errno.EROFS: "make it writable, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.ENOENT: _REMOVED,
    errno.ENOTDIR: _REMOVED,
    errno.ESTALE: _REMOVED,
    errno.EIO: "look into the system's log for a failing disk, or choose another place",
    errno.EMFILE: "raise the limit with `ulimit -n`, then start the same command again",
    errno.ENFILE: "close other programs, then start the same command again",
    errno.ENAMETOOLONG: "choose a shorter name",
}
# How TensorStore ends its messages; in older versions "[OS error 28: ENOSPC ...".
_TENSORSTORE = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+):")


@contextmanager
def disk_errors(path: str | os.PathLike, nbytes: int | None = None) -> Iterator[None]:
    """A context for writing `path`: an error of the operating system becomes an OSError that says what to do.

    Args:
      path: what is written.
      nbytes: the number of bytes to be written, for the message.
    """
    try:
        yield
    except Exception as error:
        if (explained := _explained(error, os.fspath(path), nbytes)) is not None:
            raise explained from None
        raise


def keep_standard_descriptors() -> None:
    """Open those of the descriptors 0 to 2 that are closed (`2>&-`) on the null device.

    Otherwise a file that is opened later would get such a number, and logs of native code would go into it. Programs
    that this one starts inherit them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free


def write_content(path: Any, content: bytes) -> None:
    """Write a small file into a directory that gets its final name later. May be in an object store."""
    with disk_errors(path, len(content)):
        path.write_bytes(content)


def _explained(error: BaseException, path: str, nbytes: int | None) -> OSError | None:
    number = _number(error)
    if number not in _ADVICE:
        return None
    if isinstance(error, OSError) and isinstance(error.filename, str):
        if error.strerror != os.strerror(number):  # explained already
            return None
        if not error.filename.startswith(path):  # neither a file in it, nor a temporary name of it
            path = error.filename
    return OSError(number, f"{os.strerror(number)}{_room(number, path, nbytes)}: {_ADVICE[number]}", path)


def _number(error: BaseException) -> int | None:
    """The errno of an error. Orbax and TensorStore have it in a cause or in the message."""
    while True:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if match := _TENSORSTORE.search(str(error)):
            return int(match[1] or match[2])
        if not isinstance(error, OSError):  # XLA's "PATH; No space left on device"
            for number in _ADVICE:
                if str(error).endswith(f"; {os.strerror(number)}"):
                    return number
        if error.__cause__ is None:
            return None
        error = error.__cause__


def _room(number: int, path: str, nbytes: int | None) -> str:
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    said = [] if nbytes is None else [f"{nbytes:,} bytes are needed"]
    if number == errno.ENOSPC:
        with suppress(OSError):
            said.append(f"{free_bytes(path):,} are free")
    return f" ({', '.join(said)})" if said else ""


def free_bytes(path: str | os.PathLike) -> int:
    """The number of free bytes on the disk of `path`, which need not exist."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def error_line(error: BaseException) -> str:
    """The error as one line for a command that ends: for an OSError the path, the reason, and what to do.

    If stdout could not be written, stdout is replaced by the null device, because Python would flush it again at exit.
    """
    if not isinstance(error, OSError) or not error.strerror:
        return one_line(error)
    number, where, what = error.errno or 0, error.filename, error.strerror
    if where is None:
        try:
            print(end="", flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            where = "standard output"
        if number == errno.ENOENT:
            try:
                os.getcwd()
            except FileNotFoundError:  # then os.getcwd failed before, too, whose error has no file name
                where = "the current directory"
    # No advice for a name that does not exist, because most often it was mistyped.
    if what == os.strerror(number) and number in _ADVICE and _ADVICE[number] != _REMOVED:
        what = f"{what}{_room(number, str(where), None) if error.filename else ''}: {_ADVICE[number]}"
    return one_line(f"{where}: {what}" if where else what)


@contextmanager
def warning_lines(start: str = "") -> Iterator[None]:
    """A context in which each warning is one line on stderr, which begins with `start`.

    A warning that cannot be written is lost, as Python's own are: a full disk or a closed stderr ends no program.
    """

    def show(message: Warning | str, *_: object) -> None:
        if sys.stderr is not None:  # None: `print` would take stdout
            with suppress(OSError):
                print(f"{start}warning: {one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def without_tracebacks(
    wanted: Callable[[logging.LogRecord], bool] = lambda record: not record.exc_info,
) -> Iterator[None]:
    """A context in which Orbax does not log tracebacks of its threads. The same errors are raised by the waiting call.

    Args:
      wanted: whether a record is logged.
    """
    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
