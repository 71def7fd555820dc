"""Agreement between the processes of a job: on errors, values, the code that runs, and a shared directory."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils


def agree(error: Exception | None) -> None:
    """Raise on every process if one has an error: there this error, elsewhere an OSError that names the process."""
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(error is not None)))
        if len(failed) and error is None:
            raise OSError(f"process {failed[0]} failed: see its message")
    if error is not None:
        raise error


def on_every_process(action: Callable[[], object]) -> None:
    """Run `action` on all processes. If it raises on one of them, all raise."""
    error = None
    try:
        action()
    except Exception as e:
        error = e
    agree(error)


def on_first_process(action: Callable[[], object]) -> None:
    """Run `action` on process 0 only. The others wait for it. If it raises, all raise."""
    on_every_process(action if jax.process_index() == 0 else lambda: None)


_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")


_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")


def from_first(action: Callable[[], bytes]) -> bytes:
    """What `action` returned on process 0, on all processes. Only process 0 runs it; if it raises, all raise."""
    error, data = None, b""
    if jax.process_index() == 0:
        try:
            data = action()
        except Exception as e:
            error = e
    agree(error)
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes()


def check_same(values: Mapping[str, Any]) -> None:
    """Check that all processes have the same `values`, which are JSON or paths.

    Raises:
      ValueError: on every process. The message lists the values that differ, and the processes that have them.
    """
    if jax.process_count() == 1:
        return
    mine = json.dumps(
        {k: json.dumps(v, sort_keys=True, default=str) for k, v in values.items()}, sort_keys=True
    ).encode()
    hashes = _gather(hashlib.sha256(mine).digest())
    if len(set(hashes)) == 1:
        return
    longest = int(multihost_utils.process_allgather(np.asarray(len(mine), np.int32)).max())
    everyone = [json.loads(text) for text in _gather(mine.ljust(longest))]
    differences = []
    for name in sorted(set().union(*everyone)):
        holders: dict[str, list[int]] = {}
        for process, theirs in enumerate(everyone):
            holders.setdefault(theirs.get(name, "absent"), []).append(process)
        if len(holders) > 1:
            said = (f"{value} on process {', '.join(map(str, where))}" for value, where in holders.items())
            differences.append(f"{name} is " + ", but ".join(said))
    raise ValueError("the processes differ: " + "; ".join(differences))


def check_same_options(options: Mapping[str, Any]) -> None:
    """Check that all processes were given the same command-line options. `process_id` may differ.

    Raises:
      ValueError: as in `check_same`.
    """
    options = dict(options) | {"process_id": None}
    check_same({f"--{name.replace('_', '-')}": value for name, value in options.items()})


def check_shared(path: epath.Path) -> None:
    """Check that every process sees the file that process 0 wrote; OSError on every process otherwise."""
    agree(None)  # wait until it is written
    seen = path.exists()
    agree(None if seen else OSError(f"{path} is not there, but process 0 wrote it: --output must be shared by all"))


def _gather(data: bytes) -> list[bytes]:
    rows = multihost_utils.process_allgather(np.frombuffer(data, np.uint8))
    return [np.asarray(row, np.uint8).tobytes() for row in rows]


def check_same_code(*files: str | os.PathLike[str]) -> None:
    """Check that all processes run the same code; ValueError otherwise, as from `check_same`.

    Compares hashes of the sources of this library and of `files`, versions of packages, and environment variables that
    change what XLA compiles.
    """
    if jax.process_count() == 1:
        return
    root = Path(__file__).parents[1]
    sources = {f"source opt_jax/{path.relative_to(root)}": path for path in root.rglob("*.py")}
    sources |= {f"source {Path(file).name}": Path(file) for file in files}
    version = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in sources.items()}
    version |= {f"package {name}": importlib.metadata.version(name) for name in _PACKAGES}
    version |= {f"variable {name}": os.environ.get(name, "") for name in _VARIABLES}
    check_same(version | {"python": platform.python_version()})
