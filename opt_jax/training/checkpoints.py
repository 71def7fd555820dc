"""Checkpoints of a training state: atomic, written while training continues, restored onto any mesh.

Also when to write one, and what SIGTERM and Ctrl-C do.
"""

import dataclasses
import json
import os
import signal
import time
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
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from opt_jax.checkpoints import chunks
from opt_jax.checkpoints.chunks import ShardHandler, pytree_handler
from opt_jax.checkpoints.hub import absolute, as_path, check_array_path, is_remote
from opt_jax.checkpoints.orbax import open_stored
from opt_jax.checkpoints.pretrained import read_array
from opt_jax.parallel import processes
from opt_jax.parallel.agreement import agree, on_first_process
from opt_jax.parallel.rules import named_leaves
from opt_jax.system.disk import disk_errors, without_tracebacks
from opt_jax.system.interrupts import INTERRUPTED, Signals, say
from opt_jax.system.messages import one_line
from opt_jax.system.reading import json_object, read_small
from opt_jax.system.temporary import refuse_links
from opt_jax.training.step import TrainState

_DATES = "_CHECKPOINT_METADATA"  # of Orbax, in each step
_IN_A_STEP = (_DATES, "params", "optimizer", "data")  # any of these: a damaged checkpoint is one, too
_LOOK_SECONDS = 5.0  # between looks at the clock that several processes have to agree on
_DATA_FILE = "metadata"
_READERS = 8  # arrays that are read at once


