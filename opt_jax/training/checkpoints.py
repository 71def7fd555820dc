"""Checkpoints of a training state. `moments.py` says when one is written.

A checkpoint appears complete or not at all, is written while training continues, and can be restored onto any mesh.
"""

import dataclasses
import json
import os
import threading
import uuid
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from opt_jax.checkpoints import chunks
from opt_jax.checkpoints.chunks import ShardHandler, pytree_handler
from opt_jax.checkpoints.hub import absolute, as_path, check_array_path, is_remote
from opt_jax.checkpoints.orbax import open_stored
from opt_jax.checkpoints.pretrained import read_array
from opt_jax.parallel.agreement import agree, on_first_process
from opt_jax.parallel.rules import named_leaves
from opt_jax.system.disk import disk_errors, error_line, without_tracebacks
from opt_jax.system.interrupts import say as print_line
from opt_jax.system.messages import one_line
from opt_jax.system.reading import json_object, read_small
from opt_jax.system.temporary import refuse_links
from opt_jax.training.step import TrainState

_DATES = "_CHECKPOINT_METADATA"  # Orbax writes it into each step's directory
_IN_A_STEP = (_DATES, "params", "optimizer", "data")  # a directory with any of these is a checkpoint, maybe damaged
_DATA_FILE = "metadata"
_READERS = 8  # number of arrays that are read at the same time
_AFTER_ERROR_SECONDS = 30  # after an error in a job, the longest wait for the checkpoint that is being written


