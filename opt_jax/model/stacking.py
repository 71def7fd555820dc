"""The two forms of one stack: a list of layers, and one layer whose parameters have a leading axis L."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opt_jax.model.decoder import parameters, unstack


def stack_layers(model: Any) -> Any:
    """Turn a model's separate layers into the one stacked layer that runs under `lax.scan` (see `OPTDecoder`).

    In place, and returned. Goes leaf by leaf, releasing the separate arrays, so two copies never exist. Works on
    abstract models too (`nnx.eval_shape`). Nothing to do for a model that is stacked already.
    """
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
    """The inverse of `stack_layers`, as gentle with memory."""
    decoder = model.base_model.decoder
    if not isinstance(decoder.layers, nnx.List):
        decoder.layers = unstack(decoder.layers, decoder.config.num_hidden_layers)
    return model


def _stacked(leaves: list[Any]) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)
