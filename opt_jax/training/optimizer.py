"""AdamW with the recipe of the OPT paper (section 2.2 and metaseq's `opt_baselines`)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def make_schedule(
    *, peak: float, warmup_steps: int, steps: int, final: float = 0.1
) -> Callable[[ArrayLike], jax.Array]:
    """A schedule: linear warm-up to `peak` over `warmup_steps` updates, then linear decay to `final * peak`.

    The last of the `steps` updates has the final rate. The schedule's argument is the number of updates done so far;
    the first update already has a rate above zero.
    """

    def schedule(step: ArrayLike) -> jax.Array:
        update = jnp.asarray(step, jnp.float32) + 1
        decayed = (update - warmup_steps) / max(steps - warmup_steps, 1)
        return peak * jnp.minimum(update / max(warmup_steps, 1), 1 - (1 - final) * decayed)

    return schedule


def continued_schedule(
    before: Callable[[ArrayLike], jax.Array], done: int, restart: Callable[[ArrayLike], jax.Array] | None
) -> Callable[[ArrayLike], jax.Array]:
    """A schedule for a run that goes on from a finished one.

    Args:
      before: the schedule of the finished run.
      done: the number of updates of the finished run.
      restart: the schedule of a new run of the remaining updates; the rate is never below the last one of `before`.
        None: the rate stays at the last one of `before`.
    """

    def schedule(step: ArrayLike) -> jax.Array:
        last = before(done - 1)
        after = last if restart is None else jnp.maximum(restart(jnp.asarray(step) - done), last)
        return jnp.where(jnp.asarray(step) < done, before(step), after)

    return schedule


def make_optimizer(schedule: optax.Schedule, *, weight_decay: float = 0.1, clip_norm: float = 1.0, betas=(0.9, 0.95)):
    """AdamW with eps 1e-8, after clipping by the global norm. *Every* parameter decays, also LayerNorms and biases."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        _scale_by_adam(*betas, eps=1e-8),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with an argument `skipped`: if it is true, the moments do not change.

    The choice is made here, before the update is computed from the moments, so that XLA updates them in place. If the
    caller chose between old and new moments, XLA on CPU would compute the new ones twice and copy the old ones (1 GB
    for 125M) in every step.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(updates, state, params=None, *, skipped: ArrayLike = False, **_):
        with jax.numpy_dtype_promotion("standard"):  # optax takes a float to the power of an int32
            new = plain.update(updates, state, params)[1]
            new = jax.tree.map(partial(jnp.where, skipped), state, new)
            mu, nu = (
                optax.tree.bias_correction(moment, decay, new.count) for moment, decay in ((new.mu, b1), (new.nu, b2))
            )
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), new

    return optax.GradientTransformationExtraArgs(plain.init, update)
