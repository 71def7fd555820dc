"""Causal attention by kernels that never store the [T, T] weights: splash attention on TPUs, cuDNN on GPUs.

Queries are scaled already. Queries and keys are the same tokens. A token attends to its own segment of `segment_ids`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AttentionImplementation = Literal["xla", "cudnn", "splash"]
Heads = Float[Array, "B H T K"]  # queries, keys, values or outputs: a vector for each head and token
_LANES = 128  # of a TPU, and the smallest block


def splash(
    q: Heads, k: Heads, v: Heads, segment_ids: Int[Array, "B T"] | None = None, interpret: bool = False
) -> Heads:
    """The output of splash attention, for any length.

    Pads the sequence at its end to a multiple of 128; causal attention hides this padding from all tokens.
    `interpret`: emulate the kernel without a TPU (slow; for tests).
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    heads, length = q.shape[1:3]
    padding = -length % _LANES
    padded = length + padding
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v))
    block = next(size for size in (512, 256, _LANES) if padded % size == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((padded, padded))] * heads)
    kernel = splash_attention.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="context", interpret=interpret
    )
    if segment_ids is None:
        out: Any = jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
    else:
        ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
        out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash_attention.SegmentIds(ids, ids)))(q, k, v, ids)
    return out[:, :, :length].astype(q.dtype)


def cudnn(q: Heads, k: Heads, v: Heads, segment_ids: Int[Array, "B T"] | None = None) -> Heads:
    """The output of cuDNN's flash attention. It reads segments as a mask [B, 1, T, T] from memory."""
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own function mixes dtypes
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0, is_causal=True, implementation="cudnn")
    return out.transpose(0, 2, 1, 3)


def is_attention_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """A rematerialisation policy: keep the outputs of cuDNN's forward kernel, including the log-sum-exp of each query.

    The log-sum-exp has no checkpoint name. Without it, the backward pass would run the kernel again. (Splash attention
    gives both of its outputs the name "context".)
    """
    return primitive.name.startswith("dot_product_attention_fwd")


KERNELS = {"splash": splash, "cudnn": cudnn}
