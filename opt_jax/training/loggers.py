"""Loggers of a run's metrics besides `metrics.jsonl` (TensorBoard, Weights & Biases), and traces of the profiler."""

import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from opt_jax.checkpoints.hub import is_remote
from opt_jax.system.disk import disk_errors
from opt_jax.system.reading import read_small
from opt_jax.system.temporary import write_file

_MOST_WAITING = 100_000  # numbers that wait to be written to TensorBoard's files


class TensorBoard:
    """Writes event files of TensorBoard.

    Args:
      directory: where the files are written.
      start: the step at which this start begins. TensorBoard then ignores later steps of an earlier start.

    Raises:
      OSError: here or in the methods: the files cannot be written.
    """

    def __init__(self, directory: epath.Path, start: int):
        from tensorboardX import SummaryWriter  # of the extra `tensorboard`

        # The suffix keeps files apart: their names contain the time in seconds, and two starts may share a second.
        self._directory, self._error = directory, None
        self._hook, threading.excepthook = threading.excepthook, self._note
        with disk_errors(directory):
            # A long queue: if the writing thread has ended (see `_note`), `add_scalar` waits forever on a full one.
            self._writer = SummaryWriter(
                str(directory), purge_step=start + 1, filename_suffix=f".{start}", max_queue=_MOST_WAITING
            )

    def _note(self, failed: threading.ExceptHookArgs) -> None:
        """A `threading.excepthook` that keeps the error at which the writing thread has ended, for `_raise`."""
        if isinstance(failed.exc_value, OSError):
            self._error = failed.exc_value
        else:
            self._hook(failed)

    def write(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                self._raise()
                self._writer.add_scalar(name, value, values["step"])

    def _raise(self) -> None:
        if self._error is not None:
            with disk_errors(self._directory):
                raise self._error

    def close(self) -> None:
        threading.excepthook = self._hook
        if self._error is None:
            with disk_errors(self._directory):
                self._writer.close()
        else:
            # Nobody reads the queue any more. If it is full, Python would wait for it at exit.
            queue: Any = self._writer.file_writer.event_writer._event_queue  # type: ignore[reportOptionalMemberAccess]
            queue.cancel_join_thread()


class WandB:
    """Sends metrics to Weights & Biases. All starts of a run are one run there; its id is in the file `wandb-id`.

    For steps that a resumed run repeats, the service keeps the first numbers. (On the same mesh they are equal.)

    Args:
      output: the run directory.
      config: what the service shows as the run's configuration.

    Raises:
      ValueError: the service cannot be reached or refuses the login.
    """

    def __init__(self, project: str, output: epath.Path, config: dict[str, Any]):
        import wandb  # type: ignore[reportMissingImports]  # of the extra `wandb`

        path = output / "wandb-id"
        if not path.exists():
            write_file(path, f"{uuid.uuid4().hex[:12]}\n".encode())
        run_id = read_small(path).decode().strip()
        self._directory = output / "wandb"  # for messages: an error of writing there names no file
        # `logging` prints a traceback for each record that W&B's log file has no room for.
        logging.raiseExceptions = False
        try:
            with disk_errors(self._directory):
                self._run = wandb.init(
                    project=project,
                    id=run_id,
                    resume="allow",
                    name=output.name,
                    config=config,
                    dir=None if is_remote(output) else str(output),
                )
        except wandb.Error as error:  # no key, no network
            raise ValueError(f"--wandb {project}: {error}") from None

    def write(self, values: dict[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        with disk_errors(self._directory):
            self._run.log(numbers, step=int(numbers.pop("step")))

    def close(self) -> None:
        with disk_errors(self._directory):
            self._run.finish()


class Trace:
    """Traces steps with `jax.profiler`: those of the `wanted` ones that this start does.

    Args:
      wanted: steps.
      directory: where the trace is written.
      start, last: this start does the steps start + 1 to last.
      say: called with lines for the log.
    """

    def __init__(self, wanted: range, directory: epath.Path, start: int, last: int, say: Callable[[str], Any]):
        steps = range(max(wanted.start, start + 1), min(wanted.stop, last + 1)) if wanted else wanted
        if wanted and not steps:
            say(f"nothing to trace: this start does steps {start + 1} to {last}")
        self._steps, self._directory, self._say, self._running = steps, directory, say, False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Start the trace if `step` is the first wanted one."""
        if self._steps and step == self._steps[0]:
            with disk_errors(self._directory):
                jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Stop the trace if `step` is the last wanted one, when its `results` have been computed."""
        if self._steps and step == self._steps[-1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False  # even if stopping fails
            with disk_errors(self._directory):
                jax.profiler.stop_trace()
            self._say(f"traced: steps {self._steps[0]} to {self._steps[-1]} are in {self._directory}")
