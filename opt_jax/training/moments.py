"""When a run writes a checkpoint (`Due`), and when it ends because of SIGTERM or Ctrl-C (`Termination`)."""

import os
import signal
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from opt_jax.parallel import processes
from opt_jax.system.interrupts import INTERRUPTED, Signals, say

_LOOK_SECONDS = 5.0  # in a job, process 0 reads its clock for all about this often


class Due:
    """`due(step)` says whether a checkpoint is due after this step.

    It is at multiples of `every` and of `keep_every`, and when the last one is `minutes` old. All processes get the
    same answer, because process 0 reads the clock.

    Args:
      every: steps.
      minutes: minutes, or None.
      keep_every: steps, or None.
      first: the step at which this start begins.
    """

    def __init__(self, every: int, minutes: float | None, keep_every: int | None, first: int):
        self._every, self._minutes, self._keep_every = every, minutes, keep_every or every
        self._saved = self._looked = time.monotonic()
        self._next_look, self._last_look = first + 1, first

    def __call__(self, step: int) -> bool:
        return step % self._every == 0 or step % self._keep_every == 0 or self._time_is_up(step)

    def _time_is_up(self, step: int) -> bool:
        if self._minutes is None or step < self._next_look:
            return False
        now = time.monotonic()
        pace = (now - self._looked) / (step - self._last_look)
        # A broadcast costs the devices some time, so short steps do not have one each.
        wait = 1 if jax.process_count() == 1 else int(np.clip(_LOOK_SECONDS / max(pace, 1e-6), 1, 10_000))
        answer = np.asarray([now - self._saved >= self._minutes * 60, wait], np.int32)
        if jax.process_count() > 1:
            with jax.transfer_guard("allow"):
                answer = multihost_utils.broadcast_one_to_all(answer)
        self._looked, self._last_look, self._next_look = now, step, step + int(answer[1])
        return bool(answer[0])

    def saved(self) -> None:
        """Count the minutes from now on."""
        self._saved = time.monotonic()


class Termination:
    """A context in which SIGTERM or Ctrl-C requests a checkpoint and a clean end.

    A second signal ends the process at once. So does a Ctrl-C before the first step, when there is nothing to save.

    Attributes:
      came: the first of these signals, or None.
    """

    def __enter__(self) -> "Termination":
        self.came: int | None = None
        self._stepped = False
        # In a job, JAX handles SIGTERM and makes all processes agree on a step.
        job = jax.distributed.is_initialized()
        self._signals = Signals(self._note, signal.SIGINT, *(() if job else (signal.SIGTERM,)))
        self._signals.__enter__()
        return self

    def _note(self, number: int) -> None:
        if self.came is not None or number == signal.SIGINT and not self._stepped:
            processes.end_at_once(number)
        self.came = number
        if number == signal.SIGINT:
            say("Ctrl-C: saving a checkpoint; a second Ctrl-C ends at once, without it")
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__()

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`. All processes must ask at every step, and get the same answer."""
        self._stepped = True
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.came is not None

    def reason_and_exit_code(self) -> tuple[str, int]:
        """The name of the signal, and the exit code."""
        return ("Ctrl-C", INTERRUPTED) if self.came == signal.SIGINT else ("SIGTERM", processes.PREEMPTED)
