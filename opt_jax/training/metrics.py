"""The metrics of a run: `metrics.jsonl`, and a progress bar (or plain lines if the output is not a terminal)."""

import contextlib
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import opt_jax
from opt_jax.system.temporary import write_file
from opt_jax.training import goodput
from opt_jax.training.files import Lines, ranges, read_metrics
from opt_jax.training.nonfinite import NonFiniteError

# A loss is a spike if it is more than SPIKE_DEVIATIONS deviations above the median of the last finite losses, of which
# there must be SPIKE_AFTER; at most SPIKE_WINDOW count. A deviation is 1.4826 times their median absolute deviation,
# and at least 1 % of the median. For normal losses this is the standard deviation, but earlier spikes hardly change it.
SPIKE_DEVIATIONS, SPIKE_AFTER, SPIKE_WINDOW = 6.0, 20, 100
# With --skip-nonfinite: so many skipped updates in a row mean that the weights are bad, not the data.
MOST_SKIPS_IN_A_ROW = 20


def say(line: str) -> None:
    """Print a line, on process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)


def complain(line: str) -> None:
    """Print a line to stderr, on every process, because the others may not know what is wrong."""
    print(line, file=sys.stderr, flush=True)


def machine(mesh: Mesh) -> str:
    """Versions, processes, devices and mesh of this run, in one line."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    versions = f"opt-jax {opt_jax.__version__}, "
    versions += ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    count = jax.process_count()
    return (
        f"{versions}, Python {platform.python_version()}; {count} process{'es' * (count > 1)}, "
        f"{mesh.size} x {' and '.join(kinds)} ({mesh.devices.flat[0].platform}), mesh {axes}"
    )


def cut_back(path: epath.Path, step: int, say: Callable[[str], Any], first: int = 0) -> None:
    """Remove from `metrics.jsonl` the lines after that of `step`, and an incomplete last one.

    Args:
      path: the file; it need not exist.
      step: the last step to keep.
      say: called with a line that names the steps without a line, if there are any.
      first: the step at which the run began.

    Raises:
      ValueError: a line that is kept is damaged, or train.py has not written it.
    """
    if step <= first:
        with contextlib.suppress(ValueError):  # a damaged line is removed, too
            goodput.no_step_left(next((line.get("began") for _, line in read_metrics(path)), None))
    lines, last = {}, 0
    past = read_metrics(path)
    while last < step and (entry := next(past, None)) is not None:
        last = entry[1]["step"]
        lines[last] = entry[0]
    if missing := [i for i in range(first + 1, step + 1) if i not in lines]:
        say(
            f"{path} has no line for {len(missing)} of {step - first} steps ({ranges(missing)}): their numbers are lost"
        )
    if path.exists():
        write_file(path, b"".join(line for i, line in lines.items() if i <= step))


def best_validation(path: epath.Path) -> tuple[int, float] | tuple[None, None]:
    """(step, val_loss) of the step with the lowest validation loss, the first of equal ones; (None, None) without."""
    losses = [(line["val_loss"], line["step"]) for _, line in read_metrics(path) if line.get("val_loss") is not None]
    return min(losses)[::-1] if losses else (None, None)


