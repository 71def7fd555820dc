"""Where the wall time of a run goes: the share in steps that count (goodput), and what took the rest.

A process measures what it does beside training steps with `spend`. `Metrics` writes the seconds into the lines of
`metrics.jsonl`, and `goodput` adds up a whole run, with all its starts.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

# Activities, in the order in which they are reported: name -> what it is. `<name>_seconds` is in metrics.jsonl.
ACTIVITIES = {
    "start": "imports, devices, data and directories, before the first step",
    "restore": "reading a checkpoint",
    "compile": "the first call of the training step",
    "data": "waiting for the next batch, without a step under way",
    "validation": "evaluations",
    "checkpoint": "waiting for checkpoints",
    "restarts": "steps that were done again, and time without a process",
}
_spent: dict[str, float] = {}
_imported = time.time()
_ended = 0.0  # when the last run in this process ended
_run_began: float | None = None  # see `no_step_left`


def begin() -> float:
    """The Unix time from which this start of the run counts; all since then that is not spent yet counts as "start".

    That is when this process began, or when the run before it in this process ended. (Without Linux's /proc: when this
    module was imported.) After `no_step_left` it is earlier, and the time in between counts as "restarts".
    """
    began = max(_process_began(), _ended)
    _spent["start"] = max(0.0, time.time() - began - sum(_spent.values()))
    if _run_began is not None and _run_began < began:
        _spent["restarts"], began = began - _run_began, _run_began
    return began


def no_step_left(began: float | None) -> None:
    """Say that no step of the earlier starts of a run is left, and when the first of them began, if that is known."""
    global _run_began
    _run_began = began


def end() -> None:
    """Say that a run ends: what comes now belongs to no run, or to the next."""
    global _ended
    _ended = time.time()
    no_step_left(None)
    _spent.clear()


def _process_began() -> float:
    with contextlib.suppress(OSError, ValueError, AttributeError, IndexError):
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - age
    return _imported


@contextlib.contextmanager
def spend(activity: str) -> Iterator[None]:
    """A context whose seconds count for an activity, one of `ACTIVITIES`."""
    assert activity in ACTIVITIES, activity
    begin = time.perf_counter()
    try:
        yield
    finally:
        _spent[activity] = _spent.get(activity, 0.0) + time.perf_counter() - begin


def take() -> dict[str, float]:
    """The seconds of each activity since the last call, as `<name>_seconds`."""
    taken = {f"{name}_seconds": _spent[name] for name in ACTIVITIES if name in _spent}
    _spent.clear()
    return taken


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the seconds of a run went.

    Attributes:
      total: from the beginning of its first process to its last line.
      steps: in training steps that count.
      lost: for each of `ACTIVITIES`. "restarts" is from the last line before a stop that still counts to the beginning
        of the next process.
    """

    total: float
    steps: float
    lost: dict[str, float]

    @property
    def share(self) -> float:
        """Of the total, in steps that count."""
        return self.steps / self.total if self.total else 0.0

    def __str__(self) -> str:
        shares = [f"{name} {seconds / self.total:.1%}" for name, seconds in self.lost.items() if seconds]
        hours, rest = divmod(round(self.total), 3600)
        clock = f"{hours}:{rest // 60:02}:{rest % 60:02}"
        return f"goodput {self.share:.1%} of {clock} h" + (f" ({', '.join(shares)})" if shares else "")


def goodput(lines: Iterable[dict[str, Any]]) -> Goodput | None:
    """The sum over the lines of `metrics.jsonl`, in order.

    Returns:
      None if the lines have no times. (Runs before 2026-11-30 have none; a run that goes on since counts from there.)
    """
    total, lost = 0.0, dict.fromkeys(ACTIVITIES, 0.0)
    before: float | None = None
    for line in lines:
        if line.get("time") is None or before is None and line.get("began") is None:
            continue
        begin: Any = before if line.get("began") is None else line["began"]
        if before is not None and begin > before:
            lost["restarts"] += begin - before
            total += begin - before
        total += max(0.0, line["time"] - begin)
        for name in ACTIVITIES:
            lost[name] += line.get(f"{name}_seconds") or 0.0
        before = line["time"]
    if not total:
        return None
    return Goodput(total, max(0.0, total - sum(lost.values())), lost)
