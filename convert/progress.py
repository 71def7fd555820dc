"""Progress of a conversion: a rich bar on a terminal, a plain line every ten seconds elsewhere; a line at the end."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column

from opt_jax.parallel import processes

from .checkpoint import Checkpoint
from .to_hf import unfinished

LINE_EVERY = 10.0  # seconds


class Report:
    """A context and a callback, as in `with Report(total) as report: convert(..., progress=report)`.

    Call it with a tensor's path and the number of bytes that are done since the last call. `total` is in bytes, too.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.total, self.done, self.began = total, 0, time.monotonic()
        self._next_line = self.began + LINE_EVERY
        console = Console(stderr=True)
        name = TextColumn("{task.fields[name]}", table_column=Column(max_width=24, no_wrap=True))  # 80 columns in all
        columns = (BarColumn(12), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), name)
        self._bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True)
        self._task = self._bar.add_task("", total=total, name="")
        self._lines = not quiet and not console.is_terminal

    def __enter__(self) -> "Report":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def __call__(self, path: str, nbytes: int) -> None:
        self.done += nbytes
        self._bar.update(self._task, completed=self.done, name=path.removeprefix("model.decoder."))
        now = time.monotonic()
        if self._lines and now >= self._next_line:
            self._next_line = now + LINE_EVERY
            print(self.line(path, now - self.began), file=sys.stderr, flush=True)

    def line(self, path: str, seconds: float) -> str:
        speed = max(self.done / seconds, 1.0)
        left = max(0, int((self.total - self.done) / speed))
        return (
            f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, "
            f"{left // 60}:{left % 60:02d} left, {path}"
        )


class Work:
    """A context in which a destination is written: shows the progress, and prints one line at the end."""

    def __init__(
        self, opened: Checkpoint, dst: Path, dtype: str | None, quiet: bool, part: tuple[int, int] | None = None
    ) -> None:
        self.opened, self.dst, self.part, self.first = opened, dst, part, jax.process_index() == 0
        itemsize = None if dtype is None else jax.numpy.dtype(dtype).itemsize
        self.nbytes = opened.nbytes if itemsize is None else opened.parameters * itemsize
        workers = jax.process_count() if part is None else part[1]
        self.report = Report(self.nbytes // workers, quiet or not self.first)
        self.start = time.monotonic()

    def __enter__(self) -> Callable[[str, int], None]:
        self.report.__enter__()
        return self._advance

    def _advance(self, path: str, nbytes: int) -> None:
        processes.reached(path)
        self.report(path, nbytes)

    def __exit__(self, kind, error, tb) -> None:
        self.report.__exit__(kind, error, tb)
        if error is None and self.first:
            print(self._summary())

    def _summary(self) -> str:
        if self.part is not None:
            missing = unfinished(self.dst)
            if missing or not self.dst.exists():
                i, n = self.part
                return f"{self.dst}: part {i}/{n} is done; still to be written by others: {len(missing) or 'all'}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return (
            f"{self.dst}: {self.opened.parameters:,} parameters, {self.nbytes:,} bytes, "
            f"{time.monotonic() - self.start:.1f} seconds, peak RSS {peak / 1e6:,.0f} MB"
        )
