"""Ctrl-C and SIGTERM that act at once and are not lost, whatever the main thread does. No jax.

Python calls a handler in the main thread, when that is back in Python: after XLA's computation, or never. A
KeyboardInterrupt is swallowed or wrapped in a callback, in a destructor, amid JAX's tracing. Here a thread is told.
"""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = 128 + signal.SIGINT  # the exit code, as shells say of a program that Ctrl-C ended
WAITING = (signal.SIGINT, signal.SIGTERM)  # in `delayed`
_PATIENCE_SECONDS = 1.0


class Signals:
    """Context of the main thread in which another thread calls `act` with the number of each of these signals."""

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
    """To stderr, without the locks of Python's, which the main thread may hold. If that is a pipe which nobody reads,
    the line is given up: waiting, this thread would learn of no other signal."""
    with suppress(OSError, ValueError):
        if select.select([], [2], [], _PATIENCE_SECONDS)[1]:
            os.write(2, f"{line}\n".encode())


def ends_at_once(line: str) -> Signals:
    """Context in which Ctrl-C prints the line and ends the process."""

    def act(_: int) -> None:
        say(line)
        os._exit(INTERRUPTED)

    return Signals(act, signal.SIGINT)


class Terminated(KeyboardInterrupt):
    """SIGTERM, of `timeout`, SLURM or a container's end: cleans up as after Ctrl-C."""


@contextmanager
def raises(where_ignored: bool = True) -> Iterator[None]:
    """Context in which Ctrl-C raises KeyboardInterrupt, and SIGTERM `Terminated`.

    An extension module makes an ImportError of one that comes while it is imported. So once a signal has come, that is
    what the block raises, whatever else ends it.

    where_ignored: Ctrl-C does so even where a shell has started us with it ignored.
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
    """Context of the main thread in which Ctrl-C and SIGTERM wait; they act when it ends.

    A process that is started in it has them blocked, until it unblocks `WAITING` (`signal.pthread_sigmask`).
    """
    if threading.current_thread() is not threading.main_thread():  # handlers never run there
        yield
        return
    came: list[int] = []
    # The mask alone is not enough: another thread may take the signal, and Python calls the handler in this one.
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in WAITING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, WAITING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what has waited is recorded here
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """As shells say it of a program that the signal ended."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
