"""What checksums cost: writes and reads arrays with and without them, each in a process of its own, in alternation.

Run: `.venv/bin/python -m benchmarks.checksums`.
"""

import argparse
import os
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.contestants import Contestant, close, machine
from opt_jax.checkpoints import chunks, orbax
from opt_jax.checkpoints.arrays import LazyArray

SHAPE = (4096, 8192)  # float32: four chunks


def contestant(arrays: int, checksums: bool, verify: bool) -> Callable[[str, Path], float]:
    """A function of "write" or "read" and a directory. It returns seconds of processor time outside the kernel.

    The kernel's time is mostly that of fresh pages.
    """
    warnings.simplefilter("ignore")  # that arrays have no checksums
    if not checksums:
        chunks.CODECS = chunks.CODECS[:1]
    values = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    lazy = {f"a{i}": LazyArray(SHAPE, values.dtype, values.__getitem__) for i in range(arrays)}

    def run(action: str, directory: Path) -> float:
        used = os.times().user
        if action == "write":
            orbax.write_arrays(directory, lazy)
        else:
            for array in orbax.open_arrays(directory, verify).values():
                array.load()
        return os.times().user - used

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrays", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = {"without": (False, True), "with checksums": (True, True), "`--no-verify`": (True, False)}
    runs = {name: Contestant(contestant, options.arrays, *row) for name, row in rows.items()}
    measured = defaultdict(list)
    for turn in range(options.repeats + 1):
        with tempfile.TemporaryDirectory() as place:
            for action in ("write", "read"):
                for name, run in runs.items():
                    result = run(action, Path(place) / name)
                    if turn and (action, name) != ("write", "`--no-verify`"):  # which only reading knows
                        measured[action, name].append(result)
    close(runs)
    nbytes = 4 * int(np.prod(SHAPE)) * options.arrays
    print(f"{nbytes / 1e9:.2f} GB of float32; {machine('jax', 'tensorstore')}\n")
    print("| | | seconds (median) | spread | GB/s | CPU seconds |\n|---|---|---|---|---|---|")
    for (action, name), results in sorted(measured.items(), reverse=True):
        seconds, used = zip(*results, strict=True)
        median, spread = statistics.median(seconds), f"{min(seconds):.2f}-{max(seconds):.2f}"
        rate = f"{nbytes / 1e9 / median:.2f}"
        print(f"| {action} | {name} | {median:.2f} | {spread} | {rate} | {statistics.median(used):.2f} |")


if __name__ == "__main__":
    main()
