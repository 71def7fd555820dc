"""Steering vectors: the mean difference of activations between contrasting texts, added while the model generates.

Turner et al. 2023, "Activation Addition", https://arxiv.org/abs/2308.10248: the difference of two prompts. Panickssery
et al. 2023, "Contrastive Activation Addition", https://arxiv.org/abs/2312.06681: its mean over many pairs, at the last
token. Both add it to the residual stream of one layer.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from opt_jax.model.heads import OPTPreTrainedModel
from opt_jax.model.hook_points import Names
from opt_jax.model.interventions import Add
from opt_jax.research.activations import activations, as_batch, token_points


def steering_vectors(
    model: OPTPreTrainedModel,
    positive: Iterable[Any],
    negative: Iterable[Any],
    *,
    names: Names,
    last: int | None = 1,
) -> dict[str, Float[np.ndarray, "..."]]:
    """For each point, the mean activation of the positive texts minus that of the negative ones.

    Of pairs, this is the mean of their differences. Each text counts the same, however long it is.

    Args:
      model: any of the models.
      positive: batches of texts that show what is wanted; each as in `collect`.
      negative: batches of texts that show the contrary. For pairs, one for each positive text.
      names: the points, as in `run_with_cache`.
      last: how many real tokens at the end of a text are averaged; 1: the last one. None: all of the text.

    Returns:
      name -> float32 array of the shape of an activation of one token: [D] in the residual stream.

    Raises:
      ValueError: no texts, a text without a token, `last` below 1; or as `collect`.
    """
    if last is not None and last < 1:
        raise ValueError(f"last={last}: must be at least 1, or None")
    points = token_points(model.config, names)
    means = [_mean(model, points, batches, last) for batches in (positive, negative)]
    return {name: (means[0][name] - means[1][name]).astype(np.float32) for name in points}


def steer(
    vectors: Mapping[str, Any], scale: Any = 1.0, positions: Any = None, relative_to: Any = None
) -> dict[str, Add]:
    """Hooks that add scale * vector, for `model.generate(..., hooks=)`, `run_with_hooks` and others.

    Other vectors, scales and positions compile nothing.

    Args:
      vectors: name of a point -> vector, as from `steering_vectors`; one layer is usual.
      scale: the factor; negative: away from the positive texts.
      positions: see `Intervention`; None: each token, in the prompt and in what is generated.
      relative_to: if given, the norm that a vector gets before it is scaled, such as that of the activations.
    """
    hooks = {}
    for name, vector in vectors.items():
        vector = jnp.asarray(vector, jnp.float32)
        if relative_to is not None:
            vector = vector * (relative_to / jnp.linalg.norm(vector.ravel()))
        hooks[name] = Add(vector[None, None], scale, positions=positions)
    return hooks


def _mean(
    model: OPTPreTrainedModel, points: list[str], batches: Iterable[Any], last: int | None
) -> dict[str, np.ndarray]:
    """The mean over texts of the mean over their tokens, in float64."""
    sums, texts = {name: np.zeros(()) for name in points}, 0
    for ids, mask in map(as_batch, batches):
        if not mask.any(axis=1).all():
            raise ValueError("a text has no token: its attention_mask is 0 everywhere")
        after = mask[:, ::-1].cumsum(axis=1)[:, ::-1]  # real tokens from here to the end of the text
        used = mask & (after <= (last or mask.shape[1]))
        weights = used / used.sum(axis=1, keepdims=True)
        for name, value in activations(model, points, ids, mask).items():
            sums[name] = sums[name] + np.einsum("bt,bt...->...", weights, np.asarray(value, np.float64))
        texts += len(ids)
    if not texts:
        raise ValueError("no texts: `positive` and `negative` must each have one")
    return {name: total / texts for name, total in sums.items()}
