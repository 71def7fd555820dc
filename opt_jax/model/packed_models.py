"""Models whose layers keep their matrices packed: `pack_model`, and the way back, `dequantize`."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import NamedSharding

from opt_jax.model.decoder import Linear
from opt_jax.model.heads import OPTPreTrainedModel, named_parameters
from opt_jax.model.packed import PackedLinear, QuantizedMatrix
from opt_jax.parallel.rules import param_sharding

Model = TypeVar("Model", bound=OPTPreTrainedModel)


def pack_model(model: Model, matrices: Mapping[str, QuantizedMatrix], activation_bits: int | None = None) -> Model:
    """A copy of the model with packed matrices in place of kernels of its layers.

    The other parameters are shared with `model`, which does not change. Token embedding, LM head, `project_in` and
    `project_out` stay as they are: the papers leave them alone. On a mesh, packed arrays are split as the kernel is,
    where their axes divide.

    Args:
      model: a float model with separate layers.
      matrices: path of a kernel, as in `named_parameters`, to the matrix [outputs, inputs] that replaces it, such as
        "model.decoder.layers.0.fc1.kernel".
      activation_bits: see `PackedLinear.from_matrix`.

    Raises:
      ValueError: a stacked model, a path that is no kernel of a layer, another shape, or as `PackedLinear.from_matrix`.
    """
    if not isinstance(model.base_model.decoder.layers, nnx.List):
        raise ValueError("pack_model takes a model with separate layers: use opt_jax.unstack_layers(model) first")
    model = nnx.clone(model)
    modules = _linears(model)
    for path, matrix in matrices.items():
        if path not in modules:
            raise ValueError(f"{path!r} is no kernel of this model's layers that can be packed: {_example(modules)}")
        parent, name, linear = modules[path]
        kernel = linear.kernel.get_value()
        if kernel.shape != matrix.shape[::-1]:
            raise ValueError(f"{path}: the matrix is {matrix.shape}, but the kernel's transpose {kernel.shape[::-1]}")
        packed = PackedLinear.from_matrix(matrix, linear.bias, linear.dtype or kernel.dtype, activation_bits)
        if isinstance(kernel.sharding, NamedSharding) and "tensor" in kernel.sharding.mesh.axis_names:
            place(packed, path.removesuffix("kernel"), kernel.sharding.mesh)
        setattr(parent, name, packed)
    return model


def place(packed: PackedLinear, prefix: str, mesh: Any) -> None:
    """Put the packed arrays on a mesh, in place. prefix: the path of the layer, with its last dot."""
    for name in ("qweight", "scales", "zeros", "order"):
        if (param := getattr(packed, name)) is not None:
            value = param.get_value()
            param.set_value(jax.device_put(value, param_sharding(prefix + name, value.shape, mesh)))


def dequantize(model: Model) -> Model:
    """A copy of the model with ordinary float kernels in place of packed ones, in the dtype of its other parameters.

    Training, LoRA, `quantize` and saving in float formats take this model.
    """
    model = nnx.clone(model)
    for _, parent in list(nnx.iter_graph(model)):
        for name, child in list(vars(parent).items()) if isinstance(parent, nnx.Module) else ():
            if isinstance(child, PackedLinear):
                setattr(parent, name, _float_linear(child, model.param_dtype))
    return model


def packed_layers(model: OPTPreTrainedModel) -> dict[str, PackedLinear]:
    """The packed layers by the path that their kernel would have."""
    prefix = "" if model.base_model is not model else "model."
    return {
        f"{prefix}{'.'.join(map(str, path))}.kernel": module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, PackedLinear)
    }


def refuse_packed(model: OPTPreTrainedModel) -> None:
    """Check that all kernels are floats, for functions that change or train them."""
    if packed_layers(model):
        raise ValueError("this model has packed matrices: use opt_jax.dequantize(model) first")


def _float_linear(packed: PackedLinear, param_dtype: Any) -> Linear:
    def build() -> Linear:
        return Linear(
            packed.in_features,
            packed.out_features,
            use_bias=packed.bias is not None,
            dtype=packed.dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
        )

    linear = nnx.eval_shape(build)
    linear.kernel.set_value(packed.matrix().dequantize().T.astype(param_dtype))
    linear.bias = packed.bias
    return linear


def _linears(model: OPTPreTrainedModel) -> dict[str, tuple[nnx.Module, str, Any]]:
    """Path of a kernel of a separate layer -> (module that holds the Linear, its name there, the Linear)."""
    paths = {id(param): path for path, param in named_parameters(model).items()}
    return {
        paths[id(child.kernel)]: (parent, name, child)
        for path, parent in nnx.iter_graph(model)
        if isinstance(parent, nnx.Module) and "layers" in path and any(isinstance(key, int) for key in path)
        for name, child in vars(parent).items()
        if isinstance(child, nnx.Linear)
    }


def _example(paths: Any) -> str:
    return f"paths are such as {next(iter(paths))!r}" if paths else "it has none"
