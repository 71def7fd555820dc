"""Activations of a data set on disk, for probes, sparse autoencoders and statistics.

`collect` writes one `.npy` file for each hook point, [N, ...]: one row for each real token, in the order of the data,
and no pads. Beside them lie `input_ids.npy`, int32 [N], and `rows.npy`, int64 [N]: the token, and the number of its row
in the data set. So a row's length may differ from that of others, and nothing has to be masked. Points with no row for
each token (attention scores and patterns) are refused.

A killed job goes on where it was: every ten seconds `state.json` says how much of each file is certain. `index.json` is
written last, so a directory that has it is complete.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from opt_jax.model.heads import OPTPreTrainedModel
from opt_jax.model.hook_points import Names
from opt_jax.research.activations import activations, as_batch, hash_of_model, token_points
from opt_jax.system.disk import disk_errors
from opt_jax.system.reading import json_object, read_small
from opt_jax.system.temporary import TemporaryPlace, write_file

SECONDS = 10  # between two times at which everything written so far is made certain


def collect(
    model: OPTPreTrainedModel,
    batches: Iterable[Any],
    directory: str | os.PathLike,
    *,
    names: Names,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Write the activations of a data set into a directory, or go on with it, or check that it is complete.

    Args:
      model: any of the models, on a mesh or not. Layers above the last point are not computed.
      batches: each is input_ids [B, T], or a pair (input_ids, attention_mask), or a dict of both, as from a tokenizer.
        To go on, give the same ones from the start; those that are done are only compared. Batches of one shape
        share a compiled program.
      directory: a new one, or one of an earlier call with the same model, names and data.
      names: the points, as in `run_with_cache`: a name, a glob, a list, or a predicate.
      progress: called with (batches done, tokens done) after each batch that was computed.

    Returns:
      What `load_activations` returns.

    Raises:
      ValueError: an earlier call had another model, other names or other data; a point that has no row for each token;
        no tokens.
      FileExistsError: the directory holds other files, or another process is writing it now.
    """
    points = token_points(model.config, names)
    path = Path(directory)
    plan = dict(model=hash_of_model(model), points=points)
    place = TemporaryPlace(path, r"(index|state)\.json.*|[\w.]+\.npy")
    with disk_errors(path), place.locked(wait=False):
        state: dict[str, Any] = _earlier(path, plan) or plan | dict(batches=0, tokens=0, rows=0, data="")
        write_file(path / "state.json", json.dumps(state).encode())
        begun, done, data, files = state["batches"], 0, hashlib.sha256(), _Files(path, state)
        try:
            for ids, mask in map(as_batch, batches):
                data.update(repr(ids.shape).encode() + ids.tobytes() + mask.tobytes())
                done += 1
                if done <= begun:
                    if done == begun and data.hexdigest() != state["data"]:
                        raise ValueError(f"{path} was begun with other data: the first {begun} batches differ")
                    continue
                if (path / "index.json").exists():
                    raise ValueError(f"{path} is complete with {begun} batches, but there are more now: other data")
                kept = {name: np.asarray(x) for name, x in activations(model, points, ids, mask).items()}
                files.append(ids, mask, kept)
                files.commit(data, done)
                if progress is not None:
                    progress(done, files.tokens)
            if done < begun:
                raise ValueError(f"{path} has {begun} batches already, but there are only {done} now: other data")
            files.finish(data, done)
        finally:
            files.close()
    return load_activations(path)


