"""The reference: `transformers`' PyTorch OPT with eager attention, and our model with the same weights.

The mapping of names is written out here a second time on purpose: a mistake in `formats/names.py` must not hide itself.
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
# Threads that wait for each other cost small models more than they give.
torch.set_num_threads(int(os.environ.get("PARITY_TORCH_THREADS", "1")))


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


def make_exact_pair(name: str, cls: str = "OPTForCausalLM", scan_layers=False, **config):
    """As `make_pair`, but the PyTorch model computes in float64, for `run`: what ours, in float32, is to come near."""
    hf, model = make_pair(name, cls, scan_layers=scan_layers, **config)
    return hf.double(), model


class _Float64(torch.overrides.TorchFunctionMode):
    """`transformers` computes softmax and losses in float32, whatever its model computes in. Not here."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"dtype": torch.float64} if kwargs.get("dtype") is torch.float32 else kwargs))


class _Rounded(_Float64):
    """Every result is rounded to the nearest number of `dtype`, once, whatever the machine's kernels would do."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.limits = dtype, torch.finfo(dtype)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.dtype is torch.float64:
            # Else the mask's lowest float64 would become -inf, and a row without a visible key NaN.
            return result.clamp(self.limits.min, self.limits.max).to(self.dtype).double()
        return result


def run(hf, inputs: dict, rounded_to=None, **options):
    """The output of a PyTorch model in float64 for numpy inputs.

    rounded_to: compute as an ideal machine would do in this dtype: each operation exactly, its result rounded once.
    """
    assert hf.dtype is torch.float64
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in torch_inputs(inputs).items()}
    with _Float64() if rounded_to is None else _Rounded(getattr(torch, jnp.dtype(rounded_to).name)):
        return hf(**inputs, **options)


@contextmanager
def summands(hf):
    """Yields {HF name: the sum of the norms that the gradient has of each position alone}, filled in by `backward`.

    A gradient is a sum over positions. Where it is small beside its summands, or zero in theory (of a bias of the keys,
    which moves no softmax), its rounding errors are of the size that these have.
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
    """Yields the list of them, one of each layer, filled in by a call; none where the activation is another one."""
    values = []
    layers = [m for m in hf.modules() if hasattr(m, "fc1")] if hf.config.activation_function == "relu" else []
    hooks = [layer.fc1.register_forward_hook(lambda *args: values.append(args[2])) for layer in layers]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()


def assert_no_relu_near_zero(values, mask):
    """`values`: `relu_inputs`. Where rounding decides the sign of one, float32 gradients agree with nobody's.

    The distances to zero are those of float64, so they are the same on every machine.
    """
    for x in values:
        within(RELU_ROUNDING, np.abs(to_numpy(x).reshape(*mask.shape, -1)[mask]).min(), "zero of a ReLU")


def talkative_pair(name: str, **config):
    """As `make_pair`, but position counts for more, constants for less, or they would say one token for ever."""
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
    """Give `model` the values of PyTorch `tensors`, {HF name: tensor}; both must have exactly the same parameters."""
    params = named_parameters(model)
    values = canonical(tensors)
    assert values.keys() == params.keys(), values.keys() ^ params.keys()
    for path, value in values.items():
        assert value.shape == params[path].get_value().shape, path
        params[path].set_value(jnp.asarray(value, params[path].get_value().dtype))


def canonical(tensors) -> dict[str, np.ndarray]:
    """{HF name: tensor} as {canonical path: array in our layout}; of float32 but for float64."""
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
    tensor = tensor.detach()
    return (tensor if tensor.dtype is torch.float64 else tensor.float()).numpy()
