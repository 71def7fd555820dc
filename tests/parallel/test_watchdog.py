"""The watchdog when strangers connect, and when messages are odd. What it does for a job: test_train_processes.py."""

import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


@contextmanager
def accepting(first: Watchdog, server: socket.socket, token: str) -> Iterator[None]:
    thread = threading.Thread(target=first.accept, args=(server, token, stop := threading.Event()))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def close(strangers: Iterable[socket.socket], *dogs: Watchdog) -> None:
    for connection in [*strangers, *(peer for dog in dogs for peer in dog._peers)]:
        connection.close()


def test_strangers_neither_end_nor_hold_up_a_job(monkeypatch):
    server, address, token = listen("127.0.0.1", 3)
    monkeypatch.setattr(watchdog, "_STRANGERS", 5)
    port = int(address.partition("|")[2])
    strangers = []
    first, others = make(0), [make(1), make(2)]
    for message in STRANGERS * 2 + [b""] * len(STRANGERS):  # more than the limit; the last of them are silent
        strangers.append(socket.create_connection(("127.0.0.1", port)))
        strangers[-1].sendall(message.replace(b"{token}", token.encode()))
    strangers[0].close()
    with accepting(first, server, token):
        for other in others:
            assert other.connect(address, token) is None
            other._tell("beat")  # it may arrive with the greeting, and must not be lost
    assert sorted(first._peers.values()) == [1, 2]
    close(strangers, first, *others)


def test_strangers_that_fill_the_queue_of_the_port_do_not_keep_a_job_from_starting(monkeypatch):
    monkeypatch.setattr(watchdog, "_STRANGERS", 5)
    server, address, token = listen("127.0.0.1", 2)
    port, strangers, done = int(address.partition("|")[2]), [], threading.Event()

    def flood() -> None:
        while not done.is_set() and len(strangers) < 300:
            strangers.append(socket.socket())
            strangers[-1].setblocking(False)
            strangers[-1].connect_ex(("127.0.0.1", port))

    floods = [threading.Thread(target=flood) for _ in range(2)]
    first, other = Watchdog(0, 2, seconds=20, hang_minutes=1, exit_code=9), make(1, seconds=20)
    for thread in floods:
        thread.start()
    with accepting(first, server, token):
        assert other.connect(address, token) is None
    done.set()
    for thread in floods:
        thread.join()
    assert [*first._peers.values()] == [1]
    close(strangers, first, other)


def test_a_process_that_is_closed_to_make_room_tries_again():
    server, address, token = listen("127.0.0.1", 2)
    second = make(1, seconds=10)

    def turn_away() -> None:
        server.accept()[0].close()
        connection, _ = server.accept()
        assert connection.recv(100) == f"{token} 1\n".encode()
        connection.sendall(b"welcome\nbeat\n")
        connection.close()

    thread = threading.Thread(target=turn_away)
    with server:
        thread.start()
        assert second.connect(address, token) is None
        thread.join()
    assert [*second._unread.values()] == [b"beat\n"]
    close([], second)


def test_who_got_no_answer_in_time_is_not_watched():
    server, address, token = listen("127.0.0.1", 3)
    first, others = make(0), [make(1), make(2)]
    with accepting(first, server, token):
        for other in others:
            assert other.connect(address, token) is None
        again = make(1)  # the same process: the older connection is closed
        assert again.connect(address, token) is None
    assert sorted(first._peers.values()) == [1, 2]
    first.watch_only([0, 2])
    assert [*first._peers.values()] == [2]
    close([], first, *others, again)


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


def test_process_0_ends_after_the_others_but_does_not_wait_for_the_lost_one(pair):
    first, _, _, ended = pair
    ours, theirs = socket.socketpair()
    first._add(ours, 2)
    moments: list[float] = []
    thread = threading.Thread(target=lambda: (first._lost(1, "for a test"), moments.append(time.monotonic())))
    thread.start()
    assert theirs.recv(100) == b"lost 1\n"
    time.sleep(0.3)
    assert not moments and "lost process 1 (for a test)" in ended[0]
    before = time.monotonic()
    theirs.close()
    thread.join(5)
    assert before <= moments[0] < before + 2 and ended[1:] == ["9"]
    ours.close()


def test_a_word_that_came_with_the_greeting_is_read_though_the_connection_is_closed(pair):
    first, ours, theirs, ended = pair
    first._unread[ours] = b"beat\nfailed 1\n"
    theirs.close()
    assert not first._listen_to(ours)
    assert first._failed is not None and first._failed[0] == 1 and ended == []
