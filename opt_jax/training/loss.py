"""The next-token loss of hidden states, a chunk of tokens at a time: the logits of all tokens never exist together.

The forward pass also computes the gradients, while it has a chunk's logits, so that logits are neither kept nor
computed twice.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from opt_jax.parallel.collectives import local_tokens, tensor_offset
from opt_jax.parallel.reductions import gather_rows, max_over_tensor, scatter_rows, sum_over_tensor

IGNORED = -100
CHUNK_BYTES = 2**28  # the largest size of a chunk's float32 logits on one device


def next_token_loss(
    x: Float[Array, "B T P"], table: Float[Array, "V P"], labels: Int[Array, "B T"], chunk_bytes: int = CHUNK_BYTES
) -> Float[Array, ""]:
    """The sum of the negative log-likelihoods of the labels that are not -100, in float32; the logits are `x table^T`.

    Inside `mesh.per_device`, x holds this device's tokens, and table its part of the vocabulary. The loss and the
    gradients are then sums over all tokens of the devices along `tensor`.

    Args:
      x: hidden states.
      labels: the next token of each; -100 does not count.
      chunk_bytes: the largest size of a chunk's float32 logits on one device.
    """
    labels = local_tokens(labels).reshape(-1)
    x = x.reshape(-1, x.shape[-1])
    devices = gather_rows(jnp.zeros(1, jnp.float32)).shape[0]  # along `tensor`: they work on the same chunk
    largest = max(1, chunk_bytes // (4 * table.shape[0] * devices))
    chunks = -(-len(labels) // largest)
    size = -(-len(labels) // chunks)
    padding = chunks * size - len(labels)
    labels = jnp.pad(labels, (0, padding), constant_values=IGNORED).reshape(chunks, size)
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(chunks, size, -1)
    return _loss(x, table, labels)


def _nll(x: Array, table: Array, labels: Array) -> tuple[Array, Array, Array, Array]:
    """For one chunk: the sum of the losses, the softmax [N, V], one-hot labels [N, V], and the gathered x [N, P]."""
    x, labels = gather_rows(x), gather_rows(labels)
    logits = jnp.einsum("np,vp->nv", x, table, preferred_element_type=jnp.float32)
    local_labels = labels - tensor_offset(table.shape[0])
    hot = local_labels[:, None] == jnp.arange(table.shape[0], dtype=jnp.int32)[None]
    highest = max_over_tensor(logits.max(axis=-1))
    exponentials = jnp.exp(logits - highest[:, None])
    # One collective for both sums.
    local_sums = jnp.stack([exponentials.sum(axis=-1), jnp.where(hot, logits, 0).sum(axis=-1)])
    total, chosen = sum_over_tensor(local_sums)
    counted = labels != IGNORED
    loss = jnp.where(counted, jnp.log(total) + highest - chosen, 0).sum()
    weight = jnp.where(counted, 1 / total, 0)
    return loss, exponentials * weight[:, None], hot & counted[:, None], x


@jax.custom_vjp
def _loss(x: Float[Array, "C N P"], table: Float[Array, "V P"], labels: Int[Array, "C N"]) -> Float[Array, ""]:
    def add(total: Array, chunk: tuple[Array, Array]):
        return total + _nll(chunk[0], table, chunk[1])[0], None

    return _scan(add, jnp.zeros((), jnp.float32), (x, labels))[0]


def _loss_forward(x, table, labels):
    def add(carry: tuple[Array, Array], chunk: tuple[Array, Array]):
        total, d_table = carry
        loss, softmax, hot, gathered = _nll(chunk[0], table, chunk[1])
        d_logits = (softmax - hot.astype(jnp.float32)).astype(x.dtype)
        d_x = scatter_rows(jnp.einsum("nv,vp->np", d_logits, table))
        d_table += jnp.einsum("nv,np->vp", d_logits, gathered, preferred_element_type=jnp.float32)
        return (total + loss, d_table), d_x

    (loss, d_table), d_x = _scan(add, (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32)), (x, labels))
    return loss, (d_x, d_table.astype(table.dtype))


def _loss_backward(saved, gradient):
    d_x, d_table = saved
    return *((x.astype(jnp.float32) * gradient).astype(x.dtype) for x in (d_x, d_table)), None


_loss.defvjp(_loss_forward, _loss_backward)


def _scan(body, carry, chunks):
    """`lax.scan`, without a loop around one chunk."""
    if chunks[0].shape[0] > 1:
        return lax.scan(body, carry, chunks)
    carry, out = body(carry, jax.tree.map(lambda x: x[0], chunks))
    return carry, jax.tree.map(lambda x: x[None], out)
