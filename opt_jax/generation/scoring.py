"""Log-probabilities of given tokens, from one forward pass (teacher forcing). Token ids only, no text."""

import contextlib
from functools import cache as memoize
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int

from opt_jax.generation.request import check_score
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.interventions import with_hooks
from opt_jax.parallel.mesh import batch_sharding, mesh_of, replicated, row_groups, use_mesh


def score(
    model: OPTForCausalLM,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    return_greedy: bool = False,
    hooks: Any = None,
) -> Float32[np.ndarray, "B T"] | tuple[Float32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """The log-probability of each token given those before it.

    These are the values that `generate(..., logprobs=0)` records. A row may be one token longer than the context,
    because the model does not read its last token.

    On a mesh, rows are split over the devices. In a `jax.distributed` job, all processes call this with the same
    arguments and get the same result.

    Args:
      model: the language model.
      input_ids: as in `generate`, but pads may be anywhere.
      attention_mask: as in `generate`.
      return_greedy: whether to return a second array.
      hooks: interventions (see `interventions.run_with_hooks`).

    Returns:
      The log-probabilities, NaN at pads and at the first token of a row. With return_greedy also a mask, true where no
      other token is more likely, and false where the log-probability is NaN.

    Raises:
      ValueError: inputs that `generate` would refuse.
    """
    ids, mask, padded_ids, padded_mask = check_score(model, input_ids, attention_mask, unread=1)
    model = model if hooks is None else with_hooks(model, hooks, len(ids), unread=1)
    logprobs, greedy = _run(model, padded_ids, padded_mask)
    result, best = np.full(ids.shape, np.nan, np.float32), np.zeros(ids.shape, bool)
    first = np.arange(len(ids)), mask.argmax(1)
    result[mask], best[mask] = logprobs[padded_mask], greedy[padded_mask]  # the same tokens in the same order
    result[first], best[first] = np.nan, False
    return (result, best) if return_greedy else result


def _run(model: OPTForCausalLM, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The results of `_score` on the host, [B, T]. Their first column is padding: no token predicts it."""
    mesh, rows, given = mesh_of(model), len(ids), (ids, mask)
    if mesh is not None:
        padding = ((0, -rows % row_groups(mesh)), (0, 0))
        given = [_spread(np.pad(x, padding, mode="edge"), mesh) for x in given]
    with contextlib.nullcontext() if mesh is None else use_mesh(mesh):
        results = jax.device_get(_compiled(mesh)(model, *given))
    logprobs, greedy = (np.pad(x[:rows], ((0, 0), (1, 0))) for x in results)
    return logprobs, greedy


def _spread(x: np.ndarray, mesh: Mesh) -> jax.Array:
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), x.__getitem__)


@memoize
def _compiled(mesh: Mesh | None) -> Any:
    return jax.jit(_score) if mesh is None else jax.jit(_score, out_shardings=replicated(mesh))


def _score(
    model: OPTForCausalLM, ids: Int[Array, "B T+1"], mask: Bool[Array, "B T+1"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """The log-probability of each id but the first, and whether no other token is more likely there.

    Computes the logits of at most 128 columns at a time, to save memory.
    """
    hidden = model.model.forward(ids[:, :-1], mask[:, :-1]).last_hidden_state
    batch, length = hidden.shape[:2]
    size = min(length & -length, 128)

    def column(chunk: tuple[Any, Any]) -> tuple[Any, Any]:
        x, following = chunk
        logprobs = jax.nn.log_softmax(model.logits(x), axis=-1)
        chosen = jnp.take_along_axis(logprobs, following[..., None], axis=-1)[..., 0]
        return chosen, chosen >= logprobs.max(axis=-1)

    split = [jnp.moveaxis(x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0) for x in (hidden, ids[:, 1:])]
    chunks = lax.map(column, tuple(split))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length), chunks)