def load_activations(directory: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a complete directory, memory-mapped: name of the point -> [N, ...], `input_ids`, `rows`.

    (NumPy's files have no bfloat16. `np.load` returns it as two bytes without a meaning, this function as bfloat16.)

    Raises:
      FileNotFoundError: the directory is not complete.
    """
    path = Path(directory)
    if not (path / "index.json").is_file():
        raise FileNotFoundError(f"{path} holds no complete activations: call `collect` (again) with the same arguments")
    arrays = json_object(read_small(path / "index.json"), path / "index.json")["arrays"]
    return {
        name: np.load(path / f"{name}.npy", mmap_mode="r").view(jnp.dtype(dtype)) for name, (dtype, _) in arrays.items()
    }


class _Files:
    """The files of a directory, to which rows are appended; the caller has the lock."""

    def __init__(self, path: Path, state: dict[str, Any]):
        self.path, self.state = path, state
        self.tokens, self.rows = state["tokens"], state["rows"]
        self.open: dict[str, tuple[BinaryIO, np.ndarray]] = {}  # name -> the file, and an empty array [0, ...]
        self.certain = time.monotonic()

    def append(self, ids: np.ndarray, mask: np.ndarray, kept: dict[str, np.ndarray]) -> None:
        rows = np.broadcast_to(self.rows + np.arange(len(ids))[:, None], ids.shape)
        for name, value in (kept | dict(input_ids=ids, rows=rows)).items():
            self._file(name, str(value.dtype), value.shape[2:]).write(value[mask].tobytes())
        self.tokens, self.rows = self.tokens + int(mask.sum()), self.rows + len(ids)

    def _file(self, name: str, dtype: str, shape: tuple[int, ...]) -> BinaryIO:
        """The file; when it is opened, it is cut to the rows that are certain."""
        if name not in self.open:
            path, empty = self.path / f"{name}.npy", np.empty((0, *shape), jnp.dtype(dtype))
            file = open(path, "r+b" if self.state["tokens"] else "w+b")
            self.open[name] = file, empty
            _write_header(file, empty, 0)
            end = file.tell() + self.state["tokens"] * math.prod(shape) * empty.itemsize
            if file.seek(0, os.SEEK_END) < end:
                raise ValueError(f"{path} is shorter than state.json says: remove {self.path} and start again")
            file.truncate(end)
            file.seek(end)
        return self.open[name][0]

    def commit(self, data: Any, batches: int, now: bool = False) -> None:
        """Make certain what was written, if the last time was long ago."""
        if now or time.monotonic() - self.certain >= SECONDS:
            for file, _ in self.open.values():
                file.flush()
                os.fsync(file.fileno())
            arrays = {name: (str(empty.dtype), empty.shape[1:]) for name, (_, empty) in self.open.items()}
            self.state |= dict(batches=batches, tokens=self.tokens, rows=self.rows, data=data.hexdigest())
            self.state |= dict(arrays=arrays) if arrays else {}
            write_file(self.path / "state.json", json.dumps(self.state).encode())
            self.certain = time.monotonic()

    def finish(self, data: Any, batches: int) -> None:
        """Write the number of rows into each file, and then the index."""
        if (self.path / "index.json").exists():
            return
        if not self.tokens:
            raise ValueError("no tokens: `batches` is empty, or holds pads only")
        for name, (dtype, shape) in self.state.get("arrays", {}).items():
            self._file(name, dtype, tuple(shape))
        for file, empty in self.open.values():
            file.seek(0)
            _write_header(file, empty, self.tokens)
        self.commit(data, batches, now=True)
        write_file(self.path / "index.json", json.dumps(self.state).encode())

    def close(self) -> None:
        for file, _ in self.open.values():
            file.close()


def _write_header(file: BinaryIO, empty: np.ndarray, rows: int) -> None:
    """The header of a .npy file. Its length is the same for any number of rows."""
    shape = (rows, *empty.shape[1:])
    np.lib.format.write_array_header_1_0(file, dict(descr=empty.dtype.str, fortran_order=False, shape=shape))


def _earlier(path: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The state that an earlier call has left; ValueError if it was about something else."""
    if not (path / "state.json").exists():
        return None
    state = json_object(read_small(path / "state.json"), path / "state.json")
    for name, what in (("model", "another model"), ("points", "other names")):
        if state.get(name) != plan[name]:
            raise ValueError(f"{path} was begun with {what}: choose another directory, or remove it")
    return state
