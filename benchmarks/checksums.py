"""What checksums cost: writes and reads arrays with and without them, in alternation."""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from opt_jax import chunks, storage
from opt_jax.storage import LazyArray

SHAPE = (4096, 8192)  # float32: four chunks


def measure(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of processor time outside the kernel (whose share is mostly that of fresh pages)."""
    start, used = time.perf_counter(), os.times().user
    action()
    return time.perf_counter() - start, os.times().user - used


def read(directory: Path, verify: bool = True) -> None:
    for array in storage.open_arrays(directory, verify).values():
        array.load()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrays", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of what has no checksums
    values = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    arrays = {f"a{i}": LazyArray(SHAPE, values.dtype, values.__getitem__) for i in range(options.arrays)}
    nbytes, codecs = values.nbytes * options.arrays, chunks.CODECS
    measured = defaultdict(list)
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as place:
            for name, chain in (("with checksums", codecs), ("without", codecs[:1])):
                directory, chunks.CODECS = Path(place) / name, chain
                measured["write", name].append(measure(lambda at=directory: storage.write_arrays(at, arrays)))
                measured["read", name].append(measure(lambda at=directory: read(at)))
            chunks.CODECS = codecs
            directory = Path(place) / "with checksums"
            measured["read", "`--no-verify`"].append(measure(lambda at=directory: read(at, verify=False)))
    print(f"{nbytes / 1e9:.2f} GB of float32\n")
    print("| | | seconds (median) | spread | GB/s | CPU seconds |\n|---|---|---|---|---|---|")
    for (what, name), runs in sorted(measured.items(), reverse=True):
        seconds, used = zip(*runs, strict=True)
        median, spread = statistics.median(seconds), f"{min(seconds):.2f}-{max(seconds):.2f}"
        rate = f"{nbytes / 1e9 / median:.2f}"
        print(f"| {what} | {name} | {median:.2f} | {spread} | {rate} | {statistics.median(used):.2f} |")


if __name__ == "__main__":
    main()