class Checkpoints:
    """The checkpoints of a run: `directory/<step>/` holds `params`, `optimizer` and `data`.

    `params` has parameter paths with stacked layers. A half-written directory has a temporary name, so it is never
    taken for a checkpoint. All processes of a job call the methods together.

    Args:
      keep: the number of newest checkpoints to keep.
      keep_every: also keep the checkpoints of steps that are multiples of this, for good.
      data_state: called with a step; returns the state of the data after it, as an object of JSON.
      before_write: called on process 0 before each write. If it raises, nothing is written.
      read_only: nothing is written or removed; `save` is an error.

    Raises:
      FileExistsError: something in the directory has the name of a checkpoint, but is none.
      ValueError: a checkpoint's metadata are damaged; or see `hub.check_array_path`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int,
        keep_every: int | None = None,
        data_state: Callable[[int], dict[str, Any]] | None = None,
        before_write: Callable[[], None] = lambda: None,
        read_only: bool = False,
    ):
        check_array_path(directory)
        self._data_state, self._before_write = data_state, before_write
        directory = absolute(as_path(directory))
        policies = [LatestN(keep), *([EveryNSteps(keep_every)] if keep_every else [])]
        # Without these, Orbax warns that it sets them.
        reading: Any = dict(create=False, save_interval_steps=0) if read_only else {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_KeepForeignFiles(AnyPreservationPolicy(policies), directory),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            **reading,
            # Two `Checkpoints` may write at the same time. Barriers with the same name would mix them up.
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
        )
        on_first_process(lambda: _check_steps(directory))
        handlers = {name: pytree_handler((jax.Array, ShardHandler())) for name in ("params", "optimizer")}
        data = ocp.JsonCheckpointHandler(filename=_DATA_FILE)
        self._directory = directory
        self._writing: tuple[Path, int] = directory, 0  # the newest checkpoint and its bytes
        try:
            # Orbax logs the content of metadata that it cannot parse. Ours is one line, below.
            with without_tracebacks(lambda _: False):
                self._manager = ocp.CheckpointManager(
                    directory, options=options, item_handlers={**handlers, "data": data}
                )
        except OSError:
            raise
        except Exception as e:
            raise ValueError(
                f"{directory}: {_DATES} of a checkpoint is damaged ({one_line(e)}): remove it, as it holds little more "
                "than the time"
            ) from None

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Begin to write a checkpoint. When this returns, `state` may be donated.

        Waits until the last checkpoint is finished.

        Raises:
          OSError: the last checkpoint could not be written, or this one cannot.
        """
        self._save(step, _items(state))

    def save_model(self, step: int, state: TrainState) -> None:
        """Like `save`, but for the parameters only. Removes later steps, which an earlier start has written.

        Raises:
          FileExistsError: a later step's directory holds a file that is not ours.
          OSError: see `save`.
        """
        if later := [other for other in self._manager.all_steps() if other > step]:
            self._wait()
            on_first_process(lambda: self._check_removal(later))
            for other in later:
                self._manager.delete(other)
        self._save(step, {"params": _items(state)["params"]})

    def _check_removal(self, steps: list[int]) -> None:
        self._before_write()
        for step in steps:
            if path := _foreign_file(self._directory / str(step)):
                raise FileExistsError(f"{path} is no file of a checkpoint, so its directory stays: move it elsewhere")

    def _save(self, step: int, items: dict[str, dict[str, jax.Array]]) -> None:
        if step <= (self.latest_step() or 0):
            return
        self._wait()
        with jax.transfer_guard("allow"):
            on_first_process(self._begin_writing)
            args: dict[str, Any] = {}
            if self._data_state is not None:
                data = self._data_state(step)
                args["data"] = ocp.args.JsonSave({**data, "crc32": _crc32(data)})
            about: Any = {"save": uuid.uuid4().hex}  # process 0 writes it into each `_METADATA`
            for name, tree in items.items():
                save_args = {path: _save_args(path) for path in tree}
                args[name] = ocp.args.PyTreeSave(tree, save_args=save_args, custom_metadata=about)
            self._writing = self._directory / str(step), sum(x.nbytes for x in jax.tree.leaves(items))
            with disk_errors(*self._writing):
                self._manager.save(step, args=ocp.args.Composite(**args))

    def _begin_writing(self) -> None:
        self._before_write()
        if not is_remote(self._directory):
            # Raises if the directory is gone or read-only. Orbax would notice it later, after waiting for minutes.
            with disk_errors(self._directory):
                os.utime(f"{self._directory}/.")

    def _wait(self) -> None:
        """Wait until the newest checkpoint is finished. Raises the error of its writing."""
        with disk_errors(*self._writing):
            self._manager.wait_until_finished()

    def restore_newest(
        self,
        abstract: TrainState,
        shardings: Any,
        say: Callable[[str], None],
        *,
        fall_back: bool = False,
        verify: bool = True,
    ) -> tuple[int, TrainState, dict[str, Any] | None]:
        """The step, the training state and the state of the data (or None) of the newest checkpoint.

        Args:
          abstract, shardings, verify: see `restore`.
          say: called on all processes with a line that says which checkpoint is damaged.
          fall_back: take the newest checkpoint that is not damaged. Later ones are renamed to DIRECTORY-damaged-STEP
            beside the directory, because new ones will have their names. They are not removed, because they may be
            readable at another time (after an error of the network).

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: the newest is damaged; with `fall_back`, all are. It is raised in all processes.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            try:
                state, data = self.restore(step, abstract, shardings, verify), self.restore_data(step)
            except (ValueError, OSError) as e:
                message = f"checkpoint {self._directory / str(step)} is damaged: {e}"
                if step == steps[-1]:
                    raise ValueError(f"{message}; there is none before it, so copy it back from elsewhere") from None
                if not fall_back:
                    raise ValueError(f"{message}; --fall-back goes on from the one before it, {steps[i + 1]}") from None
                say(f"{message}; falling back to the one before it, {steps[i + 1]}")
            else:
                if i:
                    on_first_process(partial(self._set_aside, steps[:i]))
                    self._manager.reload()
                return step, state, data
        raise FileNotFoundError(f"no checkpoint in {self._directory}")

    def _set_aside(self, steps: Sequence[int]) -> None:
        self._before_write()
        for step in steps:
            name = f"{self._directory.name}-damaged-{step}"
            names = (name, *(f"{name}.{number}" for number in range(2, 1000)))  # the same step may be damaged again
            unused = (path for path in map(self._directory.with_name, names) if not path.exists())
            (self._directory / str(step)).rename(next(unused))

    def restore(self, step: int, abstract: TrainState, shardings: Any, verify: bool = True) -> TrainState:
        """The training state of `step`, each array read into its shards.

        Frozen parameters are not in checkpoints; they are None in the result.

        Args:
          abstract: shapes and dtypes of the state.
          shardings: a pytree like `abstract`.
          verify: compare the data with their checksums.

        Raises:
          ValueError, OSError: the checkpoint is damaged, or its arrays have other shapes. If one process of a job
            finds this, it is raised in all.
        """
        abstract, shardings = (dataclasses.replace(tree, frozen=None) for tree in (abstract, shardings))
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        items = _items(jax.tree.map(place, abstract, shardings))
        error, leaves = None, {}
        try:
            _check_together([self._directory / str(step) / name for name in items])
            for name, targets in items.items():
                leaves |= _read(self._directory / str(step) / name, targets, verify)
        except Exception as e:
            error = e
        agree(error)
        state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named_leaves(abstract)])
        # Some of these arrays cannot be donated to the first step, which would then need their memory twice. The
        # outputs of a jitted function can. Arrays that could be donated before are passed through, not copied.
        return jax.jit(_copy, donate_argnums=0, out_shardings=shardings)(state)

    def restore_data(self, step: int) -> dict[str, Any] | None:
        """The state of the data, an object of JSON; None if the checkpoint has none.

        Raises:
          ValueError, OSError: it is damaged. If one process of a job finds this, it is raised in all.
        """
        path, error, data = self._directory / str(step) / "data" / _DATA_FILE, None, None
        try:
            if path.parent.exists():
                data = json_object(read_small(path), "it")
                if data.pop("crc32", None) not in (None, _crc32(data)):  # older versions wrote no checksum
                    raise ValueError("it does not agree with its checksum")
        except (ValueError, OSError) as e:
            error = e if isinstance(e, OSError) else ValueError(f"{path} cannot be read: {one_line(e)}")
        agree(error)
        return data

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
          OSError: the last checkpoint could not be written.
        """
        with disk_errors(*self._writing):
            try:
                self._wait()
            finally:
                self._manager.close()  # raises if another part of the checkpoint failed, too

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error in (None, SystemExit) or jax.process_count() == 1:
            self.close()
            return
        # An error of this process. Another may have failed to write its part, and wait for this process in a step: then
        # the checkpoint is never complete.
        thread = threading.Thread(target=self._close_if_possible, daemon=True)
        thread.start()
        thread.join(_AFTER_ERROR_SECONDS)
        if thread.is_alive():
            print_line(
                f"{self._writing[0]} was not complete after {_AFTER_ERROR_SECONDS} s: the next start uses an older one"
            )

    def _close_if_possible(self) -> None:
        try:
            self.close()
        except Exception as error:  # printed, because another error is being raised
            print_line(error_line(error))


