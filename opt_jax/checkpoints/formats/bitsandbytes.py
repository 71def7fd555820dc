"""bitsandbytes' checkpoints of 8 bits: X.weight int8 [N, K] and X.SCB float32 [N], for weight * SCB / 127.

LLM.int8 computes the inputs that hold outliers in float16, with these weights, and rounds the other inputs to int8.
Here all inputs meet the dequantized weights, so outputs agree but for that rounding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.chunks import Index
from opt_jax.checkpoints.formats import quantized
from opt_jax.system.messages import shown


def is_supported(settings: Mapping[str, Any]) -> bool:
    """Whether these settings of bitsandbytes are those of int8."""
    return settings.get("load_in_8bit") is True and not settings.get("load_in_4bit")


def gather(stored: Mapping[str, LazyArray], where: Path, dtype: np.dtype) -> dict[str, LazyArray]:
    """The tensors, with a `QuantizedArray` X.weight [K, N] in place of the int8 matrix X.weight and X.SCB.

    Args:
      stored: name in the file -> tensor.
      where: the directory, for messages.
      dtype: of the dequantized matrices.

    Raises:
      ValueError: a tensor that is missing or does not fit.
    """
    gathered = dict(stored)
    for name in stored:
        base, _, part = name.rpartition(".")
        if part != "SCB":
            continue
        label, weight, scb = f"{where}: tensor {shown(base)}", gathered.get(f"{base}.weight"), gathered.pop(name)
        if weight is None or weight.dtype != np.int8 or len(weight.shape) != 2:
            raise ValueError(f"{label}.weight is no matrix of int8, but {shown(name)} is there")
        if scb.dtype != np.float32 or scb.shape != weight.shape[:1]:
            raise ValueError(f"{label}.SCB is {scb.dtype.name} {scb.shape}, not float32 {weight.shape[:1]}")
        layout = gathered.pop(f"{base}.weight_format", None)
        if layout is not None and (layout.size != 1 or layout.load().reshape(-1)[0] != 0):
            raise ValueError(f"{label}.weight_format is not 0, that of rows: save it with bitsandbytes 0.43 or later")
        scale = LazyArray((*scb.shape, 1), scb.dtype, lambda index, scb=scb: _scale(scb, index))
        gathered[f"{base}.weight"] = quantized.int8({"weight": weight, "scale": scale}, True, dtype)
    return gathered


def _scale(scb: LazyArray, index: Index) -> np.ndarray:
    return (scb.read(index[:1]) / np.float32(127)).reshape([s.stop - s.start for s in index])
