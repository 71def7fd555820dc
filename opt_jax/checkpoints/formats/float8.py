"""Float8 tensors of a checkpoint that is not quantized: cast when they are read, as `transformers` does."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from opt_jax.checkpoints import hub
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats.mapped_files import little_endian
from opt_jax.config import OPTConfig

_FLOATS = ("bfloat16", "float16", "float32")  # each holds every value of float8
# Tensors that quantizers store beside the weights.
_PART = re.compile(
    r"_scale(_inv|_2)?$|\.(scales?|qweight|qzeros|g_idx|SCB|CB|absmax|weight_format|(nested_)?quant_map)$|\.quant_state\."
)


def quantized_part(name: str) -> str:
    """For the end of an error message: that a tensor of this name belongs to a quantized checkpoint; or ""."""
    if not _PART.search(name):
        return ""
    return (
        ": such a tensor is part of a quantized checkpoint, but no quantization_config in config.json (or "
        "quantize_config.json) says how to read it: take the model that was quantized"
    )


def cast(directory: Path, arrays: dict[str, LazyArray], config: OPTConfig) -> dict[str, LazyArray]:
    """The arrays, with those of float8 in the dtype of the config.json, or in that of the first other tensor.

    A warning says so. The cast is exact. Arrays of a checkpoint with a quantization stay as they are.
    """
    small = [path for path, array in arrays.items() if array.dtype.name.startswith("float8_")]
    if not small or hub.quantization_hint(directory):
        return arrays
    target = float_dtype(config, arrays, _FLOATS[0]).name
    what = f"{small[0]} and {len(small) - 1} more tensors are" if small[1:] else f"{small[0]} is"
    warnings.warn(f"{directory}: {what} {arrays[small[0]].dtype.name}, read as {target}", stacklevel=2)
    return arrays | {path: _cast(arrays[path], target) for path in small}


def float_dtype(config: OPTConfig, arrays: Mapping[str, LazyArray], default: str) -> np.dtype:
    """The dtype of floats that are stored in another form: that of the config.json, or of the first array of floats."""
    named = [config.extra.get("dtype"), config.extra.get("torch_dtype"), *(a.dtype.name for a in arrays.values())]
    return little_endian(next((name for name in named if name in _FLOATS), default))


def _cast(array: LazyArray, target: str) -> LazyArray:
    dtype: np.dtype = little_endian(target)
    return LazyArray(array.shape, dtype, lambda index: array.read(index).astype(dtype), array.chunk)
