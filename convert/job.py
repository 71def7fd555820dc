"""Start and end of a conversion, in one process or as one of several."""

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
    """A context for a conversion. The processes of a job start and end together.

    If a single process is interrupted, it removes what it has half-written. A process of a job ends at once, because
    others may be waiting for it; the next conversion cleans up.

    Args:
      distributed: "auto", "on" or "off", the `mode` of `processes.start`, which documents the other arguments, too.
      coordinator_address, num_processes, process_id, hang_minutes: see there.
      options: all other options of the command line. The processes of a job must have the same.

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
                # After `start`, in which JAX installs its own handler of SIGTERM.
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
    """Make JAX use the CPU unless JAX_PLATFORMS is set: a conversion needs no accelerator.

    The variable is not set here, because `processes.in_cluster` reads it to see whether this is a host of a TPU pod.
    """
    import jax

    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def repeat_lost_signals(unraisable: Any) -> None:
    """Send a signal again if Python dropped its exception, as it does in destructors and garbage collection.

    For use as `sys.unraisablehook`.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):  # exc_value may be None before Python 3.12
        again = signal.SIGTERM if unraisable.exc_type is Terminated else signal.SIGINT
        main_thread = threading.main_thread().ident
        while True:
            with suppress(KeyboardInterrupt):  # on a busy machine the signal may arrive before `return`: try again
                # A timer sends it later, because Python would drop an exception that is raised in this hook, too.
                threading.Timer(0.01, signal.pthread_kill, (main_thread, again)).start()
                return
    else:
        sys.__unraisablehook__(unraisable)