class BestModel(Checkpoints):
    """Keeps the parameters of the step with the lowest validation loss.

    Attributes:
      loss: the lowest loss so far; None before the first.
    """

    loss: float | None = None

    def offer(self, step: int, state: TrainState, loss: float) -> None:
        """Save the parameters if this loss is the lowest so far."""
        if self.loss is None or loss < self.loss:
            self.loss = loss
            self.save_model(step, state)


@dataclasses.dataclass(frozen=True)
class _KeepForeignFiles:
    """`policy`, but a checkpoint whose directory holds a foreign file is kept: Orbax would remove that file, too."""

    policy: Any
    directory: Path

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self.policy.should_preserve(checkpoints, context=context)
        steps = zip(kept, (self.directory / str(checkpoint.step) for checkpoint in checkpoints), strict=True)
        return [keep or _foreign_file(path) is not None for keep, path in steps]


def _foreign_file(step: Path) -> Path | None:
    """A file in the directory of a checkpoint that is no part of one; None if there is none."""
    with suppress(FileNotFoundError, NotADirectoryError):  # process 0 may be removing it
        return next((entry for entry in step.iterdir() if entry.name not in (*_IN_A_STEP, "commit_success.txt")), None)
    return None


def _check_steps(directory: Path) -> None:
    """Check that all that is named like a checkpoint is one, because Orbax removes old and unfinished ones."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if not (path.name.isdecimal() or ".orbax-checkpoint-tmp" in path.name):
            continue
        if not is_remote(path):
            refuse_links(path)
        in_it = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
        # An empty directory is a checkpoint, too: its removal was interrupted.
        if path.name.isdecimal() and in_it and not {*in_it} & {*_IN_A_STEP}:
            raise FileExistsError(f"{path} is not a checkpoint, but has the name of one: move it elsewhere")


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """The state as two flat dictionaries from name to array: "params" and "optimizer"."""
    leaves = named_leaves(state)
    params = {name: leaf for name, leaf in leaves.items() if name.startswith("model.")}
    rest = {name: leaf for name, leaf in leaves.items() if not name.startswith(("model.", "frozen."))}
    return {"params": params, "optimizer": rest}


def _save_args(path: str) -> ocp.SaveArgs:
    """Stacked layers are stored layer by layer, so that reading one does not read the others."""
    layers = (0,) if ".layers." in path else ()
    return ocp.SaveArgs(chunk_byte_size=chunks.CHUNK_BYTES, shard_axes=layers)


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


def _read(directory: Path, targets: dict[str, Any], verify: bool) -> dict[str, jax.Array]:
    """The arrays with the shapes and shardings of `targets`, by name. A process reads only its devices' shards."""
    stored = open_stored(directory, verify)
    for name, target in targets.items():
        if name not in stored:
            raise ValueError(f"{directory} has no array {name}")
        if stored[name].shape != target.shape:
            raise ValueError(f"{directory}: array {name} has shape {stored[name].shape}, not {target.shape}")
    with ThreadPoolExecutor(_READERS) as pool:
        arrays = pool.map(lambda name: read_array(stored[name], targets[name]), targets)
        return dict(zip(targets, arrays, strict=True))


def _check_together(directories: Sequence[Path]) -> None:
    """ValueError if one save did not write all of the directories: then some were copied here from elsewhere."""
    abouts = [json_object(read_small(path / "_METADATA"), path).get("custom_metadata") for path in directories]
    if any(about != abouts[0] for about in abouts):  # older ones have none
        names = " and ".join(path.name for path in directories)
        raise ValueError(f"its {names} were not saved together: one of them is another checkpoint's")


def _crc32(data: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())
