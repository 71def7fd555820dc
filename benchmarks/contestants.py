"""Contestants of a benchmark: each in a process of its own, timed in alternation.

In one process they would share an allocator and compete with thread pools that the other has left spinning.
"""

import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# All contestants are on the GPU at once: JAX takes what it needs of its memory, not three quarters at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Contestant:
    """A function in a new process.

    Args:
      make: a function of a module. `make(*arguments)` runs once in the new process, at the first call, and returns the
        function to time.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, make, arguments), daemon=True)
        self._process.start()
        end.close()

    def __call__(self, *arguments: Any) -> tuple[float, Any]:
        """Seconds of one call, taken in its process, and what it returned."""
        self._pipe.send(arguments)
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            sys.exit("a contestant ended; its error is above")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def close(contestants: Mapping[str, Contestant]) -> None:
    """End all of them."""
    for contestant in contestants.values():
        contestant.close()


def _serve(pipe: Connection, make: Callable[..., Callable[..., Any]], arguments: tuple) -> None:
    run = None
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        run = run or make(*arguments)  # now, while the others wait
        start = time.perf_counter()
        result = run(*call)
        pipe.send((time.perf_counter() - start, result))


def alternate(
    contestants: Mapping[str, Contestant], repeats: int, *arguments: Any, untimed_first: bool = False
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, in turns.

    Args:
      untimed_first: each calls once more before each timed call. A virtual machine gives memory that idled through the
        others' turns back to its host; getting it again made a training step 30 % slower.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            if untimed_first:
                contestant(*arguments)
            times[name].append(contestant(*arguments)[0])
    return times


def spread(values: list[float]) -> str:
    """Median and range, as two cells of a table."""
    return f"{statistics.median(values):.3g} | {min(values):.3g}-{max(values):.3g}"


def machine(*packages: str) -> str:
    """The processor and the versions, for the line above a table."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if importlib.util.find_spec(name)]
    return ", ".join([processor(), *versions, f"Python {platform.python_version()}"])


def processor() -> str:
    """The processor's name, what it has for matrix products, and how many cores this process may use."""
    name, units = platform.processor() or platform.machine(), ""
    if (file := Path("/proc/cpuinfo")).exists():
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        flags = fields.get("flags", "").split()
        units = "".join(f" {unit}" for unit in ("avx2", "avx512f", "avx512_vnni", "amx_tile") if unit in flags)
        name = fields.get("model name", name)
    return f"{name} ({CORES} cores;{units})"
