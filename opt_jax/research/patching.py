"""Activation patching (Wang et al. 2022, https://arxiv.org/abs/2211.00593) and causal tracing (Meng et al. 2022,
https://arxiv.org/abs/2202.05262) for a whole grid of layers, positions and heads, as one compiled program.

Shapes: L layers, B batch, T tokens, P word_embed_proj_dim, V vocab_size.
"""  # noqa: D205

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from opt_jax.model.hook_points import POINTS
from opt_jax.model.ids import as_ids
from opt_jax.model.interventions import Add, Replace, as_hooks, run_with_hooks
from opt_jax.research.figures import heatmap

Metric = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Patching:
    """What a metric is in the clean run, in the corrupted run, and in the corrupted run with one cell of the clean one.

    Attributes:
      clean, corrupted: the metric, usually a number.
      patched: [layers, positions], or [layers, positions, heads], and the axes of the metric, if it has some.
      layers, positions: the numbers that the axes of `patched` stand for.
    """

    clean: np.ndarray
    corrupted: np.ndarray
    patched: np.ndarray
    layers: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def restored(self) -> np.ndarray:
        """`patched` on a scale where the corrupted run is 0 and the clean run is 1."""
        return (self.patched - self.corrupted) / (self.clean - self.corrupted)


def patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    attention_mask: Any = None,
    *,
    point: str = "hook_resid_pre",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    window: int = 1,
    batch_size: int = 16,
    hooks: Any = None,
) -> Patching:
    """The metric of corrupted runs, each with the clean run's activation at one cell of a grid.

    Args:
      model: a model with logits.
      clean, corrupted: int [B, T], ids of the two runs.
      metric: function(logits [B, T, V]) -> a number or an array. JAX compiles it, once for each function object.
      attention_mask: [B, T], of both runs.
      point: the name of a point without its layer, as in `hook_points.POINTS`, such as "attn.hook_z".
      layers: of the grid. None: all.
      positions: of the grid, counted in real tokens. None: all columns.
      heads: of the grid, at points with heads. None: a cell is all heads together.
      window: how many layers a cell has: the named one in the middle, and at the ends of the model fewer.
      batch_size: the most cells that are computed at once; memory grows with it.
      hooks: interventions in all corrupted runs, but not in the clean one.

    Raises:
      ValueError: a model without logits, a point in no layer, an index outside of its axis, runs of different shapes,
        or as a call.
    """
    if model.base_model is model:
        raise ValueError(f"patching compares logits, which an {type(model).__name__} lacks: use OPTForCausalLM")
    if point not in _IN_LAYERS:
        raise ValueError(
            f"point={point!r} must be the name of a point in layers, without its layer: {', '.join(_IN_LAYERS)}"
        )
    config, clean, corrupted = model.config, as_ids("clean", clean), as_ids("corrupted", corrupted)
    if clean.ndim != 2 or clean.shape != corrupted.shape:
        raise ValueError(
            f"the clean run is {clean.shape} and the corrupted one {corrupted.shape}: both must be [B, T], padded alike"
        )
    length = clean.shape[1]
    if window < 1 or batch_size < 1:
        raise ValueError(f"window={window} and batch_size={batch_size} must be at least 1")
    axes = [
        _indices(layers, config.num_hidden_layers, "layers"),
        _indices(positions, length, "positions"),
        None if heads is None else _indices(heads, config.num_attention_heads, "heads"),
    ]
    edits = as_hooks(config, hooks).edits
    out, kept = model.run_with_cache(clean, attention_mask, names=f"blocks.*.{point}")
    values = jnp.stack([kept[f"blocks.{i}.{point}"] for i in range(config.num_hidden_layers)])
    before = run_with_hooks(model, corrupted, attention_mask, hooks=edits)
    used = [axis for axis in axes if axis is not None]
    cells = np.stack([x.reshape(-1) for x in np.meshgrid(*used, indexing="ij")], axis=1).astype(np.int32)
    size = -(-len(cells) // -(-len(cells) // batch_size))  # batches of equal size
    padded = np.concatenate([cells, np.repeat(cells[-1:], -len(cells) % size, axis=0)])
    ids, mask = jnp.asarray(corrupted), None if attention_mask is None else jnp.asarray(attention_mask)
    patched = _patched(model, ids, mask, values, edits, padded, (metric, point, window, size))
    shape = [len(axis) for axis in used]
    return Patching(
        clean=np.asarray(metric(out.logits)),
        corrupted=np.asarray(metric(before.logits)),
        patched=np.asarray(patched[: len(cells)]).reshape(*shape, *patched.shape[1:]),
        layers=tuple(used[0].tolist()),
        positions=tuple(used[1].tolist()),
    )


_IN_LAYERS = tuple(name for name in POINTS if name not in ("hook_embed", "hook_project_in", "hook_pos_embed"))
_IN_LAYERS = tuple(name for name in _IN_LAYERS if name != "hook_project_out" and not name.startswith("ln_final."))


def _indices(wanted: Sequence[int] | None, size: int, what: str) -> np.ndarray:
    indices = np.arange(size) if wanted is None else np.asarray(wanted)
    if indices.ndim != 1 or not len(indices) or (indices < -size).any() or (indices >= size).any():
        raise ValueError(f"{what} must be numbers from {-size} to {size - 1}, at least one")
    return indices if what in ("positions", "subject") else indices % size


@partial(jax.jit, static_argnums=6)
def _patched(
    model: Any, ids: Array, mask: Array | None, values: Array, edits: dict[str, Any], cells: Array, how: Any
) -> Array:
    """The metric of each cell [layer, position] or [layer, position, head]."""
    metric, point, window, size = how
    depth, key = model.config.num_hidden_layers, f"blocks.*.{point}"

    def run(cell: Array) -> Array:
        where: dict[str, Any] = dict(positions=cell[1]) | (dict(heads=cell[2]) if cell.shape[0] == 3 else {})
        layers = [jnp.clip(cell[0] + i - window // 2, 0, depth - 1) for i in range(window)]
        cut = tuple(Replace(values[layer], layers=layer, **where) for layer in layers)
        # The cell's own edit comes last, so that it holds whatever else acts at the point.
        hooks = {k: v for k, v in edits.items() if k != key} | {key: (*edits.get(key, ()), *cut)}
        return metric(model.forward(ids, mask, hooks=hooks).logits)

    return lax.map(run, cells, batch_size=size)


def causal_trace(
    model: Any,
    input_ids: Any,
    subject: Sequence[int],
    metric: Metric,
    *,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    **options: Any,
) -> Patching:
    """`patch`, where the corrupted run is the same text with noise on the embeddings of its subject.

    Args:
      model: a model with logits.
      input_ids: int [1, T].
      subject: the positions of the subject.
      metric: function(logits [samples, T, V]) -> the mean over samples of what is traced, such as
        `lambda logits: jax.nn.softmax(logits[:, -1])[:, token].mean()`.
      noise: its standard deviation, in those of the table of token embeddings. (Meng et al.: of those of subjects.)
      samples: rows with different noise; a cell computes all of them at once.
      seed: of the noise.
      **options: of `patch`. `point` is "hook_resid_post" here. For "hook_mlp_out" Meng et al. use `window=10`.
        `attention_mask` is [1, T]; `hooks` at "hook_embed" act after the noise.

    Raises:
      ValueError: more than one row, or as `patch`.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"causal_trace takes one text, ids [1, T], not {ids.shape}")
    table = model.base_model.decoder.embed_tokens(jnp.arange(model.config.vocab_size, dtype=jnp.int32)[None])
    shape = (samples, ids.shape[1], model.config.embed_dim)
    drawn = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    positions = _indices(subject, ids.shape[1], "subject").tolist()
    edit = Add(drawn, scale=noise * table.astype(jnp.float32).std(), positions=positions)
    rows = np.repeat(ids, samples, axis=0)
    mask = options.pop("attention_mask", None)
    mask = None if mask is None else np.repeat(np.asarray(mask), samples, axis=0)
    hooks = dict(options.pop("hooks", None) or {})
    theirs = hooks.pop("hook_embed", ())
    hooks = {"hook_embed": (edit, *(theirs if isinstance(theirs, tuple | list) else (theirs,)))} | hooks
    options = {"point": "hook_resid_post"} | options
    return patch(model, rows, rows, metric, mask, **options, hooks=hooks)


def plot(patching: Patching, *, labels: Sequence[str] | None = None, axes: Any = None) -> Any:
    """The axes with the metric of each layer and position; of the heads, the mean.

    Args:
      patching: of a metric that is a number.
      labels: a text for each column of the grid. None: the positions.
      axes: where to draw. None: a new figure of pyplot.

    Raises:
      ValueError: as `figures.heatmap`.
    """
    values = patching.patched.mean(axis=2) if patching.patched.ndim == 3 else patching.patched
    title = f"metric: {patching.corrupted:.3g} corrupted, {patching.clean:.3g} clean"
    columns = [str(i) for i in patching.positions] if labels is None else labels
    drawn = heatmap(values, title=title, xlabel="position", columns=columns, axes=axes)
    drawn.set_yticks(range(len(patching.layers)), [str(i) for i in patching.layers])
    return drawn
