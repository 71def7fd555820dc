"""The watchdog when strangers connect, and when messages are odd. What it does for a job: test_train_processes.py."""

import socket
import time

import pytest

from opt_jax.parallel import watchdog
from opt_jax.parallel.watchdog import Watchdog, listen

STRANGERS = [
    b"",
    b"\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\xff\xfe\x80\n",
    b"\x16\x03\x01" * 30,
    "ü 1\n".encode(),
    b"x" * 100_000,
    b"{token}\n",
    b"{token} \n",
    b"{token} x\n",
    b"{token} 0\n",
    b"{token} 3\n",
    b"{token} -1\n",
    b"{token} " + b"1" * 5000 + b"\n",
    b"{token} \xb2\n",
]


def make(process: int, seconds: float = 30.0) -> Watchdog:
    return Watchdog(process, 3, seconds=seconds, hang_minutes=1, exit_code=9)


def test_strangers_neither_end_nor_hold_up_a_job(monkeypatch):
    server, address, token = listen("127.0.0.1", 3)
    monkeypatch.setattr(watchdog, "_STRANGERS", 5)
    port = int(address.partition("|")[2])
    strangers = []
    for message in STRANGERS * 2 + [b""] * len(STRANGERS):  # more than the limit; the last of them are silent
        strangers.append(socket.create_connection(("127.0.0.1", port)))
        strangers[-1].sendall(message.replace(b"{token}", token.encode()))
    strangers[0].close()
    first, others = make(0), [make(1), make(2)]
    for other in others:
        assert other.connect(address, token) is None
        other._tell("beat")  # it may arrive with the greeting, and must not be lost
    first.accept(server, token, 2)
    assert sorted(first._peers.values()) == [1, 2]
    for connection in [*strangers, *first._peers, *(peer for other in others for peer in other._peers)]:
        connection.close()


def test_processes_that_do_not_come_are_missed():
    server, address, token = listen("127.0.0.1", 3)
    first, second = make(0, seconds=0.2), make(1)
    assert second.connect(address, token) is None
    with pytest.raises(TimeoutError, match=r"only 1 of 2 processes have reached the watchdog's port in 0\.2 s"):
        first.accept(server, token, 2)
    for connection in [*first._peers, *second._peers]:
        connection.close()


@pytest.fixture
def pair(monkeypatch):
    """(watchdog, its connection to process 1, the other end, a list). The list gets what would end the process."""
    ended: list[str] = []
    ours, theirs = socket.socketpair()
    first = make(0)
    first._add(ours, 1)
    monkeypatch.setattr(watchdog.os, "write", lambda fd, line: ended.append(line.decode()))
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: ended.append(str(code)))
    yield first, ours, theirs, ended
    ours.close()
    theirs.close()


def test_bytes_that_are_no_words_are_no_sign_of_life(pair):
    first, ours, theirs, ended = pair
    first._heard[ours] = before = time.monotonic() - 1
    for line in (b"\xff\xfe\n", b"lost\n", b"lost x\n", b"lost \xb2\n", b"failed " + b"1" * 5000 + b"\n", b"beats\n"):
        theirs.sendall(line)
        read(first, ours)
    assert first._heard[ours] == before
    theirs.sendall(b"x" * 50_000)
    for _ in range(20):
        first._listen_to(ours) if ready(ours) else None
    assert len(first._unread[ours]) <= 100
    theirs.sendall(b"\nbeat\n")
    read(first, ours)
    assert first._heard[ours] > before
    assert ended == [] and first._failed is None


def ready(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(1.0)


def read(dog: Watchdog, connection: socket.socket) -> None:
    while ready(connection):
        assert dog._listen_to(connection)


def test_a_clock_that_is_set_ends_no_job(pair, monkeypatch):
    first, _, _, ended = pair
    first.reached("step 1")
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + 1e6)
    first._look_around()
    assert ended == []
    first._since -= 61
    first._look_around()
    assert "process 0 of 3: no progress for 1 minutes at " in ended[0] and "in step 1 since " in ended[0]


def test_a_word_that_came_with_the_greeting_is_read_though_the_connection_is_closed(pair):
    first, ours, theirs, ended = pair
    first._unread[ours] = b"beat\nfailed 1\n"
    theirs.close()
    assert not first._listen_to(ours)
    assert first._failed is not None and first._failed[0] == 1 and ended == []
