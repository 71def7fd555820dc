"""Token ids and masks from outside, on the host: checked before a cast could wrap, cut or round them. No jax."""

from typing import Any

import numpy as np

from opt_jax.system.messages import one_line

LEAST, MOST = -(2**31), 2**31 - 1  # of int32, which models compute with


def as_ids(name: str, value: Any, low: int = LEAST, high: int = MOST) -> np.ndarray:
    """`value`, anything like an array, as int32.

    Raises:
      ValueError: not integers (truth values and whole floats are none), or one of them is outside [low, high].
    """
    ids = as_array(name, value)
    check_integers(name, ids)
    check_range(name, ids, low, high)
    return ids.astype(np.int32, copy=False)


def as_mask(name: str, value: Any) -> np.ndarray:
    """Where `value` is not 0; ValueError as `check_mask`."""
    mask = as_array(name, value)
    check_mask(name, mask)
    return mask != 0


def as_array(name: str, value: Any) -> np.ndarray:
    """`value` as an array of numbers or truth values; ValueError if it is something else."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):  # NumPy would show what the mask hides
        raise ValueError(f"{name} has masked entries: fill them, and give an attention_mask")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: rows have different lengths; pad them and give an attention_mask") from None
    except (TypeError, RuntimeError, NotImplementedError) as error:  # of other libraries, such as torch's bfloat16
        raise ValueError(f"{name} cannot be read as an array: {one_line(error, 200)}") from None
    if array.dtype == np.longdouble:
        raise ValueError(f"{name} must be numbers that JAX has, not {array.dtype}")
    if array.dtype.kind not in "biuf" and array.dtype.isbuiltin != 2:  # 2: added to NumPy's, such as bfloat16
        raise ValueError(f"{name} must be numbers, not {array.dtype}")
    return array


def check_integers(name: str, array: Any) -> None:
    """Of an array of NumPy or JAX. An empty list, which NumPy makes an array of floats, is let through."""
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, not {array.dtype}")


def check_range(name: str, array: Any, low: int = LEAST, high: int = MOST) -> None:
    """Of an array of integers; without a look at them where their dtype says enough."""
    limits = np.iinfo(array.dtype) if array.size else None
    if limits is None or (low <= limits.min and limits.max <= high):
        return
    host = np.asarray(array)  # of JAX: no compilation, and no copy on CPU
    least, most = int(host.min()), int(host.max())
    if least < low or most > high:
        raise ValueError(f"{name} holds {least if least < low else most}, outside [{low}, {high}]")


def check_mask(name: str, mask: np.ndarray) -> None:
    """ValueError for negative numbers and NaN: masks that are added to scores have such, and 0 at real tokens."""
    if mask.dtype != bool and (wrong := ~(mask >= 0)).any():
        raise ValueError(f"{name} holds {mask[wrong][0]}: it must be 1 at real tokens and 0 at pads")
