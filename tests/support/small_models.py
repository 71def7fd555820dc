"""Models that compile sooner than those that the tests are about, and models on a mesh."""

import dataclasses

import jax
from flax import nnx
from jax.sharding import Mesh
from reference import unset_model

from opt_jax import OPTConfig, OPTForCausalLM, named_parameters
from opt_jax.parallel.rules import param_sharding


def first_layers(layers: int = 1) -> OPTForCausalLM:
    """The first layers of the embedded model, whose tokens the embedded tokenizer turns into text."""
    trained = OPTForCausalLM.from_pretrained("tiny")
    model = unset_model(dataclasses.replace(trained.config, num_hidden_layers=layers), "OPTForCausalLM")
    parameters = named_parameters(trained)
    for path, param in named_parameters(model).items():
        param.set_value(parameters[path].get_value())
    model.generation_config_json = trained.generation_config_json
    return model


def on_mesh(model: OPTForCausalLM, mesh: Mesh) -> OPTForCausalLM:
    """A copy of the model whose parameters are sharded over the mesh."""
    copy = nnx.clone(model)
    for path, param in named_parameters(copy).items():
        value = param.get_value()
        param.set_value(jax.device_put(value, param_sharding(path, value.shape, mesh)))
    return copy


def count(config: OPTConfig, cls: str) -> int:
    """The number of parameters, derived from the architecture and not from the code."""
    v, d, f, p = config.vocab_size, config.hidden_size, config.ffn_dim, config.embed_dim
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    projections = 2 * p * d if p != d else 0
    norm = 2 * d if config.do_layer_norm_before else 0
    head = {"OPTForSequenceClassification": 2 * p, "OPTForQuestionAnswering": 2 * p + 2}.get(cls, 0)
    return v * p + 2050 * d + projections + config.num_hidden_layers * layer + norm + head
