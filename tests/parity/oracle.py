"""The reference: `transformers`' PyTorch OPT with eager attention, and our model with the same weights.

The mapping of names is written out here a second time on purpose: a mistake in `convert.names` must not hide itself.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS, draw, unset_model

from opt_jax import OPTConfig, named_parameters, stack_layers

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch")
transformers = pytest.importorskip("transformers", reason="parity tests compare with transformers")
torch.set_num_threads(1)  # threads that wait for each other cost small models more than they give


def hf_config(config: OPTConfig):
    """Field by field, not by way of `to_hf`."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "extra"}
    if isinstance(config.eos_token_id, tuple):
        fields["eos_token_id"] = list(config.eos_token_id)
    return transformers.OPTConfig(**fields, attn_implementation="eager")


def make_hf(name: str, cls: str = "OPTForCausalLM", dtype=jnp.float32, seed: int = 0, **config):
    """The PyTorch model of `reference.our_model(name, cls, ...)`, in eval mode."""
    settings = dataclasses.replace(CONFIGS[name], **config)
    with torch.device("meta"):  # no time for an initialisation that is overwritten
        model = getattr(transformers, cls)(hf_config(settings))
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for hf_name, tensor in model.named_parameters():
            path, transposed = canonical_path(hf_name)
            shape = tuple(tensor.shape[::-1] if transposed else tensor.shape)
            value = draw(path, shape, seed)
            tensor.copy_(torch.from_numpy(value.T if transposed else value))
    return model.to(getattr(torch, jnp.dtype(dtype).name)).eval()


def make_pair(name: str, cls: str = "OPTForCausalLM", dtype=jnp.float32, seed: int = 0, scan_layers=False, **config):
    """(PyTorch model, our model) with the same random weights, LayerNorms and biases included, computing in `dtype`.

    name: a key of `reference.CONFIGS`; `config` replaces fields of it.
    """
    hf = make_hf(name, cls, dtype, seed, **config)
    settings = dataclasses.replace(CONFIGS[name], **config)
    model = unset_model(settings, cls, dtype, dtype)
    set_parameters(model, dict(hf.named_parameters()))
    return hf, stack_layers(model) if scan_layers else model


def to_jax(hf_model, our_cls, dtype=jnp.float32, param_dtype=jnp.float32):
    """A model of `our_cls` (class or name) with the weights of `hf_model`."""
    cls = our_cls if isinstance(our_cls, str) else our_cls.__name__
    model = unset_model(OPTConfig.from_hf(hf_model.config.to_dict()), cls, dtype, param_dtype)
    set_parameters(model, dict(hf_model.named_parameters()))
    return model


def set_parameters(model, tensors) -> None:
    """Give `model` the values of PyTorch `tensors`, {HF name: tensor}; both must have exactly the same parameters."""
    params = named_parameters(model)
    values = canonical(tensors)
    assert values.keys() == params.keys(), values.keys() ^ params.keys()
    for path, value in values.items():
        assert value.shape == params[path].get_value().shape, path
        params[path].set_value(jnp.asarray(value, params[path].get_value().dtype))


def canonical(tensors) -> dict[str, np.ndarray]:
    """{HF name: tensor} as {canonical path: float32 array in our layout}."""
    values = {}
    for name, tensor in tensors.items():
        path, transposed = canonical_path(name)
        values[path] = to_numpy(tensor.T if transposed else tensor)
    return values


def canonical_path(hf_name: str) -> tuple[str, bool]:
    """(our path, whether PyTorch holds the transpose)."""
    name = f"model.{hf_name}" if hf_name.startswith("decoder.") else hf_name
    module, _, kind = name.rpartition(".")
    if kind == "bias":
        return name, False
    if "embed_" in module:
        return module + ".embedding", False
    if "layer_norm" in module:
        return module + ".scale", False
    return module + ".kernel", True


def torch_inputs(inputs: dict) -> dict:
    """numpy inputs as torch tensors (integers as int64, which `transformers` expects)."""
    convert = {"i": torch.int64, "f": torch.float32, "b": torch.bool}
    return {k: torch.from_numpy(np.asarray(v)).to(convert[np.asarray(v).dtype.kind]) for k, v in inputs.items()}


def to_numpy(tensor) -> np.ndarray:
    return tensor.detach().float().numpy()
