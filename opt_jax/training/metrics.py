"""What a run tells its user: `metrics.jsonl`, and a progress bar (or plain lines where there is no terminal)."""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opt_jax.training.files import Lines, write_text


def cut_back(path: epath.Path, step: int) -> None:
    """Keep the lines of `metrics.jsonl` up to `step`; a line that a kill left half-written goes, too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line)
    write_text(path, "".join(kept))


def best_validation(path: epath.Path) -> tuple[int, float] | tuple[None, None]:
    """(step, val_loss) where it was lowest, the first if several are."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    losses = [(line["val_loss"], line["step"]) for line in lines if line.get("val_loss") is not None]
    return min(losses)[::-1] if losses else (None, None)


class Metrics:
    """Appends one JSON object per step to `path` and shows progress. With path None (every process but 0) does neither.

    `log_every`: steps between lines where the output is not a terminal.
    """

    def __init__(self, path: epath.Path | None, *, start: int, steps: int, tokens_per_step: int, log_every: int):
        self._file = None if path is None else Lines(path)
        self._tokens, self._log_every, self._steps = tokens_per_step, log_every, steps
        self._last, self._val_loss = time.perf_counter(), None
        self._console = Console()
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(compact=True), console=self._console,
            disable=path is None or not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=start, line="compiling")

    def __enter__(self) -> "Metrics":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()

    def record(
        self, step: int, measured: dict[str, Any], val_loss: Callable[[], float | None] | None = None
    ) -> float | None:
        """Write the numbers of update number `step` (from 1), fetched from the devices here, and so awaited.

        val_loss: measures the held-out loss, after the time of the training step has been taken; also returned.
        """
        fetched = jax.device_get(measured)
        seconds = time.perf_counter() - self._last
        values = {"step": step} | {name: float(fetched[name]) for name in ("loss", "lr", "grad_norm")}
        values |= {"tokens": step * self._tokens, "tokens_per_s": self._tokens / seconds}
        if val_loss is not None and (measurement := val_loss()) is not None:
            values["val_loss"] = self._val_loss = measurement
        self._last = time.perf_counter()
        if self._file is None:
            return values.get("val_loss")
        self._file.write(json.dumps(values) + "\n")
        line = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['tokens_per_s']:,.0f} tokens/s"
        if self._val_loss is not None:
            line += f"  val {self._val_loss:.4f}"
        self._bar.update(self._task, completed=step, line=line)
        if self._bar.disable and (step % self._log_every == 0 or step == self._steps or "val_loss" in values):
            self._console.print(f"step {step}/{self._steps}  {line}", highlight=False, soft_wrap=True)
        return values.get("val_loss")

    def flush(self) -> None:
        """What has been recorded is on disk; on a remote file system, too."""
        if self._file is not None:
            self._file.flush()

    def pause(self) -> None:
        """The time since the last record was spent on something other than training."""
        self._last = time.perf_counter()
