"""Induction heads (Olsson et al. 2022, https://arxiv.org/abs/2209.11895): which heads look one token after the last
occurrence of the current token.

Shapes: L layers, H heads, B batch, T tokens.
"""  # noqa: D205

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opt_jax.model.ids import as_ids
from opt_jax.model.interventions import as_hooks
from opt_jax.research.figures import heatmap


def repeated_tokens(
    config: Any, *, rows: int = 4, length: int = 50, seed: int = 0, tokens: Any = None
) -> Int[np.ndarray, "rows T"]:
    """Ids [rows, T]: `bos`, if the model has one, and then random ids, twice.

    Args:
      config: of the model.
      rows: how many.
      length: of the part that is repeated.
      seed: of the draw.
      tokens: the ids to draw from, such as those that occur in the training data. None: all but the special ones.

    Raises:
      ValueError: the rows would be longer than the model's positions; or `tokens` is empty, or holds no ids.
    """
    start = [] if config.bos_token_id is None else [config.bos_token_id]
    if len(start) + 2 * length > config.max_position_embeddings:
        raise ValueError(f"length={length}: the model has {config.max_position_embeddings} positions for it, twice")
    if tokens is None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else [config.eos_token_id]
        special = [i for i in (config.pad_token_id, config.bos_token_id, *ends) if i is not None]
        tokens = np.setdiff1d(np.arange(config.vocab_size), special)
    usual = np.unique(as_ids("tokens", tokens, 0, config.vocab_size - 1))
    if not len(usual):
        raise ValueError("tokens is empty: there is no id to draw")
    drawn = np.random.default_rng(seed).choice(usual, (rows, length))
    return np.concatenate([np.tile(start, (rows, 1)), drawn, drawn], axis=1).astype(np.int32)


def induction_scores(
    model: Any, *, rows: int = 4, length: int = 50, seed: int = 0, tokens: Any = None
) -> Float[Array, "L H"]:
    """The mean attention of each head, in the second half of `repeated_tokens`, to the token after the same token.

    1 is a perfect induction head; a head that looks at all tokens alike has about 1 / T.

    Args:
      model: any model, with `attn_implementation="xla"`.
      rows, length, seed, tokens: see `repeated_tokens`.

    Raises:
      ValueError: see `repeated_tokens`; or an implementation of attention that stores no weights.
    """
    ids = repeated_tokens(model.config, rows=rows, length=length, seed=seed, tokens=tokens)
    return _scores(model, jnp.asarray(ids), length)


def _mean_of_diagonal(pattern: Float[Array, "B H T T"], length: Any) -> Float[Array, " H"]:
    size = pattern.shape[-1]
    query, key = jnp.arange(size, dtype=jnp.int32)[:, None], jnp.arange(size, dtype=jnp.int32)[None]
    # The first of the repeated tokens is at T - length; the token after the earlier one is length - 1 before it.
    wanted = (query >= size - length) & (key == query - length + 1)
    return jnp.where(wanted[None, None], pattern.astype(jnp.float32), 0).sum(axis=(2, 3)).mean(axis=0) / length


@jax.jit
def _scores(model: Any, ids: Array, length: Any) -> Float[Array, "L H"]:
    out = model.base_model.forward(ids, hooks=as_hooks(model.config, None, "blocks.*.attn.hook_pattern"))
    return jnp.stack([_mean_of_diagonal(pattern, length) for pattern in out.activations.values()])


def plot(scores: Any, *, axes: Any = None) -> Any:
    """The axes with the score of each layer and head.

    Args:
      scores: [L, H], what `induction_scores` returns.
      axes: where to draw. None: a new figure of pyplot.

    Raises:
      ValueError: as `figures.heatmap`.
    """
    return heatmap(scores, title="induction score", xlabel="head", axes=axes)
