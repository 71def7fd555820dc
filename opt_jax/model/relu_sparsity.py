"""Decoding that reads only the rows of fc2 whose input is not zero. It is exact: nothing predicts which these are.

In OPT, more than 90 % of what fc1 and ReLU give for a token is zero (Mirzadeh et al. 2023,
https://arxiv.org/abs/2310.04564), and a product with zero needs no weight. A decoding step waits for weights, and fc2
has a third of those of a layer. Shapes as in `decoder.py`; N: tokens of a call, B times T.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from opt_jax.model.heads import OPTPreTrainedModel

Model = TypeVar("Model", bound=OPTPreTrainedModel)

MAX_TOKENS = 8  # of a product that skips zeros; more tokens have few in common
# Rows of the kernel that a turn of the loop adds. For few tokens they are one pass over the sum, which stays in the
# cache; for more, a product of gathered rows. Gathering takes twice as long for one token, and less for 8.
FEW_TOKENS, UNROLL, BLOCK = 4, 8, 128


def use_relu_sparsity(model: Model, capacity: float = 0.5) -> Model:
    """A copy of the model whose fc2 skips zeros in calls of up to 8 tokens, such as decoding steps. For CPUs.

    A neuron is live if it is not zero for every token of the call. The result differs from that of `model` by rounding
    only. (A weight that is not finite makes NaN of a zero in `model`, but not here.) The arrays are shared with
    `model`, which does not change.

    Args:
      model: any of the models, with separate layers.
      capacity: the largest share of live neurons for which a layer skips the others. Above it, the layer reads all of
        the matrix, as `model` does.

    Raises:
      ValueError: an activation function that is not ReLU; a stacked model (see `unstack_layers`); a quantized model; a
        model on a mesh or on an accelerator; one that skips zeros already; a capacity that is not in (0, 1].
    """
    activation, layers = model.config.activation_function, model.base_model.decoder.layers
    if activation != "relu":
        raise ValueError(f"use_relu_sparsity needs activation_function='relu': {activation!r} gives no zeros to skip")
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity={capacity}: must be above 0 and at most 1, a share of the neurons of a layer")
    if not isinstance(layers, nnx.List):
        raise ValueError("use_relu_sparsity needs separate layers: use opt_jax.unstack_layers(model) first")
    for layer in layers:
        _check(layer.fc2)
    model = nnx.clone(model)
    for layer in model.base_model.decoder.layers:  # type: ignore[reportGeneralTypeIssues]
        layer.fc2.dot_general = SkipZeros(layer.fc2.dot_general, capacity)
    return model


def skips_zeros(model: nnx.Module) -> bool:
    """Whether `use_relu_sparsity` gave the model."""
    return any(isinstance(getattr(node, "dot_general", None), SkipZeros) for _, node in nnx.iter_graph(model))


def _check(fc2: Any) -> None:
    """ValueError if a layer cannot skip zeros."""
    if not isinstance(fc2, nnx.Linear):
        raise ValueError(f"use_relu_sparsity takes a model that is not quantized, and fc2 is {type(fc2).__name__}")
    if skips_zeros(fc2):
        raise ValueError("this model skips zeros already: for another capacity, take the model that it was made from")
    sharding = getattr(fc2.kernel.get_value(), "sharding", None)  # abstract arrays have none
    devices: set[Any] = set() if sharding is None else sharding.device_set
    if len(devices) > 1:
        raise ValueError("use_relu_sparsity takes a model on one device: load it without mesh")
    if (platforms := {device.platform for device in devices}) - {"cpu"}:
        raise ValueError(f"use_relu_sparsity is for CPUs: no gain is known on a {platforms.pop()}, so leave it out")


@dataclasses.dataclass(frozen=True)
class SkipZeros:
    """The `dot_general` of an `nnx.Linear` that reads no rows of its kernel for which all inputs are zero.

    Attributes:
      dense: the `dot_general` that reads all rows.
      capacity: as for `use_relu_sparsity`.
    """

    dense: Callable[..., Array]
    capacity: float

    def __call__(
        self, x: Float[Array, "*B F"], kernel: Float[Array, "F D"], dimension_numbers: Any, **kwargs: Any
    ) -> Float[Array, "*B D"]:
        tokens = x.reshape(-1, x.shape[-1])
        if len(tokens) > MAX_TOKENS:
            return self.dense(x, kernel, dimension_numbers, **kwargs)

        def dense(x: Float[Array, "N F"], kernel: Float[Array, "F D"]) -> Float[Array, "N D"]:
            return self.dense(x, kernel, (((1,), (0,)), ((), ())), **kwargs)

        def derivative(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
            return jax.jvp(dense, primals, tangents)  # the loop over rows has none in reverse mode

        skip = partial(_skip_zeros, dense, max(1, round(self.capacity * len(kernel))))
        product: Any = jax.custom_jvp(partial(lax.platform_dependent, cpu=skip, default=dense))
        product.defjvp(derivative)
        return product(tokens, kernel).reshape(*x.shape[:-1], -1)


def _skip_zeros(
    dense: Callable[..., Array], capacity: int, x: Float[Array, "N F"], kernel: Float[Array, "F D"]
) -> Float[Array, "N D"]:
    """x @ kernel, from the rows of the kernel for which x is not zero if there are at most `capacity`."""
    dtype = x.dtype
    # On a CPU, XLA multiplies half precision in float32. It casts the matrix in each call or, in a loop of decoding
    # steps, once before the loop. If this were left to it, it would cast all rows at each step.
    x, kernel = (array.astype(jnp.promote_types(dtype, jnp.float32)) for array in (x, kernel))
    live = (x != 0).any(axis=0)
    count, step = live.sum(dtype=jnp.int32), UNROLL if len(x) <= FEW_TOKENS else BLOCK

    def by_rows() -> Float[Array, "N D"]:
        size = -(-capacity // step) * step
        rows = jnp.nonzero(live, size=size, fill_value=len(kernel))[0].astype(jnp.int32)
        inputs = jnp.take(x, rows, axis=1, mode="fill", fill_value=0)  # 0 after the last live row

        def add_each(turn: Array, total: Array) -> Array:
            for i in range(UNROLL):
                place = turn * UNROLL + i
                row = lax.dynamic_slice_in_dim(kernel, lax.dynamic_index_in_dim(rows, place, keepdims=False), 1)
                total += lax.dynamic_slice_in_dim(inputs, place, 1, axis=1) * row
            return total

        def add_block(turn: Array, total: Array) -> Array:
            block = lax.dynamic_slice_in_dim(rows, turn * BLOCK, BLOCK)
            part = lax.dynamic_slice_in_dim(inputs, turn * BLOCK, BLOCK, axis=1)
            return total + dense(part, jnp.take(kernel, block, axis=0, mode="clip"))

        total = jnp.zeros((len(x), kernel.shape[1]), x.dtype)
        add = add_each if step == UNROLL else add_block
        return lax.fori_loop(0, (count + (step - 1)) // step, add, total)

    return lax.cond(count <= capacity, by_rows, lambda: dense(x, kernel)).astype(dtype)
