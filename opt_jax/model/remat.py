"""Rematerialisation: which values the backward pass keeps of a layer, and which it computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from opt_jax.model.attention import AttentionMask, DropoutKey
from opt_jax.model.flash import is_attention_kernel
from opt_jax.parallel.rules import is_per_device

Remat = Literal["none", "dots", "names", "full"]
# Checkpoint names of the values that the backward pass keeps of a layer besides its input. Their sizes, in units of the
# input: "context" (attention's output in heads) and "attention_out" (after `out_proj`) 1 each, "qkv" 3, "ffn" 4.
_KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "names": ("context", "attention_out"),
    "dots": ("context", "attention_out", "qkv", "ffn"),
}
# With remat "full" in a training step, the most bytes of an array [B, T, D] in a layer. Larger batches run in parts.
PART_BYTES = 2**26
Layer = Callable[..., tuple[Any, ...]]  # an `OPTDecoderLayer`


def rematerialise(body: Callable[..., Any], remat: Remat, prevent_cse: bool = False) -> Callable[..., Any]:
    """`body`, a layer or the body of a scan over layers, with the rematerialisation policy `remat`."""
    if remat == "none":
        # Keep all values but the gathered parameters: with these, each device would hold all parameters of the model.
        return jax.checkpoint(body, prevent_cse=False, policy=_all_but_weights) if is_per_device() else body
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    if remat != "full":
        policy = jax.checkpoint_policies.save_from_both_policies(policy, is_attention_kernel)
    return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)


def count_parts(x: Float[Array, "B t D"], length: int) -> int:
    """The number of parts into which a layer with remat "full" splits the rows of x in a training step.

    `length` is the number of tokens in a row, on all devices together. There is one part if the batch has no more
    tokens than D: its arrays are then smaller than the sums of gradients that parts need.
    """
    batch, width = x.shape[0], x.shape[2]
    if not is_per_device() or batch * length <= width:
        return 1
    largest = max(1, PART_BYTES // (length * width * x.dtype.itemsize))  # rows in one part
    return next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= largest)


def run_in_parts(
    layer: Layer, parts: int, x: Float[Array, "B T D"], mask: AttentionMask, key: DropoutKey | None
) -> Float[Array, "B T D"]:
    """The output of `layer` without a cache, computed for `parts` equal parts of the rows, one after the other.

    The backward pass also runs part by part. The values that it computes again, or gathers over `tensor`, exist for one
    part at a time. Weights are gathered once, and their gradients are sent once. The gradients of each part are in the
    compute dtype, as those of the full batch would be, and are added up over parts in float32.
    """
    wide = jax.tree.map(lambda weight: weight.astype(jnp.float32), layer)

    @partial(jax.checkpoint, prevent_cse=False)
    def run(wide: Layer, rows: tuple[Any, ...]) -> Array:
        narrow = jax.tree.map(lambda weight, like: weight.astype(like.dtype), wide, layer)
        x, key_mask, segment_ids, indices = rows
        part_key = None if key is None else DropoutKey(key.key, indices)
        return narrow(x, AttentionMask(key_mask, segment_ids, 0), None, part_key)[0]

    rows = (x, mask.key_mask, mask.segment_ids, None if key is None else key.rows)
    rows = jax.tree.map(lambda value: value.reshape(parts, -1, *value.shape[1:]), rows)
    return lax.map(partial(run, wide), rows).reshape(x.shape)


def _all_but_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    # Exclude the gathered weights and the steps that compute them. If only the named value were excluded, JAX would
    # keep the argument of `checkpoint_name` instead.
    steps = {"all_gather", "convert_element_type", "select_n", "ne"}  # in `gather_parameters`
    return primitive.name not in steps and params.get("name") != "weights"
