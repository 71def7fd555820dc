"""Conversion between a list of layers and one stacked layer, whose parameters have a leading axis L."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opt_jax.model.decoder import parameters, unstack
from opt_jax.model.packed import check_not_packed


def stack_layers(model: Any) -> Any:
    """The model itself, with its separate layers turned into one stacked layer for `lax.scan` (see `OPTDecoder`).

    Changes the model in place. It stacks one parameter at a time and then releases the separate arrays, so that two
    copies of the model never exist. Abstract models (`nnx.eval_shape`) work too. A stacked model stays as it is.

    Raises:
      ValueError: packed matrices, whose parameters may differ between layers.
    """
    check_not_packed(model, "a stack of layers")
    decoder = model.base_model.decoder
    if isinstance(decoder.layers, nnx.List):
        layers = list(decoder.layers)
        params = [dict(parameters(layer)) for layer in layers]
        for path, first in params[0].items():
            first.set_value(_stacked([p[path].get_value() for p in params]))
            for p in params[1:]:
                p[path].set_value(None)
        decoder.layers = layers[0]
    return model


def unstack_layers(model: Any) -> Any:
    """The model itself, with its stacked layer turned into separate layers, in place: inverse of `stack_layers`."""
    decoder = model.base_model.decoder
    if not isinstance(decoder.layers, nnx.List):
        decoder.layers = unstack(decoder.layers, decoder.config.num_hidden_layers)
    return model


def _stacked(leaves: list[Any]) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)
