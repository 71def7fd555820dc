"""A model's embeddings, to get and to resize; its number of parameters; what `print(model)` prints."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from opt_jax.model.decoder import Embed, parameters
from opt_jax.model.heads import OPTForCausalLM, OPTPreTrainedModel
from opt_jax.model.packed import PackedLinear
from opt_jax.parallel import rules


def num_parameters(model: OPTPreTrainedModel, *, exclude_embeddings: bool = False) -> int:
    """The number of parameters. A tied LM head counts once. All of them are trained, unless you choose otherwise.

    A packed matrix counts as the kernel that it stands for.

    Args:
      model: the model, abstract or not.
      exclude_embeddings: leave out token and position embeddings.
    """
    packed = {path: module for path, module in nnx.iter_graph(model) if isinstance(module, PackedLinear)}
    kernels = sum(module.in_features * module.out_features for module in packed.values())
    return kernels + sum(
        math.prod(param.get_value().shape)
        for path, param in parameters(model)
        if not (exclude_embeddings and path[-1] == "embedding") and (path[:-1] not in packed or path[-1] == "bias")
    )


def get_input_embeddings(model: OPTPreTrainedModel) -> Embed:
    """The module of the token embeddings; its `embedding` is the parameter [V, P]."""
    return model.base_model.decoder.embed_tokens


def get_output_embeddings(model: OPTPreTrainedModel) -> Any:
    """The LM head: a `Linear`, or the token embeddings if they are tied; None for a model without LM head."""
    if not isinstance(model, OPTForCausalLM):
        return None
    return get_input_embeddings(model) if model.lm_head is None else model.lm_head


def resize_token_embeddings(
    model: OPTPreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> Embed:
    """The module of the token embeddings, with another number of tokens, in place. `config.vocab_size` follows.

    So does an LM head, tied or not. New tokens come after the others; fewer tokens are the first ones.

    Args:
      model: the model. Programs that were compiled for it are compiled again.
      new_num_tokens: their number; None: as many as there are.
      pad_to_multiple_of: round the number up to a multiple of this one.
      mean_resizing: True: a new row is the mean of the old ones. (Deviation from HF, which adds noise of 3e-5 of their
        standard deviation.) False: normal(0, init_std).

    Raises:
      ValueError: a number below 1, a special token of the config beyond it, or a quantized model.
    """
    embed = get_input_embeddings(model)
    if not isinstance(embed, Embed):
        raise ValueError("a quantized model cannot be resized: resize the model first, then quantize it")
    size = model.config.vocab_size if new_num_tokens is None else new_num_tokens
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    for name, value in (("new_num_tokens", size), ("pad_to_multiple_of", multiple)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    size = -(-size // multiple) * multiple
    if size == model.config.vocab_size:
        return embed
    config = dataclasses.replace(model.config, vocab_size=size)  # checks
    head = get_output_embeddings(model)
    path = "model.decoder.embed_tokens.embedding"
    _resize(embed.embedding, path, 0, size, mean_resizing, config.init_std)
    embed.num_embeddings = size
    if head is not None and head is not embed:
        _resize(head.kernel, "lm_head.kernel", 1, size, mean_resizing, config.init_std)
        head.out_features = size
    for _, module in list(nnx.iter_graph(model)):
        if isinstance(module, nnx.Module) and hasattr(module, "config"):
            module.config = config  # type: ignore[reportAttributeAccessIssue]
    return embed


def _resize(param: nnx.Param[Any], path: str, axis: int, size: int, mean: bool, init_std: float) -> None:
    """Change the length of an axis of a parameter. It stays on its mesh."""
    old = param.get_value()
    sharding = old.sharding
    shape = (size, old.shape[1]) if axis == 0 else (old.shape[0], size)
    if isinstance(sharding, NamedSharding):
        sharding = rules.param_sharding(path, shape, sharding.mesh)  # type: ignore[reportArgumentType]

    def resized(old: jax.Array) -> jax.Array:
        if size <= old.shape[axis]:
            return jax.lax.slice_in_dim(old, 0, size, axis=axis)
        more = list(old.shape)
        more[axis] = size - old.shape[axis]
        if mean:
            new = jnp.broadcast_to(old.astype(jnp.float32).mean(axis, keepdims=True), more)
        else:
            new = init_std * jax.random.normal(jax.random.key(axis), more, jnp.float32)
        return jnp.concatenate([old, new.astype(old.dtype)], axis)

    param.set_value(jax.jit(resized, out_shardings=sharding)(old))


def summary(model: OPTPreTrainedModel) -> str:
    """The modules of the model as a tree of lines, with their numbers of parameters. Equal layers are one line.

    A parameter is shown as `float32[192,768@fsdp]`: its dtype and shape, and the axis of the mesh that splits an axis.
    """
    head = f"{num_parameters(model):,} parameters, computed in {model.dtype}"
    return "\n".join([f"{type(model).__name__}:  # {head}", *_lines(model, "  ")])


def _lines(module: Any, indent: str) -> list[str]:
    lines: list[str] = []
    for name, child in vars(module).items():
        count, part = "", child
        if isinstance(child, nnx.List) and len(child):
            count, child = f"{len(child)} x ", child[0]
        if not isinstance(child, nnx.Module) or isinstance(child, nnx.List):
            continue
        params = {key: param.get_value() for key, param in vars(child).items() if isinstance(param, nnx.Param)}
        names = sorted(params, reverse=True)  # kernel, bias
        shapes = ", ".join(f"{key} {_shape(params[key])}" for key in names)
        if isinstance(child, PackedLinear):
            kernel = f"{child.bits} bits[{child.in_features},{child.out_features}] in groups of {child.group_slots}"
            shapes = f"{kernel}, {shapes}"
        inner = _lines(child, indent + "  ")
        size = sum(math.prod(param.get_value().shape) for _, param in parameters(part))
        shapes = f"({shapes})" if shapes else ""
        lines += [f"{indent}{name}: {count}{type(child).__name__}{shapes}  # {size:,}", *inner]
    return lines


def _shape(value: Any) -> str:
    if value is None:
        return "none"
    sizes, sharding = [*map(str, value.shape)], getattr(value, "sharding", None)
    if isinstance(sharding, NamedSharding):
        for axis, names in enumerate(sharding.spec):
            names = () if names is None else names if isinstance(names, tuple) else (names,)
            splits = [name for name in names if sharding.mesh.shape[name] > 1]
            sizes[axis] += f"@{'+'.join(splits)}" if splits else ""
    return f"{value.dtype}[{','.join(sizes)}]"