class Checkpoints:
    """The checkpoints of a run: `directory/<step>/` holds `params`, `optimizer` and `data`.

    `params` has parameter paths with stacked layers. A half-written directory has a temporary name and is never taken
    for a checkpoint.

    Args:
      directory: the directory of the checkpoints.
      keep: so many of the newest are kept.
      keep_every: checkpoints of steps that it divides are kept too.
      data_state: returns the state of the data after a step, for JSON.
      before_write: called on process 0 before each checkpoint; if it raises, none is written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int,
        keep_every: int | None = None,
        data_state: Callable[[int], dict[str, Any]] | None = None,
        before_write: Callable[[], None] = lambda: None,
    ):
        check_array_path(directory)
        self._data_state, self._before_write = data_state, before_write
        directory = absolute(as_path(directory))
        policies = [LatestN(keep), *([EveryNSteps(keep_every)] if keep_every else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_KeepForeignFiles(AnyPreservationPolicy(policies), directory),
            cleanup_tmp_directories=True,
            # Two of these may write at once, and their processes must not wait for each other's barriers.
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
        )
        on_first_process(lambda: _check_steps(directory))
        handlers = {name: pytree_handler((jax.Array, ShardHandler())) for name in ("params", "optimizer")}
        data = ocp.JsonCheckpointHandler(filename=_DATA_FILE)
        self._directory = directory
        self._writing: tuple[Path, int] = directory, 0  # the newest checkpoint and its bytes
        try:
            # Orbax logs the content of what it cannot parse, and does without it.
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
        """Begin to write; returns when `state` may be donated.

        Waits for the last checkpoint to be finished, and raises its error if it failed.
        """
        self._save(step, _items(state))

    def save_model(self, step: int, state: TrainState) -> None:
        """The same of the parameters alone. Later steps, of an earlier start that came further, make room for them."""
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
                save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunks.CHUNK_BYTES), tree)
                args[name] = ocp.args.PyTreeSave(tree, save_args=save_args, custom_metadata=about)
            self._writing = self._directory / str(step), sum(x.nbytes for x in jax.tree.leaves(items))
            with disk_errors(*self._writing):
                self._manager.save(step, args=ocp.args.Composite(**args))

    def _begin_writing(self) -> None:
        self._before_write()
        if not is_remote(self._directory):
            # Raises if it is gone or read-only. Orbax's threads would learn it later, and wait minutes for each other.
            with disk_errors(self._directory):
                os.utime(f"{self._directory}/.")

    def _wait(self) -> None:
        """Until the newest checkpoint is finished; raises what went wrong with it."""
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
        """(step, state, state of the data's iterator or None) of the newest checkpoint; see `restore`.

        fall_back: take the newest that is not damaged, and rename those after it, which would be in the way of new
        ones, to DIRECTORY-damaged-STEP beside the directory. `say` tells which, on all processes. (Nothing is removed:
        what cannot be read today, as on a failing network, may be whole.)

        Raises:
          ValueError: it is damaged, and so are all before it if `fall_back`. All processes agree on that.
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
            free = (path for path in map(self._directory.with_name, names) if not path.exists())
            (self._directory / str(step)).rename(next(free))

    def restore(self, step: int, abstract: TrainState, shardings: Any, verify: bool = True) -> TrainState:
        """The state of `step`, each array read into its shards.

        Frozen parameters are in no checkpoint, and None in the result.

        Args:
          step: the step.
          abstract: shapes, dtypes and shardings of a state.
          verify: compare the data with their checksums.

        Raises:
          ValueError, OSError: the checkpoint is damaged, or of another shape. If it is so for one process of a job,
            then for all of them.
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
        # Some arrays as they were made cannot be donated to the first step, which then needs their memory twice. The
        # outputs of a compiled function can; those that could be already are passed through, not copied.
        return jax.jit(_copy, donate_argnums=0, out_shardings=shardings)(state)

    def restore_data(self, step: int) -> dict[str, Any] | None:
        """The state of the data's iterator, None in a checkpoint without one.

        Raises:
          ValueError, OSError: it is damaged. If it is so for one process of a job, then for all of them.
        """
        path, error, data = self._directory / str(step) / "data" / _DATA_FILE, None, None
        try:
            if path.parent.exists():
                data = json_object(read_small(path), "it")
                if data.pop("crc32", None) not in (None, _crc32(data)):  # older ones have none
                    raise ValueError("it does not agree with its checksum")
        except (ValueError, OSError) as e:
            error = e if isinstance(e, OSError) else ValueError(f"{path} cannot be read: {one_line(e)}")
        agree(error)
        return data

    def close(self) -> None:
        """Wait until everything is written."""
        with disk_errors(*self._writing):
            try:
                self._wait()
            finally:
                self._manager.close()  # which raises the error of another part of the checkpoint, if there is one

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class BestModel(Checkpoints):
    """The parameters of the step with the lowest loss on held-out data.

    Attributes:
      loss: the lowest so far, None before the first.
    """

    loss: float | None = None

    def offer(self, step: int, state: TrainState, loss: float) -> None:
        """Save the parameters if this loss is the lowest so far."""
        if self.loss is None or loss < self.loss:
            self.loss = loss
            self.save_model(step, state)


@dataclasses.dataclass(frozen=True)
class _KeepForeignFiles:
    """As `policy` says, but a checkpoint with a file in it that is not of a run stays: Orbax would remove both."""

    policy: Any
    directory: Path

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self.policy.should_preserve(checkpoints, context=context)
        steps = zip(kept, (self.directory / str(checkpoint.step) for checkpoint in checkpoints), strict=True)
        return [keep or _foreign_file(path) is not None for keep, path in steps]


def _foreign_file(step: Path) -> Path | None:
    with suppress(FileNotFoundError, NotADirectoryError):  # process 0 may be removing it
        return next((entry for entry in step.iterdir() if entry.name not in (*_IN_A_STEP, "commit_success.txt")), None)
    return None


def _check_steps(directory: Path) -> None:
    """Orbax removes old steps, and what it has not finished: raise FileExistsError for what only has such a name."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if not (path.name.isdecimal() or ".orbax-checkpoint-tmp" in path.name):
            continue
        if not is_remote(path):
            refuse_links(path)
        in_it = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
        if path.name.isdecimal() and in_it and not {*in_it} & {*_IN_A_STEP}:  # (nothing: killed while it was removed)
            raise FileExistsError(f"{path} is not a checkpoint, but has the name of one: move it elsewhere")


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """The state as two flat dictionaries, name -> array."""
    leaves = named_leaves(state)
    params = {name: leaf for name, leaf in leaves.items() if name.startswith("model.")}
    rest = {name: leaf for name, leaf in leaves.items() if not name.startswith(("model.", "frozen."))}
    return {"params": params, "optimizer": rest}


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


def _read(directory: Path, targets: dict[str, Any], verify: bool) -> dict[str, jax.Array]:
    """The arrays of `targets`, by name; this process reads only what its devices hold."""
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


class Due:
    """When a checkpoint is due: after so many steps, at a multiple of `keep_every`, after so many minutes.

    All processes get the same answer, because process 0 reads the clock.
    """

    def __init__(self, every: int, minutes: float | None, keep_every: int | None, first: int):
        self._every, self._minutes, self._keep_every = every, minutes, keep_every or every
        self._saved = self._looked = time.monotonic()
        self._next_look, self._last_look = first + 1, first

    def __call__(self, step: int) -> bool:
        return step % self._every == 0 or step % self._keep_every == 0 or self._time_is_up(step)

    def _time_is_up(self, step: int) -> bool:
        if self._minutes is None or step < self._next_look:
            return False
        now = time.monotonic()
        pace = (now - self._looked) / (step - self._last_look)
        # Agreeing costs the devices a moment: not at every step where steps are short.
        wait = 1 if jax.process_count() == 1 else int(np.clip(_LOOK_SECONDS / max(pace, 1e-6), 1, 10_000))
        answer = np.asarray([now - self._saved >= self._minutes * 60, wait], np.int32)
        if jax.process_count() > 1:
            with jax.transfer_guard("allow"):
                answer = multihost_utils.broadcast_one_to_all(answer)
        self._looked, self._last_look, self._next_look = now, step, step + int(answer[1])
        return bool(answer[0])

    def saved(self) -> None:
        self._saved = time.monotonic()


class Termination:
    """A context in which SIGTERM or Ctrl-C requests a checkpoint and a clean end.

    A second signal ends the process at once, and so does a Ctrl-C before the first step, when there is nothing to save.

    Attributes:
      came: the first of these signals, or None.
    """

    def __enter__(self) -> "Termination":
        self.came: int | None = None
        self._stepped = False
        # Of several processes, JAX listens to SIGTERM, and lets all agree on a step.
        job = jax.distributed.is_initialized()
        self._signals = Signals(self._note, signal.SIGINT, *(() if job else (signal.SIGTERM,)))
        self._signals.__enter__()
        return self

    def _note(self, number: int) -> None:
        if self.came is not None or number == signal.SIGINT and not self._stepped:
            processes.end_at_once(number)
        self.came = number
        if number == signal.SIGINT:
            say("Ctrl-C: saving a checkpoint; a second Ctrl-C ends at once, without it")
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__()

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`: the same on all processes, which must ask at every step."""
        self._stepped = True
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.came is not None

    def reason_and_exit_code(self) -> tuple[str, int]:
        """(name of the signal, exit code)."""
        return ("Ctrl-C", INTERRUPTED) if self.came == signal.SIGINT else ("SIGTERM", processes.PREEMPTED)
