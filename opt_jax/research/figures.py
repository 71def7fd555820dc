"""Axes for the pictures of this room. matplotlib is optional."""

from typing import Any


def new_axes(axes: Any = None) -> Any:
    """`axes`, or if it is None those of a new figure.

    Raises:
      ValueError: matplotlib is missing.
    """
    if axes is not None:
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError(f"plot needs the package matplotlib ({error}): pip install matplotlib") from None
    return plt.subplots(layout="constrained")[1]
