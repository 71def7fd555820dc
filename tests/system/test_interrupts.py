"""Ctrl-C is never lost, whatever the main thread is doing. Its effect on a run before and after the first step."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY
from support.processes import environment

from convert.job import repeat_lost_signals
from opt_jax.parallel import processes
from opt_jax.system.interrupts import Signals, Terminated, delayed, exit_code, raises, say
from opt_jax.training.moments import Termination


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_amid_a_garbage_collection_reaches_the_thread_and_all_is_restored():
    before, came = signal.getsignal(signal.SIGINT), threading.Event()

    def collected(*_: object) -> None:  # Python drops a KeyboardInterrupt that is raised here
        gc.callbacks.remove(collected)
        send()
        assert came.wait(timeout=20)  # the signal's thread gets it without the main thread

    with raises():
        handler = signal.getsignal(signal.SIGINT)
        with Signals(lambda number: came.set(), signal.SIGINT):
            gc.callbacks.append(collected)
            gc.collect()
        assert came.is_set() and signal.getsignal(signal.SIGINT) is handler
        assert signal.set_wakeup_fd(-1) == -1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_that_an_extension_module_makes_an_import_error_of_is_not_lost(number, kind):
    with pytest.raises(KeyboardInterrupt) as interrupt, raises():
        try:
            send(number)
        except KeyboardInterrupt:
            raise ImportError("Encountered an error while initializing the extension.") from None
    assert interrupt.type is kind and exit_code(interrupt.value) == 128 + number
    with pytest.raises(ImportError), raises():
        raise ImportError("no such module")


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_waits_for_the_end_of_a_block_that_delays_it(number, kind):
    reached, before = [], signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as interrupt, raises():
        with delayed():
            send(number)
            threading.Thread(target=send, args=(number,)).start()  # from a thread that does not block the signal
            time.sleep(0.05)
            reached.append("the end of the block")
        reached.append("behind it")
    assert interrupt.type is kind and reached == ["the end of the block"]
    assert signal.getsignal(number) is before and not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_lost_signal_that_is_repeated_too_soon_is_repeated_again(monkeypatch):
    class Busy(threading.Timer):
        count = 0

        def start(self) -> None:
            Busy.count += 1
            super().start()
            if Busy.count == 1:
                self.join()  # until the signal has been sent
                time.sleep(10)

    monkeypatch.setattr(threading, "Timer", Busy)
    with pytest.raises(KeyboardInterrupt), raises():
        repeat_lost_signals(SimpleNamespace(exc_type=KeyboardInterrupt))
        time.sleep(10)
    assert Busy.count == 2


def test_ctrl_c_ends_at_once_before_the_first_step_then_saves_and_the_second_ends(monkeypatch, capfd):
    ended, calls = [], threading.Semaphore(0)
    monkeypatch.setattr(processes, "end_at_once", lambda number: (ended.append(number), calls.release()))
    with Termination() as termination:
        send()
        assert calls.acquire(timeout=20) and ended == [signal.SIGINT]
        termination.came = None
        assert not termination.asked(1)
        send()
        while not termination.asked(2):
            pass
        assert termination.reason_and_exit_code() == ("Ctrl-C", 130)
        send()
        assert calls.acquire(timeout=20) and ended == [signal.SIGINT] * 2
    assert capfd.readouterr().err.startswith("Ctrl-C: saving a checkpoint; a second Ctrl-C ends at once")
    with Termination() as termination:
        send(signal.SIGTERM)  # before the first step too, SIGTERM waits for a checkpoint
        while not termination.asked(1):
            pass
        assert termination.reason_and_exit_code() == ("SIGTERM", 143)


def test_a_line_for_a_pipe_that_nobody_reads_is_given_up():
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    stderr = os.dup(2)
    try:
        with suppress(BlockingIOError):
            while True:
                os.write(writable, b"x" * 1024)
        os.set_blocking(writable, True)
        os.dup2(writable, 2)
        thread = threading.Thread(target=say, args=("a line",), daemon=True)
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive()
    finally:
        os.dup2(stderr, 2)
        for descriptor in (readable, writable, stderr):
            os.close(descriptor)


@pytest.mark.parametrize("program, module", [("train.py", "jax"), ("-m opt_jax", "tyro"), ("-m convert", "tyro")])
@pytest.mark.parametrize("ignored", [False, True])
def test_amid_the_imports_ctrl_c_ends_a_program_but_not_a_job_in_the_background(tmp_path, ignored, program, module):
    """Jobs that a shell starts in the background ignore Ctrl-C."""
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('went on')"
    (tmp_path / f"{module}.py").write_text(code)  # in place of the first slow import
    command = f"exec {sys.executable} {program}"
    run = subprocess.run(
        ["sh", "-c", f"trap '' INT; {command}" if ignored else command],
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=f"{tmp_path}:{REPOSITORY}"),
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == ((1, "went on\n") if ignored else (-signal.SIGINT, ""))
