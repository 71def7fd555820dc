"""Axes and heat maps for the `plot` functions beside this file. matplotlib is optional."""

from collections.abc import Sequence
from typing import Any

import numpy as np


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


def printable(text: str) -> str:
    """`text` as matplotlib can show it: control characters as escapes, and no formulas, which "$" begins."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(shown).replace("$", r"\$")


def heatmap(
    values: Any,
    *,
    title: str,
    xlabel: str,
    ylabel: str = "layer",
    columns: Sequence[str] | None = None,
    diverging: bool = False,
    axes: Any = None,
) -> Any:
    """The matplotlib axes with a heat map.

    Args:
      values: [rows, columns]. NaN leaves a cell empty.
      title, xlabel, ylabel: texts.
      columns: a label for each column; the default is its number.
      diverging: whether colours are centred at zero.
      axes: where to draw. None: a new figure of pyplot.

    Raises:
      ValueError: matplotlib is missing, or values have other than two axes.
    """
    values = np.asarray(values, np.float32)
    if values.ndim != 2:
        raise ValueError(
            f"a heat map needs values with two axes, not of shape {values.shape}: choose a row or position"
        )
    if axes is None:
        axes = new_axes()
        width, height = 3 + 0.5 * values.shape[1], 2 + 0.35 * values.shape[0]
        axes.figure.set_size_inches(min(width, 20), min(height, 20))
    limit = float(np.nanmax(np.abs(values))) if diverging else None
    style: dict[str, Any] = dict(cmap="RdBu_r", vmin=-limit, vmax=limit) if limit else dict(cmap="viridis")
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **style)
    axes.figure.colorbar(image, ax=axes)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if columns is not None:
        axes.set_xticks(range(len(columns)), [printable(label) for label in columns], rotation=60, ha="right")
    return axes
