"""Ends a run whose loss or gradient is NaN or infinite, with a checkpoint of the state before that update."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.step import TrainState


class NonFiniteError(ValueError):
    """The loss or gradient of update number `step` is not finite, and the update was not done."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


@contextmanager
def kept_before_nonfinite(checkpoints: Checkpoints, state: Callable[[], TrainState], shardings: Any) -> Iterator[None]:
    """A context around the training loop: at a NonFiniteError it saves the state from before that update.

    Args:
      checkpoints: where it is saved.
      state: returns the loop's newest state. Steps dispatched after that update have not changed it, because it is
        halted (see `TrainState`).
      shardings: of the state.

    Raises:
      ValueError: in place of the NonFiniteError; says which checkpoint it is.
    """
    try:
        yield
    except NonFiniteError as error:
        before = error.step - 1
        if before:
            resume = lambda s: dataclasses.replace(s, halted=jnp.zeros_like(s.halted))  # noqa: E731
            checkpoints.save(before, jax.jit(resume, donate_argnums=0, out_shardings=shardings)(state()))
        checkpoints.close()
        kept = f"checkpoint {before} is the state before it" if before else "the run is where it began"
        raise ValueError(
            f"{error}\nThat update was not done: {kept}. To skip such updates, start again with --skip-nonfinite."
        ) from None
