"""What a compression does: its method and options, checked. No jax arrays."""

import dataclasses
import operator
import re
from collections.abc import Mapping
from typing import Any

from opt_jax.compression.grid import Grid
from opt_jax.compression.pruning import Sparsity, check_sparsity
from opt_jax.compression.smoothquant import check_norms
from opt_jax.config import OPTConfig

_GRID = ("bits", "group_size", "symmetric")
_SAMPLES = ("calibration", "samples", "window", "seed", "rows", "text_key", "dtype")
_SEQUENTIAL = ("true_sequential", *_SAMPLES)
_INTEGERS = ("bits", "group_size", "samples", "window", "seed")
# Method -> the options that have an effect on it. With `calibration` it needs calibration samples.
OPTIONS: dict[str, tuple[str, ...]] = {
    "rtn": _GRID,
    "gptq": (*_GRID, "act_order", "damping", *_SEQUENTIAL),
    "awq": (*_GRID, *_SAMPLES),
    "smoothquant": ("alpha", *_SAMPLES),
    "magnitude": ("sparsity",),
    "wanda": ("sparsity", *_SEQUENTIAL),
    "sparsegpt": ("sparsity", *_GRID, "damping", *_SEQUENTIAL),
}
DEFAULTS = {"bits": 4, "damping": 0.01, "alpha": 0.5, "sparsity": 0.5}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method and its options; those without effect are None or False.

    Attributes:
      method: a key of OPTIONS.
      bits: of the weights.
      group_size: the inputs that share a scale; None: all inputs of an output.
      symmetric: no zeros: the middle of the integers means 0.
      act_order: GPTQ's: the inputs with the largest activations first.
      true_sequential: statistics of a matrix come from inputs that the compressed matrices before it in the same layer
        have made.
      damping: see `gptq`.
      alpha: SmoothQuant's migration strength.
      sparsity: the share of weights that become 0, or (n, m): n of each m.
    """

    method: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    act_order: bool = False
    true_sequential: bool = False
    damping: float | None = None
    alpha: float | None = None
    sparsity: Sparsity | None = None

    @property
    def grid(self) -> Grid | None:
        """The grid of the weights; None: they are not quantised."""
        return None if self.bits is None else Grid(self.bits, self.group_size, self.symmetric)

    @property
    def needs_samples(self) -> bool:
        """Whether the method looks at activations."""
        return "calibration" in OPTIONS[self.method]

    @property
    def after_compressed(self) -> bool:
        """Whether samples pass through the compressed layers. In the code of AWQ and SmoothQuant they do not."""
        return self.needs_samples and self.method not in ("awq", "smoothquant")

    def check_model(self, config: OPTConfig) -> None:
        """Raise ValueError if a model's matrices have no such groups or patterns, or its LayerNorms take no scales."""
        if self.method in ("awq", "smoothquant"):
            check_norms(config)
        for inputs in (config.hidden_size, config.ffn_dim):
            if self.grid is not None:
                self.grid.size(inputs)
            if self.sparsity is not None:
                check_sparsity(self.sparsity, inputs)

    def described(self) -> dict[str, Any]:
        """Its method and the options that have an effect, for JSON."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, False)}
        if isinstance(self.sparsity, tuple):
            options["sparsity"] = "{}:{}".format(*self.sparsity)
        return options


def make_recipe(method: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a method and the options of `compress`. None and False are options that were not given.

    Raises:
      ValueError: an unknown method, an option that has no effect on it or is missing, or a value out of range.
    """
    if method not in OPTIONS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(OPTIONS)}")
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    known = OPTIONS[method]
    for name in given:
        if name not in known:
            raise ValueError(f"{name} without effect: {method} has no such option; it has {', '.join(known)}")
    if "calibration" in known and "calibration" not in given:
        raise ValueError(f"{method} needs calibration: name a text, as in --calibration FILE")
    if method == "sparsegpt" and "bits" not in given:
        if name := next((name for name in _GRID if name in given), None):
            raise ValueError(f"{name} without effect: it goes with bits, by which sparsegpt also quantises")
    given |= {name: _integer(name, given[name]) for name in _INTEGERS if name in given}
    fields = {field.name for field in dataclasses.fields(Recipe)}
    for name, value in DEFAULTS.items():
        if name in known and not (method == "sparsegpt" and name == "bits"):
            given.setdefault(name, value)
    if "sparsity" in given:
        given["sparsity"] = _sparsity(given["sparsity"])
    for name, high in (("damping", float("inf")), ("alpha", 1.0)):
        if name in given and not 0 < given[name] < high:
            raise ValueError(f"{name} is {given[name]}: it must be above 0" + (" and below 1" if high == 1 else ""))
    if method == "smoothquant":
        given |= dict(bits=8, symmetric=True)
    recipe = Recipe(method, **{name: value for name, value in given.items() if name in fields})
    recipe.grid  # noqa: B018  (its errors)
    return recipe


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}: it must be an integer") from None


def _sparsity(value: Any) -> Sparsity:
    """0.5, "0.5", "2:4" or (2, 4) as a share or a pair."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", value)
        try:
            value = (int(match[1]), int(match[2])) if match else float(value)
        except ValueError:
            raise ValueError(f"sparsity {value!r}: give a share such as 0.5, or n:m such as 2:4") from None
    return tuple(value) if isinstance(value, list) else value
