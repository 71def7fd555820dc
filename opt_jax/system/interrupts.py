"""Ctrl-C and SIGTERM that act at once and are not lost, whatever the main thread does. No jax.

Python calls a signal handler in the main thread when that returns to Python: after XLA's computation, or never. A
KeyboardInterrupt is swallowed or wrapped in a callback, in a destructor, or while JAX traces. So here another thread
receives the signals.
"""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = 128 + signal.SIGINT  # the exit code that shells report for a program ended by Ctrl-C
WAITING = (signal.SIGINT, signal.SIGTERM)  # the signals that `delayed` delays
_PATIENCE_SECONDS = 1.0


class Signals:
    """A context of the main thread in which another thread calls `act` with the number of each of these signals."""

    def __init__(self, act: Callable[[int], None], *numbers: int):
        self._act, self._numbers = act, numbers

    def __enter__(self) -> "Signals":
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._writable, False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._fd_before = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in self._numbers}
        return self

    def _listen(self) -> None:
        while number := os.read(self._readable, 1):
            if number[0] in self._numbers:
                self._act(number[0])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writable)
        self._thread.join()
        os.close(self._readable)


def say(line: str) -> None:
    """Write a line to stderr without Python's lock of it, which the main thread may hold.

    If stderr is a full pipe, the line is dropped after a moment, because a thread that waits receives no other signal.
    """
    with suppress(OSError, ValueError):
        if select.select([], [2], [], _PATIENCE_SECONDS)[1]:
            os.write(2, f"{line}\n".encode())


def ends_at_once(line: str) -> Signals:
    """A context in which Ctrl-C prints the line and ends the process."""

    def act(_: int) -> None:
        say(line)
        os._exit(INTERRUPTED)

    return Signals(act, signal.SIGINT)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as sent by `timeout`, SLURM or the end of a container. Code cleans up as after Ctrl-C."""


@contextmanager
def raises(where_ignored: bool = True) -> Iterator[None]:
    """A context in which Ctrl-C raises KeyboardInterrupt, and SIGTERM raises `Terminated`.

    An extension module that is being imported turns these into an ImportError. So after a signal the context raises
    the signal's exception in place of any other.

    Args:
      where_ignored: Ctrl-C acts even if this process was started with Ctrl-C ignored.
    """
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    came: list[int] = []

    def end(number: int, _: object) -> None:
        came.append(number)
        raise kinds[signal.Signals(number)]

    numbers = [n for n in kinds if where_ignored or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    except Exception:
        if came:
            raise kinds[signal.Signals(came[0])] from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's


@contextmanager
def delayed() -> Iterator[None]:
    """A context of the main thread that delays Ctrl-C and SIGTERM to its end.

    In a process that is started in it, they are blocked until it unblocks `WAITING` (`signal.pthread_sigmask`).
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread only
        yield
        return
    came: list[int] = []
    # The mask alone is not enough: another thread may receive the signal, and Python calls the handler in this one.
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in WAITING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, WAITING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # now the handler records the blocked signals
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code that shells report for a program ended by the signal."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
