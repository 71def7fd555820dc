"""A thread in each process of a job. It ends the process, with one line that says why, when another process is lost.

Without it, the other processes would wait in a collective until JAX aborts them in C++. Every process keeps a TCP
connection with process 0. It begins with the token and the number of the process, and process 0's answer `welcome`.
Then both ends send lines: `beat`, `lost N`, `failed N` and `bye`.
"""

import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

_GRACE = 5.0  # seconds in which a process may report the error that another process has reported
_LONGEST = 100  # most bytes of a line
_STRANGERS = 200  # most connections that have not identified themselves; one more closes the oldest
_WELCOME = b"welcome\n"  # what process 0 answers when it knows a process
_WORD = re.compile(rb"(beat|bye)|(lost|failed) ([0-9]{1,9})")


def listen(host: str | None, count: int) -> tuple[socket.socket, str, str]:
    """A listening socket, its address, and a token that clients must send; called by process 0."""
    if host is None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends no data: asks for the route only
            try:
                probe.connect(("192.0.2.1", 9))
                host = probe.getsockname()[0]
            except OSError:
                host = socket.gethostname()
    family = socket.getaddrinfo(host, None)[0][0]
    server = socket.create_server(("", 0), family=family, backlog=count + _STRANGERS)
    return server, f"{host}|{server.getsockname()[1]}", secrets.token_hex(16)


