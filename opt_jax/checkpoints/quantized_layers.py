"""Modules with integers in place of a kernel or a table, from and to the arrays of `formats/quantized.py`."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats import quantized
from opt_jax.checkpoints.formats.quantized import QuantizedArray
from opt_jax.model.heads import OPTModel, OPTPreTrainedModel
from opt_jax.model.int8 import Int8Array
from opt_jax.model.packed import PackedLinear
from opt_jax.model.quantization import Int8Embed, Int8Linear
from opt_jax.parallel import rules

_MODULES = (PackedLinear, Int8Linear, Int8Embed)
Read = Callable[[LazyArray, jax.ShapeDtypeStruct], jax.Array]


def place(model: OPTPreTrainedModel, path: str, array: QuantizedArray, read: Read, mesh: Mesh | None) -> None:
    """Put the module of a quantized array into the model, in place of the one whose parameter has the path `path`.

    Args:
      model: a model with separate layers; its biases are kept.
      path: the path of the kernel or of the embedding.
      array: its parts, of which each process reads its shards.
      read: returns an array in the sharding and dtype of a target.
      mesh: shard the parts over it.
    """
    *parents, name, _ = (path.removeprefix("model.") if isinstance(model, OPTModel) else path).split(".")
    parent: Any = model
    for part in parents:
        parent = parent[int(part)] if part.isdecimal() else getattr(parent, part)
    before, prefix = getattr(parent, name), path.rpartition(".")[0]

    def load(part: str, dtype: Any) -> jax.Array:
        lazy = array.parts[part]
        sharding = jnp.zeros(()).sharding if mesh is None else _sharding(prefix, part, path, lazy.shape, mesh)
        return read(lazy, jax.ShapeDtypeStruct(lazy.shape, dtype, sharding=sharding))

    if array.is_packed:
        dtypes = {"qweight": jnp.uint32, "scales": jnp.float32, "zeros": jnp.uint8, "order": jnp.int32}
        zeros = array.parts["zeros"].load()  # completely, so that all processes of a job take the same decision
        symmetric = (zeros == 2 ** (array.bits - 1)).all()
        used = (part for part in array.parts if part != "zeros" or not symmetric)
        how: Any = dict(in_features=array.shape[0], bits=array.bits, activation_bits=array.activation_bits)
        parts = {part: load(part, dtypes[part]) for part in used}
        after: Any = PackedLinear(parts, before.bias, dtype=before.dtype, **how)
    else:
        values = Int8Array(load("weight", jnp.int8), load("scale", jnp.float32))
        if isinstance(before, nnx.Embed):
            after = Int8Embed(values, before.dtype)
        else:
            after = Int8Linear(values, before.bias, before.preferred_element_type or before.dtype)
    setattr(parent, name, after)


def _sharding(prefix: str, part: str, path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    if part not in ("weight", "scale"):
        return rules.param_sharding(f"{prefix}.{part}", shape, mesh)
    rows, columns = rules.PARAMETER_AXES[rules.table_row(path)]
    if path.endswith("kernel"):  # int8: [outputs, inputs]
        rows, columns = columns, rows
    axes = (rows, columns if part == "weight" else None)
    fits = (
        axis if axis is not None and n % mesh.shape[axis] == 0 else None for n, axis in zip(shape, axes, strict=True)
    )
    return NamedSharding(mesh, P(*fits))


def settings(model: OPTPreTrainedModel) -> dict[str, Any] | None:
    """`quantization_config` of the model's directory; None if all parameters are floats.

    The recipe is that of the model's config, or the `quantization_config` of the files that it was loaded from.
    """
    depth = model.config.num_hidden_layers
    modules = {
        path.replace(".layers.", f".layers.{i}.") if stacked else path: module
        for path, module in modules_of(model).items()
        for stacked in [re.search(r"\.layers\.\D", path) is not None]
        for i in range(depth if stacked else 1)
    }
    return quantized.settings_of(
        {path: getattr(module, "bits", 8) for path, module in modules.items()},
        {path: getattr(module, "activation_bits", None) for path, module in modules.items()},
        model.config.extra.get("quantization_config"),
    )


def modules_of(model: OPTPreTrainedModel) -> dict[str, Any]:
    """The modules with integers, by the path that their kernel or table would have."""
    prefix = "model." if isinstance(model, OPTModel) else ""
    return {
        f"{prefix}{'.'.join(map(str, path))}.{'embedding' if isinstance(module, Int8Embed) else 'kernel'}": module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, _MODULES)
    }


def parameters_of(model: OPTPreTrainedModel) -> set[str]:
    """The paths of the parameters of these modules that are integers, or scales beside them."""
    parts = ("qweight", "scales", "zeros", "order", "weight", "scale")
    return {f"{path.rpartition('.')[0]}.{part}" for path in modules_of(model) for part in parts}