class Metrics:
    """Appends one JSON object per step to `metrics.jsonl`, shows progress, and reports spikes, NaNs and infinities.

    Args:
      path: the file. None, on every process but 0: only look for NaNs and infinities.
      start: the step at which this start begins.
      log_every: steps between lines if the output is not a terminal.
      flops_per_step: the model FLOPs of a step, over all devices.
      peak_flops: the peak FLOP/s of all devices together. With both, MFU is among the metrics.
      batch_rows: called with a step; returns where in the data its batch is, for messages.
      skip_nonfinite: updates with NaNs or infinities are skipped; otherwise they are an error.
      loggers: objects with `write(values)` and `close()`, on process 0.
      memory_of: devices whose memory is reported.
      before_write: see `Lines`.
    """

    def __init__(
        self,
        path: epath.Path | None,
        *,
        start: int,
        steps: int,
        tokens_per_step: int,
        log_every: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        batch_rows: Callable[[int], np.ndarray] | None = None,
        skip_nonfinite: bool = False,
        loggers: Sequence[Any] = (),
        memory_of: Sequence[Any] = (),
        before_write: Callable[[], None] = lambda: None,
    ):
        past = deque((line for _, line in read_metrics(path)) if path is not None else (), 2 * SPIKE_WINDOW)
        self._skipped = past[-1].get("skipped") or 0 if past else 0
        self._losses = deque((line["loss"] for line in past if line.get("loss") is not None), SPIKE_WINDOW)
        self._file = None if path is None else Lines(path, before_write)
        self._tokens, self._log_every, self._steps = tokens_per_step, log_every, steps
        self._mfu_seconds = flops_per_step / peak_flops if flops_per_step and peak_flops else None
        self._batch_rows, self._skip, self._in_a_row = batch_rows, skip_nonfinite, 0
        self._loggers, self._memory_of = loggers, memory_of
        self._path, self._began = path, None
        self._last, self._val_loss, self._measures = time.perf_counter(), None, {}
        self._console = Console()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=path is None or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, line="compiling")

    def __enter__(self) -> "Metrics":
        self._bar.start()
        self._began = goodput.begin()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
        for logger in self._loggers:
            logger.close()
        if self._file is not None:
            self._file.close()
        goodput.end()

    def goodput(self) -> str | None:
        """A line that says where the time of the run went, all starts together; None on every process but 0.

        The time since the last step of this start counts for the checkpoint after it.
        """
        if self._path is None:
            return None
        lines = [line for _, line in read_metrics(self._path)]
        now = time.time()
        if self._began is not None:  # there was no step in this start
            lines.append({"time": now, "began": self._began, "start_seconds": now - self._began})
        elif lines and lines[-1].get("time") is not None:
            lines.append({"time": now, "checkpoint_seconds": now - lines[-1]["time"]})
        summary = goodput.goodput(lines)
        return None if summary is None else str(summary)

    def record(
        self, step: int, measured: dict[str, Any], val_loss: Callable[[], float | dict[str, float] | None] | None = None
    ) -> float | None:
        """Write the metrics of a step, and return its validation loss, or None.

        Waits for the step, because it fetches the metrics from the devices.

        Args:
          step: the number of the update, from 1.
          measured: the metrics that the compiled step returns.
          val_loss: measures the validation loss, or {"val_loss": ..., other measures}. It is called after the time of
            the training step has been taken.

        Raises:
          NonFiniteError: the loss or the gradient norm is not finite, and `skip_nonfinite` is false.
          ValueError: too many updates in a row have been skipped.
        """
        fetched = jax.device_get(measured)
        seconds = time.perf_counter() - self._last
        numbers = {name: float(fetched[name]) for name in ("loss", "lr", "grad_norm")}
        values: dict[str, Any] = {"step": step} | {n: v if math.isfinite(v) else None for n, v in numbers.items()}
        values |= {"tokens": step * self._tokens, "tokens_per_s": self._tokens / seconds, "step_seconds": seconds}
        if self._mfu_seconds is not None:
            values["mfu"] = self._mfu_seconds / seconds
        if (memory := peak_memory(self._memory_of)) is not None:
            values["memory_bytes"] = memory

        self._in_a_row = self._in_a_row + 1 if fetched["skipped"] else 0
        self._skipped += bool(fetched["skipped"])
        if self._skipped:
            values["skipped"] = self._skipped
        if fetched["skipped"]:
            self._nonfinite(values, numbers)
        else:
            self._look_for_spike(values)
        measurement = None
        if val_loss is not None:
            with goodput.spend("validation"):
                measurement = val_loss()
        if measurement is not None:
            if isinstance(measurement, dict):
                measures = measurement
            else:  # math.exp overflows above 709; JSON has no infinity, so the perplexity is null then
                perplexity = math.exp(measurement) if measurement < 700 else math.nan
                measures = {"val_loss": measurement, "val_perplexity": perplexity}
            self._val_loss = measures["val_loss"]
            self._measures = {name: value for name, value in measures.items() if name != "val_loss"}
            values |= {name: value if math.isfinite(value) else None for name, value in measures.items()}
        self._write(values)
        self._show(values)
        self._last = time.perf_counter()
        return values.get("val_loss")

    def flush(self) -> None:
        """Write everything that was recorded to the disk or the object store."""
        if self._file is not None:
            self._file.flush()

    def pause(self) -> None:
        """Do not count the time since the last record: it was not spent on training."""
        self._last = time.perf_counter()

    def _nonfinite(self, values: dict[str, Any], numbers: dict[str, float]) -> None:
        step = values["step"]
        what = f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}"
        if self._batch_rows is not None:
            rows = values["batch"] = self._batch_rows(step).tolist()
            ellipsis = ", ..." if len(rows) > 8 else ""
            what += f"; its batch is the windows at {', '.join(map(str, rows[:8]))}{ellipsis} of the tokens"
        if not self._skip:
            self._write(values)
            raise NonFiniteError(step, what)
        if self._in_a_row >= MOST_SKIPS_IN_A_ROW:
            self._write(values)
            raise ValueError(f"{what}; the {self._in_a_row}th update in a row that is skipped: the weights must be bad")
        self._print(f"{what}: skipped, {self._skipped} so far")

    def _look_for_spike(self, values: dict[str, Any]) -> None:
        loss = values["loss"]
        if len(self._losses) >= SPIKE_AFTER:
            median = statistics.median(self._losses)
            deviation = 1.4826 * statistics.median(abs(x - median) for x in self._losses)
            deviations = (loss - median) / max(deviation, 0.01 * abs(median), 1e-9)
            if deviations > SPIKE_DEVIATIONS:
                values["spike"] = deviations
                recent = f"{deviations:.1f} deviations above {median:.4f}, the median of the last"
                what = f"step {values['step']}: loss {loss:.4f} spikes, {recent} {len(self._losses)}"
                self._print(f"{what}; gradient norm {values['grad_norm']:.3g}")
        self._losses.append(loss)

    def _write(self, values: dict[str, Any]) -> None:
        values |= goodput.take() | {"time": time.time()}
        if self._began is not None:
            values["began"], self._began = self._began, None
        if self._file is not None:
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            measured = {name: value for name, value in values.items() if name not in ("time", "began")}
            for logger in self._loggers:  # which note the time themselves
                logger.write(measured)

    def _print(self, line: str) -> None:
        if self._file is not None:
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _show(self, values: dict[str, Any]) -> None:
        step = values["step"]
        line = "skipped" if values["loss"] is None else f"loss {values['loss']:.4f}"
        if values["grad_norm"] is not None:
            line += f"  grad {values['grad_norm']:.2f}"
        line += f"  lr {values['lr']:.2e}  {values['tokens_per_s']:,.0f} tokens/s  {values['step_seconds']:.3g} s"
        if "mfu" in values:
            line += f"  MFU {values['mfu']:.1%}"
        if "memory_bytes" in values:
            line += f"  {values['memory_bytes'] / 2**30:.1f} GiB"
        if self._val_loss is not None:
            line += f"  val {self._val_loss:.4f}"
            digits = {"val_perplexity": 2}
            finite = [(n, v) for n, v in self._measures.items() if math.isfinite(v)]
            texts = [f"{name.removeprefix('val_')} {value:.{digits.get(name, 4)}f}" for name, value in finite]
            line += f" ({', '.join(texts)})" if texts else ""
        self._bar.update(self._task, completed=step, line=line)
        if self._bar.disable and (step % self._log_every == 0 or step == self._steps or "val_loss" in values):
            self._print(f"step {step}/{self._steps}  {line}")


def peak_memory(devices: Sequence[Any]) -> int | None:
    """The peak of the bytes in use on any of the devices so far; None if the backend does not report it (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return max((peak for peak in peaks if peak is not None), default=None)
