"""Models that compile sooner than those that the tests are about."""

import dataclasses

from reference import unset_model

from opt_jax import OPTForCausalLM, named_parameters


def first_layers(layers: int = 1) -> OPTForCausalLM:
    """The embedded model without its other layers: it says something in the embedded tokenizer's words."""
    whole = OPTForCausalLM.from_pretrained("tiny")
    model = unset_model(dataclasses.replace(whole.config, num_hidden_layers=layers), "OPTForCausalLM")
    parameters = named_parameters(whole)
    for path, param in named_parameters(model).items():
        param.set_value(parameters[path].get_value())
    model.generation_config_json = whole.generation_config_json
    return model
