"""The processes that tests start, their environments, and a limit on files of this process."""

import contextlib
import functools
import os
import pickle
import re
import resource
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
START = subprocess.Popen  # Python's, before conftest.py replaces it
_READ_AT_IMPORT = ("JAX_", "LD_", "MALLOC_", "OMP_", "PYTHON")  # a forked program would not notice a change of these


def environment(devices: int = 1, **changes: str) -> dict[str, str]:
    """The environment of the tests (see conftest.py) with another number of CPU devices, and with `changes`.

    With START="fresh" the program is not forked, and imports everything by itself (see `Popen`).
    """
    flag = "--xla_force_host_platform_device_count"
    return os.environ | {"XLA_FLAGS": re.sub(rf"{flag}=\d+", f"{flag}={devices}", os.environ["XLA_FLAGS"])} | changes


def start(command: Sequence[str], devices: int = 1, **variables: str) -> subprocess.Popen:
    """Start a program in the repository's root, with pipes for its stdout and stderr.

    Args:
      command: the program and its arguments.
      devices: the number of its CPU devices.
      variables: of the environment, beside those of the tests.
    """
    settings = environment(devices, **{"TF_CPP_MIN_LOG_LEVEL": "2"} | variables)  # no warnings of lost connections
    return subprocess.Popen(command, env=settings, cwd=_ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def outcomes(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Wait for programs that `start` has started. Returns (exit code, stdout, stderr) of each."""
    try:
        texts = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def free_address() -> str:
    """An address of this machine, with a port that no program listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Limit the size of files that this process writes. Writing more fails as on a full disk, and needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Popen(subprocess.Popen):
    """Starts a Python program by `fork_server.py` if that can run it, and others as `subprocess.Popen` does.

    It overrides the private `_execute_child`, because Python has no public way to replace how a process starts.
    """

    _end: int | None = None  # of a forked process: a descriptor that becomes readable when it ends

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        words = [os.fsdecode(word) for word in ([args] if isinstance(args, str | bytes | Path) else args)]
        environment = {**(os.environ if env is None else env)}
        if preexec_fn or pass_fds or executable or not _can_fork(words, environment):
            start: Any = super()
            return start._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_, new_session, _ = rest
        standard = [number if given == -1 else given for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        directory = os.fspath(cwd or os.getcwd())
        self.pid = _server().ask("start", words[1:], environment, directory, new_session, files=standard)
        self._end = os.pidfd_open(self.pid)
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[reportAttributeAccessIssue]
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        )

    def poll(self) -> int | None:
        if self._end is None:
            return super().poll()
        if self.returncode is None and (status := _server().ask("wait", self.pid)) is not None:
            self.returncode = os.waitstatus_to_exitcode(status)
            os.close(self._end)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self._end is None:
            return super().wait(timeout)
        while self.poll() is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


def _can_fork(words: list[str], environment: dict[str, str]) -> bool:
    theirs, ours = ({k: v for k, v in e.items() if k.startswith(_READ_AT_IMPORT)} for e in (environment, os.environ))
    fork = environment.get("START") != "fresh"
    known = len(words) > 1 and (words[1] in ("-W", "-c", "-m") or not words[1].startswith("-"))
    return sys.platform == "linux" and words[0] == sys.executable and known and theirs == ours and fork


@functools.cache
def _server() -> "_Server":
    return _Server()


class _Server:
    def __init__(self):
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        script = Path(__file__).with_name("fork_server.py")
        command = [sys.executable, str(script), str(theirs.fileno())]
        self._process = START(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection, self._lock = ours, threading.Lock()

    def ask(self, *message: Any, files: Sequence[int] = ()) -> Any:
        with self._lock:
            socket.send_fds(self._connection, [pickle.dumps(message)], files)
            return pickle.loads(self._connection.recv(1 << 16))
