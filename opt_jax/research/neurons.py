"""What the neurons of the feed-forward blocks do on a corpus: how often they fire, on which texts most, which never.

Voita et al. 2023, "Neurons in Large Language Models: Dead, N-gram, Positional", https://arxiv.org/abs/2309.04827, count
this for OPT. OPT's activation function is ReLU, so a neuron fires where its activation is above 0, and is dead where it
never is: exact facts. Other functions (Galactica's GELU) have no such border, so they need a `threshold`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from opt_jax.model.heads import OPTPreTrainedModel
from opt_jax.research.activations import activations, as_batch
from opt_jax.research.figures import new_axes


@dataclasses.dataclass(frozen=True)
class NeuronStatistics:
    """Counts over a corpus; L: the layers asked for, F: neurons of a layer, K: texts kept.

    Attributes:
      layers: their numbers, [L].
      tokens: the real tokens of the corpus.
      fired: int64 [L, F], the tokens on which a neuron fired.
      top: float32 [L, F, K], the highest activation in each of the K texts where it is highest, in falling order.
      rows: int64 [L, F, K], the numbers of these texts in the corpus. If a neuron fired in fewer than K texts, the rest
        is -1 here and in the next two, and minus infinity in `top`.
      positions: int32 [L, F, K], the position of that token among the text's real tokens.
      token_ids: int32 [L, F, K], its id.
      fired_at: int64 [L, F, P], `fired` at the first P positions of a text; P is 0 unless it was asked for.
      tokens_at: int64 [P], the texts that have this position.
    """

    layers: tuple[int, ...]
    tokens: int
    fired: Int[np.ndarray, "L F"]
    top: Float[np.ndarray, "L F K"]
    rows: Int[np.ndarray, "L F K"]
    positions: Int[np.ndarray, "L F K"]
    token_ids: Int[np.ndarray, "L F K"]
    fired_at: Int[np.ndarray, "L F P"]
    tokens_at: Int[np.ndarray, " P"]

    @property
    def rate(self) -> Float[np.ndarray, "L F"]:
        """The share of tokens on which a neuron fired."""
        return self.fired / self.tokens

    @property
    def rate_at(self) -> Float[np.ndarray, "L F P"]:
        """The share of texts in which a neuron fired at a position; NaN where no text has it."""
        return self.fired_at / np.where(self.tokens_at > 0, self.tokens_at, np.nan)

    @property
    def dead(self) -> Bool[np.ndarray, "L F"]:
        """Neurons that never fired."""
        return self.fired == 0


def neuron_statistics(
    model: OPTPreTrainedModel,
    batches: Iterable[Any],
    *,
    layers: Iterable[int] | None = None,
    top: int = 8,
    positions: int = 0,
    threshold: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> NeuronStatistics:
    """Statistics of the neurons over a corpus. Memory does not grow with the corpus, only with L * F * (K + P).

    Args:
      model: any of the models, on a mesh or not.
      batches: the corpus, as in `collect`.
      layers: numbers of layers; None: all.
      top: K, the texts kept for each neuron. Of equal activations the first is kept.
      positions: P, the positions at which to count apart.
      threshold: a neuron fires above it. None: 0, for ReLU only.
      progress: called with (batches done, tokens done).

    Raises:
      ValueError: another activation function without a threshold; a layer that does not exist; no tokens.
    """
    config = model.config
    if threshold is None and config.activation_function != "relu":
        raise ValueError(
            f"{config.activation_function} has no border between firing and not: pass threshold=, for instance 0.1"
        )
    numbers = tuple(range(config.num_hidden_layers) if layers is None else layers)
    if not numbers or not set(numbers) <= set(range(config.num_hidden_layers)):
        raise ValueError(f"layers={list(numbers)}: must be numbers in [0, {config.num_hidden_layers})")
    if top < 1 or positions < 0:
        raise ValueError(f"top={top} must be at least 1, and positions={positions} at least 0")
    border = jnp.float32(threshold or 0)
    points = [f"blocks.{i}.mlp.hook_post" for i in numbers]
    shape = len(numbers), config.ffn_dim
    fired, fired_at = np.zeros(shape, np.int64), np.zeros((*shape, positions), np.int64)
    tokens_at, tokens, texts, done = np.zeros(positions, np.int64), 0, 0, 0
    kept = [np.full((*shape, top), fill, dtype) for fill, dtype in zip(_EMPTY, _DTYPES, strict=True)]
    for ids, mask in map(as_batch, batches):
        places = np.where(mask, mask.cumsum(axis=1) - 1, -1)
        acts = activations(model, points, ids, mask)
        for layer, name in enumerate(points):
            result = _summary(acts[name], jnp.asarray(places, jnp.int32), border, positions)
            count, count_at, best, column = map(np.asarray, result)
            fired[layer] += count
            fired_at[layer] += count_at.T
            rows = np.arange(len(ids))[:, None]
            where = [np.where(best > -np.inf, x, -1) for x in (texts + rows, places[rows, column], ids[rows, column])]
            _merge([array[layer] for array in kept], [value.T for value in (best, *where)])
        tokens_at += np.bincount(places[places >= 0], minlength=positions)[:positions]
        tokens, texts, done = tokens + int(mask.sum()), texts + len(ids), done + 1
        if progress is not None:
            progress(done, tokens)
    if not tokens:
        raise ValueError("no tokens: `batches` is empty, or holds pads only")
    return NeuronStatistics(numbers, tokens, fired, kept[0], kept[1], kept[2], kept[3], fired_at, tokens_at)


def plot(statistics: NeuronStatistics, axes: Any = None) -> Any:
    """The share of dead neurons and the median firing rate by layer, drawn with matplotlib; returns the axes.

    Raises:
      ValueError: matplotlib is missing.
    """
    axes = new_axes(axes)
    axes.bar(statistics.layers, statistics.dead.mean(axis=1), color="C7", label="dead neurons")
    axes.plot(statistics.layers, np.median(statistics.rate, axis=1), marker="o", label="firing rate, median")
    axes.set(xlabel="layer", ylabel="share", ylim=(0, 1.02))
    axes.legend()
    return axes


_EMPTY, _DTYPES = (-np.inf, -1, -1, -1), (np.float32, np.int64, np.int32, np.int32)  # activation, row, position, id


def _summary(
    acts: Float[Array, "B T F"], places: Int[Array, "B T"], border: Float[Array, ""], positions: int
) -> tuple[Array, Array, Array, Array]:
    """Of one batch: tokens fired [F], and by position [P, F]; each text's highest activation [B, F], and its column."""
    fires = (acts.astype(jnp.float32) > border) & (places >= 0)[..., None]
    at = (places[..., None] == jnp.arange(positions, dtype=jnp.int32)[None, None]).astype(jnp.int32)
    count_at = jnp.einsum("btp,btf->pf", at, fires.astype(jnp.int32))
    high = jnp.where(fires, acts.astype(jnp.float32), -jnp.inf)
    return fires.sum(axis=(0, 1), dtype=jnp.int32), count_at, high.max(axis=1), high.argmax(axis=1)


_summary = jax.jit(_summary, static_argnames="positions")


def _merge(kept: list[np.ndarray], new: list[np.ndarray]) -> None:
    """Put the columns with the highest activations into `kept`, [F, K], of it and of `new`, [F, B]."""
    both = [np.concatenate(pair, axis=1) for pair in zip(kept, new, strict=True)]
    order = np.argsort(-both[0], axis=1, kind="stable")[:, : kept[0].shape[1]]
    for array, value in zip(kept, both, strict=True):
        array[:] = np.take_along_axis(value, order, axis=1)
