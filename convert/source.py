"""Opens every supported form of checkpoint as a `Checkpoint` of lazy arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opt_jax.checkpoints import hub, pretrained, saving
from opt_jax.checkpoints.arrays import Checks, LazyArray
from opt_jax.checkpoints.formats import hf, peft, peft_merge, quantized
from opt_jax.checkpoints.formats.wrappers import torch_files
from opt_jax.checkpoints.source_files import files_of_model
from opt_jax.config import OPTConfig
from opt_jax.system.messages import shown
from opt_jax.system.reading import note_without_effect

from . import metaseq
from .checkpoint import CLASSES, Checkpoint


def open_source(  # noqa: PLR0913  (options, by keyword)
    names: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    model: str | None = None,
    config: Path | None = None,
    adapter: str | None = None,
    from_metaseq: bool = False,
    verify: bool = True,
    dequantize: bool = False,
    dtype: str | None = None,
) -> Checkpoint:
    """The checkpoint that `names` stand for; no data is read.

    Args:
      names: one name that `hub.resolve` knows, or the files of a metaseq checkpoint (see `metaseq.find_files`).
      revision, cache_dir, offline: how to find a hub id; see `hub.resolve`.
      model: the architecture of a metaseq checkpoint, by the name of a preset.
      config: the same, as a config.json.
      adapter: a PEFT adapter to be merged in: a directory or a hub id.
      from_metaseq: `names` are files of a metaseq checkpoint, whatever they look like.
      verify: compare the data of an Orbax directory with their checksums when they are read.
      dequantize: turn quantized matrices into floats.
      dtype: of what the adapter changes, and of matrices that are dequantized; default: as in the base.

    Raises:
      OSError: there is no such checkpoint, or it cannot be downloaded or read.
      ValueError: a damaged or unsupported checkpoint, or options that do not apply to it.
    """
    if len(names) == 1 and not from_metaseq and not _is_metaseq(names[0]):
        if model is not None or config is not None:
            raise ValueError(f"--model and --config are for metaseq checkpoints, but {names[0]} has its own config")
        if (cache_dir is not None or offline) and is_here(names[0]) and (adapter is None or is_here(adapter)):
            raise ValueError(f"--cache-dir and --offline are for hub ids, but {names[0]} is none")
        directory = hub.resolve(names[0], revision=revision, cache_dir=cache_dir, local_files_only=offline)
        opened = open_directory(directory, verify)
        opened = _dequantized(opened, dtype) if dequantize else opened
        return _adapted(opened, adapter, dtype, cache_dir, offline)
    if dequantize:
        raise ValueError("dequantize=True (--dequantize) is for quantized models, and metaseq's files hold floats")
    if revision is not None or (cache_dir is not None or offline) and (adapter is None or is_here(adapter)):
        raise ValueError("--revision, --cache-dir and --offline are for hub ids, not for metaseq files")
    if model is not None and config is not None:
        raise ValueError("--model and --config both name the architecture: give one of them")

    given = OPTConfig.preset(model) if model is not None else OPTConfig.from_hf(config) if config is not None else None
    opened = metaseq.open_checkpoint(metaseq.find_files(names), config=given)
    return _adapted(opened, adapter, dtype, cache_dir, offline)


def is_here(name: str) -> bool:
    """True for the name of a file, a directory or "tiny"; false for a hub id."""
    return name == "tiny" or hub.is_remote(name) or hub.as_path(name).exists()


def _is_metaseq(name: str) -> bool:
    path = Path(name) if hub.is_remote(name) else hub.as_path(name)
    if path.is_dir():
        known = hub.is_orbax(path) or hf.weight_file(path) is not None or (path / "run.json").is_file()
        other = known or torch_files(path) or hub.shards_hint(path)
        return not other and any(path.glob("*.pt"))
    return path.suffix == ".pt" and path not in torch_files(path.parent) or any(c in name for c in "*?[")


def open_directory(directory: Path, verify: bool = True) -> Checkpoint:
    """The checkpoint in a Hugging Face directory, an Orbax model directory or a checkpoint directory of train.py.

    Args:
      directory: the directory, as `hub.resolve` returns it.
      verify: compare the data of an Orbax directory with their checksums when they are read.

    Raises:
      FileNotFoundError: the config or weights are missing.
      ValueError: a damaged file, or a tensor that no OPT model has. (`Checkpoint.check` finds what else is wrong.)
    """
    files = files_of_model(directory)
    config, raw = pretrained.read_config(directory)
    orbax = hub.is_orbax(directory)
    arrays, checks = pretrained.open_parameters(directory, config, verify)
    cls, notes = model_class(config, arrays, directory)
    trained = orbax and not (directory / "config.json").is_file()
    if trained:  # a run that began from a float16 checkpoint keeps its config, but its parameters are float32
        raw = saving.set_dtype(raw, next(iter(arrays.values())).dtype.name)
    kind = "checkpoint of train.py" if trained else "Orbax model directory"
    return Checkpoint(
        where=directory,
        format=(kind if orbax else hf.weights_form(directory)) + _bits(arrays),
        config=config,
        raw_config={**raw, "architectures": [cls]},
        arrays=arrays,
        companions=hub.companion_directories(directory),
        checks=(*checks, *notes),
        files=files,
    )


def _bits(arrays: Mapping[str, LazyArray]) -> str:
    bits = sorted({array.bits for array in quantized.quantized_of(arrays).values()})
    return f", quantized to {' and '.join(map(str, bits))} bits" if bits else ""


def _dequantized(opened: Checkpoint, dtype: str | None) -> Checkpoint:
    """The checkpoint with floats in place of quantized matrices, which are computed when they are read."""
    arrays, config = quantized.dequantized(opened.arrays, opened.config, dtype, opened.where)
    raw = quantized.with_settings(opened.raw_config, None)
    return dataclasses.replace(
        opened, format=f"{opened.format}, dequantized", config=config, raw_config=raw, arrays=arrays
    )


def _adapted(
    base: Checkpoint, name: str | None, dtype: str | None, cache_dir: Path | None, offline: bool
) -> Checkpoint:
    """The checkpoint with an adapter merged in, which happens when its arrays are read."""
    if name is None:
        return base
    quantized.refuse(base.arrays, base.where, "an adapter", "pass --dequantize")
    directory = hub.resolve_adapter(name, cache_dir=cache_dir, local_files_only=offline)
    base.files.add(peft.files_of_adapter(directory))
    adapter, before = peft.open_adapter(directory), base.config.to_hf()
    base_cls = base.raw_config["architectures"][0]
    cls = adapter.head_class(base_cls)
    arrays, config = adapter.onto(base.arrays, base.config, base.where, causal=cls == "OPTForCausalLM", dtype=dtype)
    if cls != base_cls:  # without the head of the base
        heads = tuple(f"{head}." for name, head in peft_merge.CLASSES.values() if name != cls)
        arrays = {path: array for path, array in arrays.items() if not path.startswith(heads)}
    changed = {name: value for name, value in config.to_hf().items() if before[name] != value}
    return dataclasses.replace(
        base,
        format=f"{base.format}, with the adapter {name}",
        config=config,
        raw_config={**base.raw_config, **changed, "architectures": [cls]},
        arrays=arrays,
        checks=(*base.checks, *adapter.notes),
    )


def model_class(config: OPTConfig, arrays: Mapping[str, LazyArray], where: Path) -> tuple[str, Checks]:
    """The class that the config names, and checks that warn of a name that is not one of ours.

    If the config names none of ours (older fine-tunes; code that builds on OPT), it is the class with these heads.

    Raises:
      ValueError: `architectures` is not a list of names.
    """
    named: Any = config.extra.get("architectures") or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, (list, tuple)) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{where}/config.json: architectures={shown(named)} must be a list of names")
    if known := [name for name in named if name in CLASSES]:
        return known[0], ()
    cls = "OPTForQuestionAnswering" if "qa_outputs.kernel" in arrays else "OPTForCausalLM"
    cls = "OPTForSequenceClassification" if "score.kernel" in arrays else cls
    fields = {"architectures": ((), f"none of {', '.join(CLASSES)}, so it is read as {cls}")}
    return cls, (partial(note_without_effect, f"{where}/config.json", {"architectures": named or None}, fields),)