class Watchdog(threading.Thread):
    """The watchdog of one process.

    Args:
      process: number of this process.
      count: number of processes.
      seconds: a process that sends nothing for this time counts as lost.
      hang_minutes: this process ends if it makes no progress for this time.
      exit_code: the exit code when another process is lost, or this one hangs.
    """

    def __init__(self, process: int, count: int, *, seconds: float, hang_minutes: float, exit_code: int):
        super().__init__(name="watchdog", daemon=True)
        self.seconds = seconds
        self._process, self._count, self._hang, self._exit_code = process, count, hang_minutes * 60, exit_code
        self._peers: dict[socket.socket, int] = {}
        self._ending: list[socket.socket] = []  # connections of processes that have told that they end
        self._heard: dict[socket.socket, float] = {}
        self._unread: dict[socket.socket, bytes] = {}
        self._where, self._since, self._finished = "start-up", time.monotonic(), False
        self._failed: tuple[int, float] | None = None

    def connect(self, address: str, token: str) -> str | None:
        """None after connecting to process 0, or the reason why that failed.

        Process 0 may close the connection to make room for another one. Then this tries again, for `seconds`.
        """
        host, _, port = address.partition("|")
        end = time.monotonic() + self.seconds
        while True:
            try:
                connection = socket.create_connection((host, int(port)), timeout=self.seconds)
            except OSError as e:
                return str(e)
            try:
                connection.settimeout(self.seconds / 4)
                connection.sendall(f"{token} {self._process}\n".encode())
                answer = b""
                while not answer.startswith(_WELCOME):
                    if not (data := connection.recv(_LONGEST)):
                        raise ConnectionResetError("process 0 has closed the connection")
                    answer += data
            except OSError as e:
                connection.close()
                if time.monotonic() > end:
                    return str(e)
                time.sleep(0.05)
            else:
                self._add(connection, 0, answer.removeprefix(_WELCOME))
                return None

    def accept(self, server: socket.socket, token: str, stop: threading.Event) -> None:
        """Accept connections from the other processes until `stop` is set.

        Process 0 runs this in a thread from the moment at which the port is open. Strangers could fill the port's queue
        otherwise. Their connections are closed, and do not delay those of the processes.
        """
        said: dict[socket.socket, bytes] = {}
        with server, selectors.DefaultSelector() as selector:
            server.setblocking(False)
            selector.register(server, selectors.EVENT_READ)
            while not stop.is_set():
                for key, _ in selector.select(timeout=0.1):
                    connection = key.fileobj
                    if connection is server:
                        self._open(server, selector, said)
                    elif connection in said:
                        self._greet(connection, selector, said, token.encode())
        for connection in said:
            connection.close()

    def watch_only(self, processes: Collection[int]) -> None:
        """Close the connections of all other processes, which have given up waiting for an answer."""
        for connection, process in list(self._peers.items()):
            if process not in processes:
                self._remove(connection)

    def _open(self, server: socket.socket, selector: selectors.BaseSelector, said: dict[socket.socket, bytes]) -> None:
        if len(said) >= _STRANGERS:
            oldest = next(iter(said))
            del said[oldest]
            selector.unregister(oldest)
            oldest.close()
        try:
            connection, _ = server.accept()
        except OSError:  # the client has closed the connection
            return
        connection.setblocking(False)
        said[connection] = b""
        selector.register(connection, selectors.EVENT_READ)

    def _greet(
        self, connection: Any, selector: selectors.BaseSelector, said: dict[socket.socket, bytes], token: bytes
    ) -> None:
        """Read more of a connection's first line. When the line is complete, keep the connection or close it."""
        try:
            data = connection.recv(_LONGEST)
        except OSError:
            data = b""
        said[connection] += data
        line, ended, rest = said[connection].partition(b"\n")
        if data and not ended and len(line) < _LONGEST:
            return
        del said[connection]
        selector.unregister(connection)
        known, _, process = line.partition(b" ")
        others = {b"%d" % i: i for i in range(self._count) if i != self._process}
        if not (ended and secrets.compare_digest(known, token) and process in others):
            connection.close()
            return
        for older in [peer for peer, number in self._peers.items() if number == others[process]]:
            self._remove(older)  # its process has not seen the welcome in time, and tries again
        self._add(connection, others[process], rest)
        with suppress(OSError):  # the process has closed it, and tries again
            connection.sendall(_WELCOME)

    def _add(self, connection: socket.socket, process: int, unread: bytes = b"") -> None:
        connection.settimeout(1.0)
        self._peers[connection], self._heard[connection], self._unread[connection] = process, time.monotonic(), unread

    def _remove(self, connection: socket.socket) -> None:
        del self._peers[connection]
        connection.close()

    def reached(self, where: str) -> None:
        self._where, self._since = where, time.monotonic()

    def finish(self) -> None:
        """Stop watching and tell the others, because this process has completed its work."""
        self._finished = True
        self._tell("bye")
        self.join()
        for connection in [*self._peers, *self._ending]:
            connection.close()

    def fail(self) -> None:
        self._finished = True
        self._tell(f"failed {self._process}")

    def wait_for_others(self, seconds: float = 2 * _GRACE) -> None:
        """Wait until the other processes have ended; at most `seconds`. For process 0, after it told them to end.

        JAX aborts (SIGABRT) the processes that outlive process 0, whatever they are about to report.
        """
        if self.is_alive() and threading.current_thread() is not self:
            self.join()
        end = time.monotonic() + seconds
        for connection in [*self._peers, *self._ending]:
            with suppress(OSError):
                while (left := end - time.monotonic()) > 0:
                    connection.settimeout(left)
                    if not connection.recv(4096):
                        break

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._peers:
                selector.register(connection, selectors.EVENT_READ)
            beaten = 0.0
            while not self._finished:
                if time.monotonic() - beaten > self.seconds / 4:
                    self._tell("beat")
                    beaten = time.monotonic()
                for key, _ in selector.select(timeout=min(0.5, self.seconds / 8)):
                    selector.unregister(key.fileobj)
                    if self._listen_to(key.fileobj):  # type: ignore[reportArgumentType]
                        selector.register(key.fileobj, selectors.EVENT_READ)
                self._look_around()

    def _listen_to(self, connection: socket.socket) -> bool:
        """Whether the connection stays open, after reading and handling the lines that have arrived."""
        process = self._peers[connection]
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        if not data and b"\n" not in self._unread[connection]:  # lines that arrived with the first one are still unread
            self._lost(process, "its connection was closed")
        *lines, rest = (self._unread[connection] + data).split(b"\n")
        self._unread[connection] = rest[:_LONGEST]  # longer lines are not valid
        for line in lines:
            if (match := _WORD.fullmatch(line)) is None:
                continue  # an invalid line does not count as a heartbeat
            self._heard[connection] = time.monotonic()
            word, who = match[1] or match[2], int(match[3] or 0)
            if word == b"lost":
                self._lost(who, f"reported by process {process}")
            if word == b"failed":
                self._failed = self._failed or (who, time.monotonic())
                self._tell(f"failed {who}")
            if word in (b"bye", b"failed"):
                del self._peers[connection]
                self._ending.append(connection)
                return False
        return True

    def _look_around(self) -> None:
        now = time.monotonic()
        for connection, process in self._peers.items():
            if now - self._heard[connection] > self.seconds:
                self._lost(process, f"nothing heard of it for {self.seconds:g} s")
        if self._failed and now - self._failed[1] > _GRACE:
            self._end(f"process {self._failed[0]} failed: see its message", "", exit_code=1, others_end=True)
        if now - self._since > self._hang:
            self._end(
                f"no progress for {self._hang / 60:g} minutes",
                ": look for a process that is behind the others, or give --hang-minutes more",
            )

    def _lost(self, process: int, why: str) -> None:
        self._tell(f"lost {process}")
        self._peers = {connection: peer for connection, peer in self._peers.items() if peer != process}
        self._end(
            f"lost process {process} ({why})",
            ": look at its log and host for a crash, a kill or too little memory; started again, all go on from the "
            "last checkpoint",
            others_end=True,
        )

    def _end(self, what: str, advice: str, exit_code: int | None = None, others_end: bool = False) -> None:
        if self._finished:
            return
        now = datetime.now(UTC)
        since = now - timedelta(seconds=time.monotonic() - self._since)
        line = (
            f"process {self._process} of {self._count}: {what} at {now:%H:%M:%S} UTC, in {self._where} since "
            f"{since:%H:%M:%S}{advice}\n"
        )
        with suppress(OSError):  # the log may be on a full disk
            os.write(sys.stderr.fileno() if sys.stderr else 2, line.encode())  # no lock that a stuck thread may hold
        if others_end and self._process == 0:
            self.wait_for_others()
        os._exit(self._exit_code if exit_code is None else exit_code)

    def _tell(self, line: str) -> None:
        for connection in list(self._peers):
            try:
                connection.sendall(line.encode() + b"\n")
            except OSError:
                pass  # the next read reports it
