"""How a conversion starts and is ended, alone or as one of several processes."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from opt_jax.system.disk import error_line
from opt_jax.system.interrupts import Signals, Terminated, raises


class UsageError(Exception):
    """Options that contradict each other or have no effect: exit code 2."""


@contextmanager
def started(
    distributed: str,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    hang_minutes: int,
    options: Mapping[str, Any],
) -> Iterator[None]:
    """Around a conversion: the processes of a job start together and end together; see `processes.start`.

    `options`: all others of the command line. The processes of a job must have the same.

    A process alone that is interrupted clears away what it has half-written. A process of a job ends at once, since the
    others may be waiting for it; the next conversion clears.

    Raises:
      UsageError: the arguments do not go together, or there is no cluster.
      ValueError: the processes have different options.
    """
    from opt_jax.parallel import agreement, processes

    leave_accelerators_alone()
    if hang_minutes < 1:
        raise UsageError(f"--hang-minutes {hang_minutes}: must be at least 1")
    arguments = distributed, coordinator_address, num_processes, process_id
    with ExitStack() as stack:
        try:
            if processes.is_job(*arguments):
                stack.enter_context(processes.last_words("convert"))
                processes.start(*arguments, hang_minutes=hang_minutes)
                # After `start`, in which JAX takes SIGTERM for itself.
                stack.enter_context(Signals(processes.end_at_once, signal.SIGINT, signal.SIGTERM))
            else:
                stack.enter_context(raises(where_ignored=False))
                processes.start(*arguments, hang_minutes=hang_minutes)
        except ValueError as e:
            raise UsageError(error_line(e)) from None
        agreement.check_same_options(options)
        processes.reached("opening SRC")
        yield


def leave_accelerators_alone() -> None:
    """Compute on the CPU, unless JAX_PLATFORMS says otherwise: a conversion is from files to files.

    The variable is not set here, because `processes.in_cluster` reads it to see whether this is a host of a TPU pod.
    """
    import jax

    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def repeat_lost_signals(unraisable: Any) -> None:
    """`sys.unraisablehook`: a signal amid a garbage collection or a destructor has raised in vain; send it again."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):  # exc_value may be None, before Python 3.12
        again = signal.SIGTERM if unraisable.exc_type is Terminated else signal.SIGINT
        main_thread = threading.main_thread().ident
        while True:
            with suppress(KeyboardInterrupt):  # on a busy machine the timer is sooner than `start` is done: once more
                # Not sent here, which is such a place too.
                threading.Timer(0.01, signal.pthread_kill, (main_thread, again)).start()
                return
    else:
        sys.__unraisablehook__(unraisable)
