"""Start and end of a job of several processes: they start together, and all end when one of them is lost.

A single process may call these functions, too. It then starts no connection and waits for no other process.
"""

import glob
import importlib.util
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress

import jax
import numpy as np
from jax.experimental import multihost_utils

from opt_jax.parallel.agreement import from_first
from opt_jax.parallel.watchdog import Watchdog, listen
from opt_jax.system.disk import error_line, warning_lines, without_tracebacks
from opt_jax.system.interrupts import Signals, say
from opt_jax.system.messages import one_line

# Exit codes besides 0 and 1, which a launcher may want to treat differently.
PREEMPTED = 143  # a checkpoint was written after SIGTERM: 128 + 15, as if the signal had ended the process
LOST_PROCESS = 75  # another process of the job has ended or hangs: start all again (EX_TEMPFAIL)

HEARTBEAT_SECONDS, HANG_MINUTES = 30, 60  # defaults of `start` and of command-line options
START_SECONDS = 300  # the time that processes wait for each other at the start


_watchdog: Watchdog | None = None


# Start ------------------------------------------------------------------------------------------------------


def start(
    mode: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    hang_minutes: float = HANG_MINUTES,
) -> None:
    """Call `jax.distributed.initialize` if this is one process of a job. Must run before other uses of JAX.

    Args:
      mode: "auto": if the next three values are given, or the environment is that of a cluster. "on": always; JAX finds
        the cluster, or this fails. "off": never.
      coordinator_address: host and port of process 0. Give all three values or none.
      num_processes: number of processes of the job.
      process_id: number of this process.
      heartbeat_seconds: a process that sends nothing for this time counts as lost.
      hang_minutes: the longest time without progress.

    Raises:
      ValueError: incomplete values, no cluster, or time limits for a process that waits for no other.
    """
    explicit = (coordinator_address, num_processes, process_id)
    if not is_job(mode, *explicit):
        if any(v is not None for v in explicit):
            raise ValueError("--distributed off: leave out --coordinator-address, --num-processes and --process-id")
        for flag, value, default in (
            ("--heartbeat-seconds", heartbeat_seconds, HEARTBEAT_SECONDS),
            ("--hang-minutes", hang_minutes, HANG_MINUTES),
        ):
            if value != default:
                raise ValueError(f"{flag} {value} without effect: this process waits for no other; leave it out")
        return
    if any(v is not None for v in explicit) and None in explicit:
        raise ValueError("--coordinator-address, --num-processes and --process-id go together")
    if coordinator_address is not None and not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(f"--coordinator-address {coordinator_address}: needs a host and a port, as in 10.0.0.1:8476")
    seconds = min(START_SECONDS, 60 * hang_minutes)
    try:
        # JAX's time-outs end a process in C++ without our message, so they are twice as long as ours.
        with _all_here_within(seconds, coordinator_address, process_id):
            jax.distributed.initialize(
                *explicit,
                initialization_timeout=math.ceil(2 * seconds),
                heartbeat_timeout_seconds=2 * heartbeat_seconds,
                shutdown_timeout_seconds=2 * heartbeat_seconds,
            )
            jax.devices()  # waits for the others
    except (ValueError, RuntimeError) as e:
        raise ValueError(
            f"no cluster: {one_line(e)}: give --coordinator-address host:port, --num-processes and "
            "--process-id, or --distributed off for a process alone"
        ) from None
    if jax.process_count() > 1:
        _watch(coordinator_address, heartbeat_seconds, hang_minutes)


