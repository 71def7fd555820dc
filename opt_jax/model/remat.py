"""What the backward pass keeps of a layer, and what it computes again."""

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
# What the backward pass keeps of a layer beside its input; the rest is computed again. In units of a layer's input:
# attention's output in heads and after `out_proj` are 1 each, queries, keys and values 3, what leaves `fc1` is 4.
_KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "names": ("context", "attention_out"),
    "dots": ("context", "attention_out", "qkv", "ffn"),
}
# Most bytes of one array [B, T, D] within a layer, with remat "full" in a training step: more rows run in parts.
PART_BYTES = 2**26
Layer = Callable[..., tuple[Any, ...]]  # an `OPTDecoderLayer`


def rematerialise(body: Callable[..., Any], remat: Remat, prevent_cse: bool = False) -> Callable[..., Any]:
    """A layer's function, or the scan's body, with the policy by which its backward pass keeps or computes again."""
    if remat == "none":
        # All is kept but what `gather_parameters` makes, or each device would come to hold the whole model.
        return jax.checkpoint(body, prevent_cse=False, policy=_all_but_weights) if is_per_device() else body
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    if remat != "full":
        policy = jax.checkpoint_policies.save_from_both_policies(policy, is_attention_kernel)
    return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)


def count_parts(x: Float[Array, "B t D"], length: int) -> int:
    """How many parts of the rows of x, one after another, a layer with remat "full" needs in a training step.

    length: tokens in a row on all devices. Fewer tokens than the width take less memory than the sums of gradients that
    parts need.
    """
    batch, width = x.shape[0], x.shape[2]
    if not is_per_device() or batch * length <= width:
        return 1
    largest = max(1, PART_BYTES // (length * width * x.dtype.itemsize))  # rows in one part
    return next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= largest)


def run_in_parts(
    layer: Layer, parts: int, x: Float[Array, "B T D"], mask: AttentionMask, key: DropoutKey | None
) -> Float[Array, "B T D"]:
    """`layer`, without a cache, over equal parts of the rows, one after another.

    The backward pass does a part at a time, too, so that what it computes again, and gathers over `tensor`, exists for
    one part only; weights are gathered, and their gradients sent, once. These come from each part in the compute dtype,
    as they do from the whole batch otherwise, and are added up over parts in float32.
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
    # Not the gathered weights, nor what they are made of: the argument of a name would be kept in its place.
    steps = {"all_gather", "convert_element_type", "select_n", "ne"}  # of `gather_parameters`
    return primitive.name not in steps and params.get("name") != "weights"
