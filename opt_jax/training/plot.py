"""Draws the curves of training runs from their `metrics.jsonl`."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from opt_jax.system.temporary import check_new_file, write_file
from opt_jax.training import files, goodput

# Title, scale, and the curves: (name in metrics.jsonl, matplotlib's options).
PANELS: tuple[tuple[str, str, tuple[tuple[str, dict[str, Any]], ...]], ...] = (
    ("loss", "linear", (("loss", dict(linewidth=0.8, alpha=0.6)), ("val_loss", dict(linestyle="--", marker="o")))),
    ("learning rate", "linear", (("lr", {}),)),
    ("gradient norm", "log", (("grad_norm", dict(linewidth=0.8)),)),
    ("tokens/s", "linear", (("tokens_per_s", dict(linewidth=0.8)),)),
)
# In place of tokens/s, if one of the runs is a fine-tuning task.
MEASURES: tuple[str, str, tuple[tuple[str, dict[str, Any]], ...]] = (
    "on held-out examples: accuracy, F1, exact match",
    "linear",
    (("val_accuracy", dict(marker="o")), ("val_f1", dict(marker="o")), ("val_exact_match", dict(marker="x"))),
)

_PNG = b"\x89PNG\r\n\x1a\n"


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The values in each line of a run's `metrics.jsonl`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no line; or see `files.read_metrics`.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {run}: is it the --output of a training run?")
    lines = [values for _, values in files.read_metrics(epath.Path(path))]
    if not lines:
        raise ValueError(f"{path} is empty: no step was done yet")
    return lines


def plot_runs(runs: Sequence[Path], output: Path) -> None:
    """Draw the curves of runs as a PNG: loss and perplexity, learning rate, gradient norm, tokens/s.

    If one of them is a fine-tuning task, its measures replace perplexity and tokens/s.

    Args:
      output: the PNG; an existing one is replaced.

    Raises:
      FileNotFoundError, ValueError: see `metrics_of`; or matplotlib is missing.
      FileExistsError: `output` exists and is not a PNG; or see `temporary.check_new_file`.
    """
    figure = new_figure("plot", 12, 7)
    measured = [(run, metrics_of(run)) for run in runs]
    check_picture(output)
    names = {name for _, lines in measured for line in lines for name in line}
    panels = (*PANELS[:3], MEASURES) if names & {name for name, _ in MEASURES[2]} else PANELS

    for axes, (title, scale, curves) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for i, (run, lines) in enumerate(measured):
            for name, style in curves:
                points = [(line["step"], line[name]) for line in lines if name in line]
                if points:
                    # NaN and infinity are null in the file, and a gap in the curve.
                    values = [math.nan if value is None else value for _, value in points]
                    label = (run.name or Path.cwd().name).replace("$", r"\$")  # Path(".") has no name; "$" is a formula
                    label += ", validation" if name == "val_loss" else ""
                    if name == "loss" and (summary := goodput.goodput(lines)) is not None:
                        label += f", goodput {summary.share:.0%}"
                    axes.plot([step for step, _ in points], values, color=f"C{i}", label=label, **style)
        axes.set(title=title, xlabel="step", yscale=scale)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    if panels is PANELS:
        right = figure.axes[0].secondary_yaxis("right")  # the ticks of the loss, labelled with perplexities
        right.set_ylabel("perplexity")
        right.yaxis.set_major_formatter(lambda loss, _: f"{math.exp(min(loss, 99)):,.{0 if loss > 5 else 2}f}")
    write_picture(figure, output)


def new_figure(command: str, width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches.

    Raises:
      ValueError: matplotlib is missing, which `command` needs.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"{command} needs the package matplotlib ({error}): pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_picture(path: Path) -> None:
    """Check that a picture can be written, as `temporary.check_new_file` does; an existing one must be a PNG."""
    check_new_file(path, lambda content: content.startswith(_PNG), "a PNG")


def write_picture(figure: Any, path: Path) -> None:
    """Write a figure as a PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())
