"""Token ids and masks from callers, checked on the host before a cast could change their values. No JAX."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from opt_jax.system.messages import one_line

LEAST, MOST = -(2**31), 2**31 - 1  # the range of int32, the dtype of ids in models


def as_ids(name: str, value: Any, low: int = LEAST, high: int = MOST) -> np.ndarray:
    """`value`, an array or nested lists, as an int32 array.

    Raises:
      ValueError: the dtype is not an integer (booleans and floats are refused), or a value is outside [low, high].
    """
    ids = as_array(name, value)
    check_integers(name, ids)
    check_range(name, ids, low, high)
    return ids.astype(np.int32, copy=False)


def as_mask(name: str, value: Any) -> np.ndarray:
    """A boolean array, true where `value` is not 0; ValueError as in `check_mask`."""
    mask = as_array(name, value)
    check_mask(name, mask)
    return mask != 0


def as_array(name: str, value: Any) -> np.ndarray:
    """`value` as an array of numbers or booleans; ValueError if it is none."""
    if isinstance(value, Mapping):
        raise ValueError(f"{name} must be an array, not a {type(value).__name__}: pass its input_ids, or **inputs")
    if isinstance(value, str):
        raise ValueError(f"{name} must be ids, not text: pass what a tokenizer makes of it, **tokenizer(text)")
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):  # asarray would expose the masked values
        raise ValueError(f"{name} has masked entries: fill them, and give an attention_mask")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: rows have different lengths; pad them and give an attention_mask") from None
    except (TypeError, RuntimeError, NotImplementedError) as error:  # as for torch's bfloat16
        raise ValueError(f"{name} cannot be read as an array: {one_line(error, 200)}") from None
    if array.dtype == np.longdouble:
        raise ValueError(f"{name} must be numbers that JAX has, not {array.dtype}")
    if array.dtype.kind not in "biuf" and array.dtype.isbuiltin != 2:  # 2: as bfloat16 of ml_dtypes
        raise ValueError(f"{name} must be numbers, not {array.dtype}")
    return array


def check_integers(name: str, array: Any) -> None:
    """ValueError if an array does not hold integers. Empty arrays pass, because NumPy reads [] as floats."""
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, not {array.dtype}")


def check_range(name: str, array: Any, low: int = LEAST, high: int = MOST) -> None:
    """ValueError if an integer is outside [low, high]. Reads no values if the range of the dtype is within."""
    limits = np.iinfo(array.dtype) if array.size else None
    if limits is None or (low <= limits.min and limits.max <= high):
        return
    host = np.asarray(array)  # reductions in NumPy compile no program; on CPU this copies nothing
    least, most = int(host.min()), int(host.max())
    if least < low or most > high:
        raise ValueError(f"{name} holds {least if least < low else most}, outside [{low}, {high}]")


def check_mask(name: str, mask: np.ndarray) -> None:
    """ValueError for negative numbers and NaN, as in additive masks, which have 0 at real tokens."""
    if mask.dtype != bool and (wrong := ~(mask >= 0)).any():
        raise ValueError(f"{name} holds {mask[wrong][0]}: it must be 1 at real tokens and 0 at pads")
