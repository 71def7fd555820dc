"""Pruning by one score for each weight: magnitude, and Wanda.

Magnitude: the baseline of SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, section 4, `--gmp` in its `opt.py`),
with one threshold for a matrix. Wanda: Sun et al. 2023, arXiv 2306.11695, section 3 and `lib/prune_opt.py` of
https://github.com/locuslab/wanda: |weight| times the norm of its input, compared within an output.

Of equal scores, Wanda and n:m remove those of the lower inputs. (The authors' n:m leaves this to `torch.topk`.)
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Sparsity = float | tuple[int, int]  # the share of weights to remove; or (n, m): n of each m inputs in a row


def check_sparsity(sparsity: Sparsity, inputs: int) -> None:
    """Refuse a sparsity that a matrix with so many inputs cannot have.

    Raises:
      ValueError: a share that is not between 0 and 1; n:m with n not between 0 and m, or m not dividing the inputs.
    """
    if isinstance(sparsity, tuple):
        n, m = sparsity
        if not 0 < n < m:
            raise ValueError(f"sparsity {n}:{m} removes {n} of {m} weights; it must be at least 1 and fewer than all")
        if inputs % m:
            raise ValueError(f"sparsity {n}:{m}: {m} does not divide the {inputs} inputs of the matrix")
    elif not 0 < sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be between 0 and 1")


def lowest(scores: Float[Array, "*N K"], count: int) -> Bool[Array, "*N K"]:
    """Where the `count` lowest scores of each vector are. Of equal ones, those that come first."""
    if not count:
        return jnp.zeros(scores.shape, bool)
    threshold = jnp.sort(scores, axis=-1)[..., count - 1 : count]
    below, equal = scores < threshold, scores == threshold
    missing = count - below.sum(-1, keepdims=True, dtype=jnp.int32)
    return below | (equal & (jnp.cumsum(equal, -1, dtype=jnp.int32) <= missing))


def lowest_of_each(scores: Float[Array, "N K"], n: int, m: int) -> Bool[Array, "N K"]:
    """Where the n lowest of each m scores in a row are."""
    return lowest(scores.reshape(scores.shape[0], -1, m), n).reshape(scores.shape)


def up_to_share(scores: Float[Array, "N K"], share: float) -> Bool[Array, "N K"]:
    """Where scores are at most the one that has `share` of all scores below it, as the authors' threshold does.

    That removes one weight more than the share, and all that are equal to it.
    """
    return scores <= jnp.sort(scores.reshape(-1))[int(scores.size * share)]


@partial(jax.jit, static_argnames="sparsity")
def magnitude(weight: Float[Array, "N K"], sparsity: Sparsity) -> Float[Array, "N K"]:
    """The matrix without its smallest weights.

    Args:
      weight: [N, K], outputs by inputs.
      sparsity: the share of weights to remove, or (n, m) to remove n of each m.

    Raises:
      ValueError: as in `check_sparsity`.
    """
    check_sparsity(sparsity, weight.shape[1])
    scores = jnp.abs(weight)
    removed = lowest_of_each(scores, *sparsity) if isinstance(sparsity, tuple) else up_to_share(scores, sparsity)
    return jnp.where(removed, 0, weight)


@partial(jax.jit, static_argnames="sparsity")
def wanda(weight: Float[Array, "N K"], norms: Float[Array, " K"], sparsity: Sparsity) -> Float[Array, "N K"]:
    """The matrix without, in each output, the weights that change the output least.

    Args:
      weight: [N, K], outputs by inputs.
      norms: the Euclidean norm of each input over the calibration tokens, or any multiple of these.
      sparsity: the share of weights to remove, or (n, m) to remove n of each m.

    Raises:
      ValueError: as in `check_sparsity`.
    """
    check_sparsity(sparsity, weight.shape[1])
    scores = jnp.abs(weight) * norms[None]
    if isinstance(sparsity, tuple):
        removed = lowest_of_each(scores, *sparsity)
    else:
        removed = lowest(scores, int(weight.shape[1] * sparsity))
    return jnp.where(removed, 0, weight)
