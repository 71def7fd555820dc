"""A series of checkpoints of one architecture: finds them, keeps one compiled program, and draws the curve."""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from opt_jax.checkpoints import hub, pretrained, saving
from opt_jax.config import OPTConfig
from opt_jax.system.disk import error_line
from opt_jax.text.tokenizer import OPTTokenizer
from opt_jax.training import plot

# Models of one series have these fields equal. The others do not change what is measured.
_COMPARED = [
    field.name
    for field in dataclasses.fields(OPTConfig)
    if "drop" not in field.name and field.name not in ("extra", "init_std")
]


class Checkpoint(NamedTuple):
    """A checkpoint of a series: its directory, and its step if the names in the series tell the steps."""

    path: Path
    step: int | None


def find(name: str) -> list[Checkpoint]:
    """The checkpoints in a directory, in the order of the numbers in their names.

    Args:
      name: a run of train.py, its `checkpoints` or `best`, or a directory whose sub-directories are models. (Those that
        hold neither weights nor a config.json are passed over.)

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: there is no checkpoint in it, or it is a single model.
    """
    directory = hub.as_path(name)
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {name!r}: --all-checkpoints is for a run, or a directory of models")
    paths = hub.steps_of_run(directory)
    if paths is None:
        if (directory / "config.json").is_file() or hub.is_model(directory):
            raise ValueError(f"{name} is a single model: leave out --all-checkpoints, or name the directory above it")
        paths = sorted(filter(_looks_like_a_model, directory.iterdir()), key=hub.by_number)
    if not paths:
        raise ValueError(f"{name} holds no checkpoints: --all-checkpoints is for a run, or a directory of models")
    numbers = [re.findall(r"\d+", path.name) for path in paths]
    steps = [int(parts[-1]) if parts else -1 for parts in numbers]
    known = steps[0] >= 0 and all(a < b for a, b in zip(steps, steps[1:], strict=False))
    return [Checkpoint(path, step if known else None) for path, step in zip(paths, steps, strict=True)]


