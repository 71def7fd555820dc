"""Models with int8 weights: `quantize`, and the two modules that it uses. Arrays and products come from `int8`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Int8

from opt_jax.model import int8
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.int8 import Int8Array
from opt_jax.model.packed_models import refuse_packed
from opt_jax.model.relu_sparsity import skips_zeros


def product(x: Float[Array, "B T K"], weight: Int8[Array, "N K"]) -> Float32[Array, "B T N"]:
    """x times the transpose of the integers. `use_native_int8` puts another one in its place."""
    return int8.einsum("btk,nk->btn", x, weight)


class Int8Linear(nnx.Module):
    """`nnx.Linear` with int8 weights: weight [out, in], scale [out, 1]."""

    product = staticmethod(product)

    def __init__(self, weight: Int8Array, bias: nnx.Param[Any] | None, dtype: Any):
        self.weight, self.scale = nnx.Param(weight.values), nnx.Param(weight.scale)
        self.bias = nnx.data(bias)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """The product with the dequantized weights, in the compute dtype."""
        out = self.product(x, self.weight.get_value()) * self.scale.get_value().mT[None]
        if self.bias is not None:
            out += self.bias.get_value().astype(jnp.float32)[None, None]
        return out.astype(self.dtype)


class Int8Embed(nnx.Module):
    """`decoder.Embed` with an int8 table: weight [V, P], scale [V, 1]."""

    product = staticmethod(product)

    def __init__(self, table: Int8Array, dtype: Any):
        self.weight, self.scale = nnx.Param(table.values), nnx.Param(table.scale)
        self.dtype = dtype

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T P"]:
        """The dequantized embeddings of the ids."""
        rows = Int8Array(self.weight.get_value()[ids], self.scale.get_value()[ids])
        return rows.dequantize().astype(self.dtype)

    def attend(self, x: Float[Array, "B T P"]) -> Float[Array, "B T V"]:
        """Logits in float32, as from `decoder.Embed.attend`."""
        return self.product(x, self.weight.get_value()) * self.scale.get_value().mT[None]


def quantize(model: OPTForCausalLM) -> OPTForCausalLM:
    """A copy of the model with int8 weights, for scoring and generation, in a quarter of the memory of float32.

    It quantises the matrices of the layers, `project_in`, `project_out`, the token embedding and an untied LM head,
    with one float32 scale for each output. Position embeddings, LayerNorms and biases are shared with `model`, which
    does not change. Arrays keep their sharding.

    Raises:
      ValueError: a model without LM head, a stacked model (see `unstack_layers`), or one that is quantised already, to
        int8 or packed, or skips zeros (see `use_relu_sparsity`).
      ImportError: qwix is not installed.
      RuntimeError: not all matrices became int8, because some modules of the model are not of this package.
    """
    if not isinstance(model, OPTForCausalLM):
        raise ValueError(f"quantize takes an OPTForCausalLM, not an {type(model).__name__}")
    if not isinstance(model.model.decoder.layers, nnx.List):
        raise ValueError("quantize takes a model with separate layers: use opt_jax.unstack_layers(model) first")
    if count_int8(model):
        raise ValueError("this model has int8 weights already")
    if skips_zeros(model):
        raise ValueError("int8 weights cannot skip zeros: quantize the model that use_relu_sparsity was given")
    refuse_packed(model)
    model = nnx.clone(model)
    modules = [module for _, module in nnx.iter_graph(model) if isinstance(module, nnx.Module)]
    for module in modules:
        for name, child in list(vars(module).items()):
            if isinstance(child, nnx.Linear):
                weight = _quantize(child.kernel.get_value(), transpose=True)
                setattr(module, name, Int8Linear(weight, child.bias, child.preferred_element_type or child.dtype))
    embed: Any = model.model.decoder.embed_tokens
    table = _quantize(embed.embedding.get_value(), transpose=False)
    model.model.decoder.embed_tokens = Int8Embed(table, embed.dtype)  # type: ignore[reportAttributeAccessIssue]

    config = model.config
    projections = 2 if config.embed_dim != config.hidden_size else 0
    expected = 6 * config.num_hidden_layers + projections + (1 if config.tie_word_embeddings else 2)
    if (count := count_int8(model)) != expected:
        raise RuntimeError(f"{count} matrices became int8, not the {expected} that this model should have")
    return model


def count_int8(model: nnx.Module) -> int:
    """The number of int8 arrays in the model."""
    return sum(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(model))


@partial(jax.jit, static_argnums=1)
def _compiled(matrix: jax.Array, transpose: bool) -> Int8Array:
    return int8.quantize(matrix.T if transpose else matrix)


def _quantize(matrix: jax.Array, transpose: bool) -> Int8Array:
    """`matrix`, or its transpose, as int8 [N, K] with scales [N, 1], sharded as `matrix` is."""
    result = _compiled(matrix, transpose)
    sharding = getattr(matrix, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return result
    axes = [*sharding.spec, None, None][:2]
    rows, columns = reversed(axes) if transpose else axes
    specs = Int8Array(P(rows, columns), P(rows, None))  # type: ignore[reportArgumentType]
    return jax.device_put(result, jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), specs))
