"""A Hugging Face checkpoint to an Orbax model directory, tensor by tensor, without torch and without a device."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp

import opt_jax.model
from convert import hf
from opt_jax import checkpoint, hub
from opt_jax.config import OPTConfig


class Totals(NamedTuple):
    parameters: int
    bytes: int


def convert(
    source: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, Totals], None] = lambda name, bytes_written, totals: None,
) -> Totals:
    """Write the HF directory `source` as an Orbax model directory, complete or not at all.

    Args:
      dtype: cast to it; default: keep each tensor's own, bit for bit.
      progress: called before each tensor with its name, the bytes written so far and the totals.

    Raises:
      FileNotFoundError: `source` lacks its config or weights.
      FileExistsError: see `checkpoint.new_directory`.
      ValueError: a damaged file, or one tensor too many, too few, misshapen or out of range for `dtype`; names it.
    """
    checkpoint.check_destination(destination, overwrite)
    if hub.is_orbax(source):
        raise ValueError(f"{source} is an Orbax model directory already")
    config = OPTConfig.from_hf(source)
    tensors = hf.open_parameters(source, config)
    expected = checkpoint.expected_shapes(_model_class(config, source), config)
    found = {path: view.shape for path, view in tensors.items()}
    checkpoint.check_parameters(expected, found, source, describe=hf.describe)

    arrays: dict[str, checkpoint.LazyArray] = {}
    written = 0

    def load(path: str, view: np.ndarray, target: np.dtype) -> np.ndarray:
        nonlocal written
        name = hf.describe(path, ())[0]
        progress(name, written, totals)
        tensors.release()
        with np.errstate(over="ignore"):  # reported below
            array = np.array(view, target, order="C")
        if target != view.dtype and (np.isfinite(view) > np.isfinite(array)).any():
            raise ValueError(f"{source}: tensor {name} has values that {target} cannot hold; choose another --dtype")
        written += array.nbytes
        return array

    for path in expected:
        view = tensors[path]
        target = jnp.dtype(dtype or view.dtype)
        if target.name not in checkpoint.PARAM_DTYPES:
            name = hf.describe(path, ())[0]
            raise ValueError(f"{source}: tensor {name} is {target}, which models are not kept in; use --dtype float32")
        lazy = checkpoint.LazyArray(view.shape, target, lambda a=(path, view, target): load(*a))
        arrays[path] = lazy
    sizes = {path: int(np.prod(a.shape)) for path, a in arrays.items()}
    totals = Totals(sum(sizes.values()), sum(sizes[path] * a.dtype.itemsize for path, a in arrays.items()))

    with checkpoint.new_directory(destination, overwrite) as new:
        checkpoint.save_params(new / "params", arrays)
        if written != totals.bytes:
            raise RuntimeError(f"{written} bytes written, not {totals.bytes}")
        if dtype is None:
            shutil.copyfile(source / "config.json", new / "config.json")
        else:
            raw = checkpoint.set_dtype(json.loads((source / "config.json").read_text(encoding="utf-8")), dtype)
            (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        checkpoint.copy_companions(source, new)
    return totals


def _model_class(config: OPTConfig, source: Path) -> type[opt_jax.model.OPTPreTrainedModel]:
    known = ("OPTForCausalLM", "OPTModel", "OPTForSequenceClassification", "OPTForQuestionAnswering")
    names: Any = config.extra.get("architectures") or known[:1]
    if not isinstance(names, (list, tuple)) or len(names) != 1 or names[0] not in known:
        raise ValueError(f"{source}/config.json: architectures={names!r} is not one of {', '.join(known)}")
    return getattr(opt_jax.model, names[0])