def _looks_like_a_model(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_dir():
        return False
    return any(hub.is_model_file(file.name) and file.name not in hub.COMPANION_FILES for file in path.iterdir())


def common_config(checkpoints: Sequence[Checkpoint]) -> OPTConfig | None:
    """The config of the first checkpoint that has a readable one.

    Raises:
      ValueError: another one describes another architecture.
    """
    first = config = None
    for checkpoint in checkpoints:
        try:
            other, _ = pretrained.read_config(checkpoint.path)
        except (OSError, ValueError):  # reported when the checkpoint is loaded
            continue
        first, config = first or checkpoint, config or other
        for name in _COMPARED:
            a, b = getattr(config, name), getattr(other, name)
            if a != b:
                raise ValueError(
                    f"--all-checkpoints: {name} is {a} in {first.path}, but {b} in {checkpoint.path}: a series has one "
                    "architecture"
                )
    return config


def picture(name: str, given: Path | None) -> Path:
    """The file of the curve, after checks that it can be written.

    Args:
      name: the directory of the checkpoints.
      given: the file that the user names, if any.

    Raises:
      ValueError: the directory is not on this machine, and no file is named; or matplotlib is missing.
      OSError: see `plot.check_picture`.
    """
    if given is None and hub.is_remote(name):
        raise ValueError(f"{name} is not on this machine: say where the picture is to be, with --plot FILE.png")
    path = hub.as_path(name) / "evaluation.png" if given is None else given
    plot.new_figure("--all-checkpoints", 1, 1)
    plot.check_picture(path)
    return path


class Failures:
    """Reports checkpoints that cannot be measured, each in one line on stderr."""

    def __init__(self, program: str) -> None:
        self._program = program
        self.lines: dict[Checkpoint, str] = {}

    def attempt(
        self, checkpoint: Checkpoint, action: Callable[[], Any], errors: Any = (OSError, ValueError)
    ) -> Any | None:
        """What `action` returns, or None after one of the `errors`. In a job of several processes, it ends the job."""
        try:
            return action()
        except errors as error:
            if jax.process_count() > 1:
                raise
            line = error_line(error)
            line = line if str(checkpoint.path) in line else f"{checkpoint.path}: {line}"
            print(f"{self._program}: error: {line}", file=sys.stderr, flush=True)
            self.lines[checkpoint] = line
            return None


class Tokenizers:
    """Loads the tokenizers of a series. Checkpoints with the same files get the same object."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] | None = None
        self._tokenizer: Any = None

    def of(self, checkpoint: Checkpoint) -> OPTTokenizer:
        files = saving.read_companions(hub.companion_directories(checkpoint.path))
        if files != self._files:
            self._tokenizer, self._files = OPTTokenizer.from_pretrained(checkpoint.path), files
        return self._tokenizer


class OneProgram:
    """Gives the models of a series the static attributes of the first one, so that they share its compiled programs.

    (A model's name and the fields of its config that are not its architecture are a part of what JAX compiles for.)
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, Any] = {}  # dtype of the computation, generation_config.json -> static attributes

    def of(self, model: Any) -> Any:
        """The model, which must not be used any more, with the static attributes of the first model like it."""
        graph = self._graphs.setdefault((model.dtype, model.generation_config_json), nnx.graphdef(model))
        return nnx.merge(graph, nnx.state(model))


# What is shown ------------------------------------------------------------------------------------------------


def measures(report: dict[str, Any]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """(kind, protocol or task) -> (value, standard error) of a report of `opt-jax eval`."""
    values = {}
    if isinstance(report["results"], list):
        for result in report["results"]:
            for kind in ("loss", "perplexity"):
                values[kind, result["protocol"]] = result[kind], result[f"{kind}_stderr"]
        return values
    for task, result in report["results"].items():
        for key, value in result.items():
            metric, comma, choice = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, Real):
                error = result.get(f"{metric}_stderr,{choice}")
                kind = metric if choice == "none" else f"{metric} ({choice})"
                values[kind, task] = float(value), float(error) if isinstance(error, Real) else None
    return values


def rows(reports: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A table of all measures, one row for each checkpoint; the first row has the names of the columns."""
    names = list(dict.fromkeys(name for report in reports if "results" in report for name in measures(report)))
    table: list[tuple[str, ...]] = [("checkpoint", *(f"{label} {kind}" for kind, label in names))]
    for report in reports:
        values = measures(report) if "results" in report else {}
        table.append((report["checkpoint"], *(_cell(name, *values.get(name, (None, None))) for name in names)))
    return table


def _cell(name: tuple[str, str], value: float | None, error: float | None) -> str:
    digits = 3 if name[0] == "perplexity" else 4
    return "-" if value is None else f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def draw(reports: Sequence[dict[str, Any]], title: str, output: Path) -> None:
    """Draw each measure over the steps as a PNG; an existing one is replaced.

    Args:
      reports: of the checkpoints. Those with an error are left out.
      title: of the picture.
      output: the PNG.
    """
    points = [(report, measures(report)) for report in reports if "results" in report]
    kinds = list(dict.fromkeys(kind for _, values in points for kind, _ in values))
    figure = plot.new_figure("--all-checkpoints", 6 * len(kinds), 4.5)
    figure.suptitle(title.replace("$", r"\$"))  # "$" begins a formula
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False).flat, kinds, strict=True):
        for label in dict.fromkeys(label for _, values in points for other, label in values if other == kind):
            here = [(report, *values[kind, label]) for report, values in points if (kind, label) in values]
            steps = [report["checkpoint"] if report["step"] is None else report["step"] for report, *_ in here]
            (line,) = axes.plot(steps, [value for _, value, _ in here], marker="o", label=label)
            low, high = ([value + sign * (error or 0) for _, value, error in here] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)  # one standard error
        stepped = all(report["step"] is not None for report, _ in points)
        axes.set(
            title=kind, xlabel="step" if stepped else "checkpoint", yscale="log" if kind == "perplexity" else "linear"
        )
        low, high = axes.get_ylim()
        digits = "25" if high > 10 * low > 0 else "123456789"  # labels of a scale of several decades would overlap
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")  # not powers of ten
        axes.yaxis.set_minor_formatter(
            lambda value, _, digits=digits: f"{value:,.4g}" if f"{value:e}"[0] in digits else ""
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    plot.write_picture(figure, output)
