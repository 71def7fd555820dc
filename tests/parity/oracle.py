"""The reference: `transformers`' PyTorch OPT with eager attention, and our model with the same weights.

The mapping of names is written out here a second time, so that a mistake in `formats/names.py` shows.
"""

import dataclasses
import os
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from limits import RELU_ROUNDING, within
from reference import CONFIGS, draw, unset_model

from opt_jax import OPTConfig, named_parameters, stack_layers

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch")
transformers = pytest.importorskip("transformers", reason="parity tests compare with transformers")
# For small models more threads are slower.
torch.set_num_threads(int(os.environ.get("PARITY_TORCH_THREADS", "1")))


def hf_config(config: OPTConfig):
    """The same config for `transformers`, copied field by field, without `to_hf`."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "extra"}
    if isinstance(config.eos_token_id, tuple):
        fields["eos_token_id"] = list(config.eos_token_id)
    return transformers.OPTConfig(**fields, attn_implementation="eager")


def make_hf(name: str, cls: str = "OPTForCausalLM", dtype=jnp.float32, seed: int = 0, **config):
    """The PyTorch model of `reference.our_model(name, cls, ...)`, in eval mode."""
    settings = dataclasses.replace(CONFIGS[name], **config)
    with torch.device("meta"):  # no initial values, which would be overwritten
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
    """(PyTorch model, our model) with the same random weights. Both compute in `dtype`.

    Args:
      name: a key of `reference.CONFIGS`.
      cls: the class of both models.
      dtype: of parameters and computation.
      seed: of the weights.
      scan_layers: whether our layers are stacked.
      config: fields that differ from `CONFIGS[name]`.
    """
    hf = make_hf(name, cls, dtype, seed, **config)
    settings = dataclasses.replace(CONFIGS[name], **config)
    model = unset_model(settings, cls, dtype, dtype)
    set_parameters(model, dict(hf.named_parameters()))
    return hf, stack_layers(model) if scan_layers else model


def make_exact_pair(name: str, cls: str = "OPTForCausalLM", scan_layers=False, **config):
    """`make_pair` with a PyTorch model in float64, for `run`. Ours computes in float32."""
    hf, model = make_pair(name, cls, scan_layers=scan_layers, **config)
    return hf.double(), model


class _Float64(torch.overrides.TorchFunctionMode):
    """Compute everything in float64, also the softmax and losses that `transformers` casts to float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"dtype": torch.float64} if kwargs.get("dtype") is torch.float32 else kwargs))


class _Rounded(_Float64):
    """Compute in float64, and round the result of each operation to `dtype`. So results are equal on all machines."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.limits = dtype, torch.finfo(dtype)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.dtype is torch.float64:
            # Without the clamp the mask's lowest float64 becomes -inf, and a row without a visible key NaN.
            return result.clamp(self.limits.min, self.limits.max).to(self.dtype).double()
        return result


def run(hf, inputs: dict, rounded_to=None, **options):
    """The output of a PyTorch model in float64 for numpy inputs.

    Args:
      hf: a model of `make_exact_pair`.
      inputs: its inputs.
      rounded_to: a dtype to which the result of each operation is rounded.
      options: further arguments of the call.
    """
    assert hf.dtype is torch.float64
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in torch_inputs(inputs).items()}
    with _Float64() if rounded_to is None else _Rounded(getattr(torch, jnp.dtype(rounded_to).name)):
        return hf(**inputs, **options)


@contextmanager
def summands(hf):
    """Yields {HF name: sum over positions of the norm of a position's part of the gradient}. `backward` fills it.

    A gradient is a sum over positions. Its rounding errors grow with the summands. They may exceed a gradient that is
    small beside its summands, or zero in theory, like that of a bias of the keys, which does not change the softmax.
    """
    names = {id(p): name for name, p in hf.named_parameters()}
    sizes = dict.fromkeys(names.values(), 0.0)

    def add(module, inputs, output):
        parts = dict(module.named_parameters(recurse=False))

        def of_positions(dy):
            x = inputs[0].detach()
            each = dict(bias=dy, weight=dy)
            if isinstance(module, torch.nn.Linear):  # the norm of an outer product is the product of the norms
                each["weight"] = dy * x.norm(dim=-1, keepdim=True)
            if isinstance(module, torch.nn.LayerNorm):
                each["weight"] = dy * torch.nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
            for kind, parameter in parts.items():
                sizes[names[id(parameter)]] += each[kind].norm(dim=-1).sum().item()

        if parts and output.requires_grad:
            output.register_hook(of_positions)

    hooks = [module.register_forward_hook(add) for module in hf.modules()]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def relu_inputs(hf):
    """Yields a list that a call fills with the inputs of each layer's ReLU. It stays empty for other activations."""
    values = []
    layers = [m for m in hf.modules() if hasattr(m, "fc1")] if hf.config.activation_function == "relu" else []
    hooks = [layer.fc1.register_forward_hook(lambda *args: values.append(args[2])) for layer in layers]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()


def assert_no_relu_near_zero(values, mask):
    """Assert that rounding cannot change the sign of a ReLU's input, on which the gradient depends.

    The distances to zero are computed in float64, so they are the same on every machine.

    Args:
      values: from `relu_inputs`.
      mask: the real tokens.
    """
    for x in values:
        within(RELU_ROUNDING, np.abs(to_numpy(x).reshape(*mask.shape, -1)[mask]).min(), "zero of a ReLU")


def talkative_pair(name: str, **config):
    """`make_pair` with larger position embeddings and smaller biases, so that the models do not repeat one token."""
    hf = make_hf(name, **dict[str, Any](num_hidden_layers=2) | config)
    with torch.no_grad():
        for parameter, value in hf.named_parameters():
            value *= 4 if "embed_positions" in parameter else 0.1 if parameter.endswith("bias") else 1
    return hf, to_jax(hf, "OPTForCausalLM")


def to_jax(hf_model, our_cls, dtype=jnp.float32, param_dtype=jnp.float32):
    """A model of `our_cls` (class or name) with the weights of `hf_model`."""
    cls = our_cls if isinstance(our_cls, str) else our_cls.__name__
    model = unset_model(OPTConfig.from_hf(hf_model.config.to_dict()), cls, dtype, param_dtype)
    set_parameters(model, dict(hf_model.named_parameters()))
    return model


def set_parameters(model, tensors) -> None:
    """Set the parameters of `model` to `tensors`, {HF name: tensor}, which must be the same parameters."""
    params = named_parameters(model)
    values = canonical(tensors)
    assert values.keys() == params.keys(), values.keys() ^ params.keys()
    for path, value in values.items():
        assert value.shape == params[path].get_value().shape, path
        params[path].set_value(jnp.asarray(value, params[path].get_value().dtype))


def canonical(tensors) -> dict[str, np.ndarray]:
    """{HF name: tensor} as {our path: array in our layout}, in float32 or float64."""
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
    """numpy inputs as torch tensors, integers as int64."""
    convert = {"i": torch.int64, "f": torch.float32, "b": torch.bool}
    return {k: torch.from_numpy(np.asarray(v)).to(convert[np.asarray(v).dtype.kind]) for k, v in inputs.items()}


def to_numpy(tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor if tensor.dtype is torch.float64 else tensor.float()).numpy()
