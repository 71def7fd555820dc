"""Checkpoints of a training state: atomic, written while training goes on, restored onto whatever mesh the run has now;
when to write one, and what to do about SIGTERM."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from opt_jax.hub import absolute, as_path, check_array_path, is_remote
from opt_jax.storage import CHUNK_BYTES, on_first_process
from opt_jax.temporary import refuse_links
from opt_jax.training.step import TrainState, named_leaves

_IN_A_STEP = ("_CHECKPOINT_METADATA", "params", "optimizer", "data")  # any of these: a damaged checkpoint is one, too
_LOOK_SECONDS = 5.0  # between looks at the clock that several processes have to agree on

_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Checkpoints:
    """`directory/<step>/` holds `params` (by parameter path, layers stacked), `optimizer` and `data`. A directory
    half-written when the process was killed has a temporary name and is never taken for a checkpoint.

    keep: so many of the newest stay; keep_every: those of steps that it divides stay as well. data_state: gives the
    state of the data's iterator after a step, for JSON.
    """

    def __init__(
        self, directory: str | os.PathLike, keep: int, keep_every: int | None = None,
        data_state: Callable[[int], dict[str, Any]] | None = None,
    ):  # fmt: skip
        check_array_path(directory)
        self._data_state = data_state
        directory = as_path(directory)
        policies = [LatestN(keep), *([EveryNSteps(keep_every)] if keep_every else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            # Two of these may write at once, and their processes must not wait for each other's barriers.
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
        )
        on_first_process(lambda: _check_steps(directory))
        self._manager = ocp.CheckpointManager(absolute(directory), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Begin to write; returns when `state` may be donated. Waits for the last checkpoint to be finished, and raises
        what went wrong with it."""
        self._save(step, _items(state))

    def save_model(self, step: int, state: TrainState) -> None:
        """The same of the parameters alone."""
        self._save(step, {"params": _items(state)["params"]})

    def _save(self, step: int, items: dict[str, dict[str, jax.Array]]) -> None:
        if step <= (self.latest_step() or 0):
            return
        device = next(iter(next(iter(items["params"].values())).sharding.device_set))
        with jax.transfer_guard("allow"):
            if device.platform == "cpu":
                # Elsewhere Orbax copies to the host before it returns. Here "the host's copy" is the array itself,
                # which the next step, donated it, may overwrite while it is being written.
                items = _copy(items)
            args: dict[str, Any] = {}
            if self._data_state is not None:
                args["data"] = ocp.args.JsonSave(self._data_state(step))
            for name, tree in items.items():
                save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
                args[name] = ocp.args.StandardSave(tree, save_args=save_args)
            self._manager.save(step, args=ocp.args.Composite(**args))

    def restore(self, step: int, abstract: TrainState, shardings: Any) -> TrainState:
        """The state of `step`, each array read straight into its shards. `abstract`: shapes and dtypes of a state.
        What is frozen is in no checkpoint: None in the result.

        Raises whatever Orbax does for a checkpoint that is damaged or of another shape.
        """
        abstract, shardings = (dataclasses.replace(tree, frozen=None) for tree in (abstract, shardings))
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        target = jax.tree.map(place, abstract, shardings)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(target).items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves = restored["params"] | restored["optimizer"]
        state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named_leaves(abstract)])
        # Some arrays as Orbax makes them cannot be donated to the first step, which then needs their memory twice. The
        # outputs of a compiled function can; those that could be already are passed through, not copied.
        return jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0, out_shardings=shardings)(state)

    def restore_data(self, step: int) -> dict[str, Any] | None:
        """The state of the data's iterator, None in a checkpoint without one."""
        if not (self._manager.directory / str(step) / "data").exists():
            return None
        return self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


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


class Due:
    """When a checkpoint is due: after so many steps, at a multiple of `keep_every`, after so many minutes. All
    processes get the same answers: process 0 looks at the clock."""

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
    """Context in which SIGTERM asks for a checkpoint and a clean end; a second one ends the process at once."""

    def __enter__(self) -> "Termination":
        self._asked = False
        if not jax.distributed.is_initialized():  # else JAX listens, and lets all processes agree on a step
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._before)

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`: the same on all processes, which must ask at every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
