"""Checkpoints of a training state: atomic, the newest few kept, restored onto whatever mesh the run has now."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from opt_jax.storage import CHUNK_BYTES
from opt_jax.training.step import TrainState, named_leaves


class Checkpoints:
    """`directory/<step>/` holds `params` (by parameter path, layers stacked) and `optimizer`. A directory half-written
    when the process was killed has a temporary name and is never taken for a checkpoint."""

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # The state is donated to the next step: on CPU, where a host copy may be none, writing must end first.
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        if step == self.latest_step():
            return
        items = {}
        for name, tree in _items(state).items():
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
            items[name] = ocp.args.StandardSave(tree, save_args=save_args)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, abstract: TrainState, shardings: Any) -> TrainState:
        """The state of `step`, each array read straight into its shards. `abstract`: shapes and dtypes of a state.

        Raises whatever Orbax does for a checkpoint that is damaged or of another shape.
        """
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        target = jax.tree.map(place, abstract, shardings)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(target).items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves = restored["params"] | restored["optimizer"]
        state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named_leaves(abstract)])
        # Some arrays as Orbax makes them cannot be donated to the first step, which then needs their memory twice. The
        # outputs of a compiled function can; those that could be already are passed through, not copied.
        return jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0, out_shardings=shardings)(state)

    def close(self) -> None:
        self._manager.close()


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """The state as two flat dictionaries, name -> array."""
    leaves = named_leaves(state)
    params = {name: leaf for name, leaf in leaves.items() if name.startswith("model.")}
    return {"params": params, "optimizer": {name: leaf for name, leaf in leaves.items() if name not in params}}
