"""Progress of a conversion: a rich bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column

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
