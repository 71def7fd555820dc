"""Batches are read before their steps ask for them. The disk is a stream whose reads wait until a test lets them go."""

import contextlib
import threading

import numpy as np
import pytest

from opt_jax.data import windows as windows_module
from opt_jax.data.tokens import Tokens
from opt_jax.data.windows import AHEAD, Reader, Windows

ROWS, LENGTH = 4, 10
SECONDS = 30  # until a test that hangs fails


class Disk(Tokens):
    """A disk that reads a batch after it has been let go. `begun` counts its reads of rows."""

    def __init__(self):
        super().__init__("disk", np.arange(40 * LENGTH * ROWS + 1, dtype=np.int32))
        self.begun, self.broken, self._changed, self._go = 0, (), threading.Condition(), None

    def slow(self, order: Windows, go: dict[int, threading.Event]) -> None:
        """From now on, the reads of step n wait for `go[n]`."""
        self._go = {int(start): go[step] for step in go for start in order.starts(step)}

    def read(self, start, length):
        if threading.current_thread().name.startswith("read-ahead"):
            with self._changed:
                self.begun += 1
                self._changed.notify_all()
            if self._go is not None:
                assert self._go[start].wait(SECONDS)
            if start in self.broken:
                raise OSError(5, "a bad block")
        return super().read(start, length)

    def wait_for(self, begun: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.begun >= begun, SECONDS)


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def order(disk):
    return Windows([disk], LENGTH, ROWS, seed=3)


def all_rows(take):
    return take(slice(0, ROWS))["input_ids"]


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_steps_that_are_slower_than_the_disk_never_wait(disk, order, monkeypatch):
    """Each step lasts until the reads of the batch after the next have begun: those of the next are done then."""
    monkeypatch.setattr(windows_module, "_THREADS", 1)
    with Reader(order, range(ROWS), 0, 20) as reader:
        for step, _ in zip(range(15), reader, strict=False):
            assert reader.waits <= 1  # the first step has nothing to do until its batch is there
            disk.wait_for((step + 2) * ROWS + 1)
    assert reader.waits <= 1


def test_steps_that_are_faster_than_the_disk_are_counted(disk, order):
    """Each batch can only be read while its step waits for it."""
    go = {step: threading.Event() for step in range(20)}
    disk.slow(order, go)
    waited = []

    @contextlib.contextmanager
    def waiting():
        go[len(waited) + 7].set()
        waited.append(reader.waits)
        yield

    with Reader(order, range(ROWS), 7, 17, waiting=waiting) as reader:
        batches = [all_rows(take) for take in reader]
        assert reader.waits == 10 and waited == list(range(1, 11))
    for step, batch in enumerate(batches, start=7):
        np.testing.assert_array_equal(batch, order.rows(step)[:, :-1])


@pytest.mark.parametrize("rows", [range(ROWS), [1, 2]])
def test_what_is_read_ahead_has_a_bound(disk, order, rows):
    """A process reads its rows of AHEAD batches, whatever the speed of the disk, and then waits for the step."""
    with Reader(order, rows, 0, 30) as reader:
        for step, _ in zip(range(3), reader, strict=False):
            disk.wait_for((step + 1 + AHEAD) * len(rows))
    assert disk.begun == (3 + AHEAD) * len(rows) and not reading_threads()


def test_the_rows_of_a_batch_are_read_at_the_same_time(disk, order):
    """Reads of a slow disk do not wait for each other."""
    go = {step: threading.Event() for step in range(20)}
    disk.slow(order, go)

    @contextlib.contextmanager
    def waiting():
        disk.wait_for(AHEAD * ROWS)
        for event in go.values():
            event.set()
        yield

    with Reader(order, range(ROWS), 0, 9, waiting=waiting) as reader:
        assert len(list(reader)) == 9


def test_an_error_of_the_disk_comes_with_the_step_that_needs_the_batch(disk, order):
    disk.broken = (int(order.starts(3)[2]),)
    steps = []
    with (
        pytest.raises(OSError, match="a bad block") as error,
        Reader(order, range(ROWS), 0, 9) as reader,
    ):
        for take in reader:
            steps.append(all_rows(take))
    assert len(steps) == 3 and not reading_threads()
    assert [entry.name for entry in error.traceback][-1] == "read"


def test_a_loop_that_ends_early_leaves_no_reads(disk, order):
    go = {step: threading.Event() for step in range(20)}
    go[0].set()
    disk.slow(order, go)
    with pytest.raises(KeyboardInterrupt), Reader(order, range(ROWS), 0, 9) as reader:
        next(iter(reader))
        threading.Timer(0.05, lambda: [event.set() for event in go.values()]).start()
        raise KeyboardInterrupt
    assert not reading_threads()