def is_job(
    mode: str,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> bool:
    """Whether `start` with these arguments makes this process one of a job, or fails to.

    Raises:
      ValueError: see `in_cluster`.
    """
    explicit = any(value is not None for value in (coordinator_address, num_processes, process_id))
    return mode == "on" or mode == "auto" and (explicit or in_cluster())


@contextmanager
def _all_here_within(
    seconds: float, coordinator_address: str | None, process_id: int | None
) -> Generator[None, None, None]:
    """A context manager that ends this process, with one line, if its body takes longer than `seconds`."""
    who = "" if process_id is None else f"process {process_id}: "
    where = "" if coordinator_address is None else f", or that does not reach {coordinator_address}"
    line = (
        f"{who}waited {seconds:g} s for the other processes to start: look for one that has not started, or has ended"
        f"{where}; then start all of them again"
    )

    def end() -> None:
        say(line)
        os._exit(LOST_PROCESS)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def in_cluster() -> bool:
    """Whether the environment says that this is one process of several. JAX then detects the others itself.

    Raises:
      ValueError: it is one of several, but JAX cannot detect the others.
    """
    has, count = os.environ.__contains__, lambda name: int(os.environ.get(name, "1"))
    if has("SLURM_STEP_NODELIST") and has("SLURM_PROCID"):  # under srun; a batch script itself has no step
        return count("SLURM_NTASKS") > 1
    if has("OMPI_COMM_WORLD_SIZE"):
        return count("OMPI_COMM_WORLD_SIZE") > 1
    if "," in os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", "")):  # GKE
        return importlib.util.find_spec("libtpu") is not None and bool(_tpu_devices())
    if count("MEGASCALE_NUM_SLICES") > 1:
        return True
    if has("KUBERNETES_SERVICE_HOST") and has("JOB_COMPLETION_INDEX"):  # an indexed Job
        if importlib.util.find_spec("kubernetes") is not None:
            return True
        if (index := os.environ["JOB_COMPLETION_INDEX"]) != "0":  # not the first pod, so one of several
            raise ValueError(
                f"pod {index} of a Kubernetes job cannot find the others: pip install kubernetes, or give "
                "--coordinator-address, --num-processes and --process-id; --distributed off for pods that work alone"
            )
        return False
    # On a Cloud TPU VM the metadata server knows whether there are several; JAX asks it.
    on_tpu_vm = importlib.util.find_spec("libtpu") is not None and bool(_tpu_devices())
    return on_tpu_vm and not has("TPU_SKIP_MDS_QUERY") and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def _tpu_devices() -> list[str]:
    return glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")


def _watch(coordinator_address: str | None, heartbeat_seconds: int, hang_minutes: float) -> None:
    """Start the watchdog, which connects every process with process 0."""
    global _watchdog
    watchdog = Watchdog(
        jax.process_index(),
        jax.process_count(),
        seconds=heartbeat_seconds,
        hang_minutes=hang_minutes,
        exit_code=LOST_PROCESS,
    )
    accepting, stop, address, token = None, threading.Event(), "", ""
    if jax.process_index() == 0:
        host = coordinator_address.rpartition(":")[0].strip("[]") if coordinator_address else None
        server, address, token = listen(host, jax.process_count())
        accepting = threading.Thread(target=watchdog.accept, args=(server, token, stop), daemon=True)
        accepting.start()
    address, token = json.loads(from_first(lambda: json.dumps([address, token]).encode()))
    problem = None if accepting else watchdog.connect(address, token)
    connected = multihost_utils.process_allgather(np.asarray(problem is None)).reshape(-1)
    if problem is not None:
        print(
            f"process {jax.process_index()}: no watchdog, since {address} cannot be reached ({problem}): a lost "
            f"process will be noticed by JAX alone, after {2 * heartbeat_seconds} s",
            file=sys.stderr,
            flush=True,
        )
    if accepting:
        stop.set()
        accepting.join()
        watchdog.watch_only(np.flatnonzero(connected))
    watchdog.start()
    _watchdog = watchdog


def reached(where: str) -> None:
    """Tell the watchdog that this process has made progress; `where` names the point for messages."""
    if _watchdog is not None:
        _watchdog.reached(where)


# End --------------------------------------------------------------------------------------------------------


@contextmanager
def last_words(program: str, at_once: bool = False) -> Generator[None, None, None]:
    """A context manager around a complete program, which turns errors into one line and an exit code.

    ValueError and OSError become `PROGRAM: error: ...` and exit code 1, warnings `PROGRAM: warning: ...`. In a job of
    several processes, any error and Ctrl-C end this process at once, without JAX's shutdown, which would wait for the
    other processes.

    Args:
      program: the name of the program in messages.
      at_once: whether a single process ends without waiting for its threads, too. Those of Orbax may wait for minutes
        for a write that has failed.
    """
    try:
        with Signals(end_at_once, signal.SIGINT), warning_lines(f"{program}: "), without_tracebacks():
            yield
    except (ValueError, OSError) as error:
        if not jax.distributed.is_initialized():
            message = f"{program}: error: {error_line(error)}"
            if not at_once:
                sys.exit(message)
            with suppress(OSError):  # the log may be on a full disk
                print(message, file=sys.stderr, flush=True)
                print(end="", flush=True)
            os._exit(1)
        _leave(f"{program}: error: process {jax.process_index()}: {error_line(error)}")
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and _watchdog is not None:
            # Most likely a collective failed because another process ended. Give the watchdog time to report that.
            _watchdog.join(timeout=_watchdog.seconds + 5)
        _leave(traceback.format_exc())
    finally:
        if jax.distributed.is_initialized():
            if _watchdog is not None:
                _watchdog.finish()
            jax.distributed.shutdown()


def end_at_once(number: int) -> None:
    """End this process after signal `number`, and tell the other processes. May be called from any thread."""
    say("interrupted: start again with the same command")
    if _watchdog is not None:
        _watchdog.fail()
    os._exit(128 + number)


def _leave(message: str) -> None:
    """End this process of a job with a message, and tell the other processes."""
    with suppress(OSError):  # the log may be on a full disk
        print(message, file=sys.stderr, flush=True)
    if _watchdog is not None:
        _watchdog.fail()
        if jax.process_index() == 0:
            _watchdog.wait_for_others()  # they may have the same error; let them report it
        else:
            time.sleep(0.5)
    os._exit(1)
