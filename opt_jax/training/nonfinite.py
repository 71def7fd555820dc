"""What happens to a run whose loss or gradient is NaN or infinite: it ends, and the state from before is kept."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.step import TrainState


class NonFiniteError(ValueError):
    """Update number `step` met a loss or gradient that is not finite, and was not done."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


@contextmanager
def kept_before_nonfinite(checkpoints: Checkpoints, state: Callable[[], TrainState], shardings: Any) -> Iterator[None]:
    """Around the loop: when it ends by a NonFiniteError, the state from before that update becomes a checkpoint.

    state: gives the loop's newest. Steps that were under way have not changed it: it is halted (see TrainState).

    Raises:
      ValueError: instead of the NonFiniteError; says where the checkpoint is.
    """
    try:
        yield
    except NonFiniteError as error:
        before = error.step - 1
        if before:
            go_on = lambda s: dataclasses.replace(s, halted=jnp.zeros_like(s.halted))  # noqa: E731
            checkpoints.save(before, jax.jit(go_on, donate_argnums=0, out_shardings=shardings)(state()))
        checkpoints.close()
        kept = f"checkpoint {before} is the state before it" if before else "the run is where it began"
        raise ValueError(
            f"{error}\nThat update was not done: {kept}. To pass over such updates, go on with --skip-nonfinite."
        ) from None
