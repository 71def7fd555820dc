"""Undoes what training code puts around a model: prefixes of its tensors' names, and other names of its file."""

import re
import warnings
from collections.abc import Collection
from functools import partial
from pathlib import Path

from opt_jax.checkpoints.arrays import Checks, LazyArray
from opt_jax.checkpoints.formats.mapped_files import shown
from opt_jax.checkpoints.formats.torch_files import TorchFile
from opt_jax.system.reading import read_small

# DDP and DeepSpeed, torch.compile, FSDP of torch and its older versions, activation checkpointing, Lightning.
_WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
_ANCHOR = "decoder.embed_positions.weight"  # every OPT model has it
_CAST_HEAD = "lm_head.0."  # peft's CastOutputToFloat is a Sequential around the head


def without_wrappers(names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Name -> name of a tensor without the modules that DDP, FSDP, torch.compile, ... add; the prefixes so removed."""
    plain, wrappers = {}, set[str]()
    for name in names:
        *modules, last = name.split(".")
        wrappers.update(part for part in modules if part in _WRAPPERS)
        plain[name] = ".".join([*(part for part in modules if part not in _WRAPPERS), last])
    return plain, [f"{part}." for part in _WRAPPERS if part in wrappers]


def note_of_prefixes(where: object, prefixes: Collection[str]) -> Checks:
    """A function that warns of the prefixes that were removed; none without any."""
    text = f"{where}: left out: {', '.join(map(repr, prefixes))} in the names of its tensors"
    return (partial(warnings.warn, text, stacklevel=2),) if prefixes else ()


def plain_names(names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The names of tensors without the prefixes of wrappers, and of modules that hold the whole model.

    A module such as `transformer.` or `base_model.model.` is recognised by the model's position embedding. What is not
    in it keeps its name.

    Returns:
      Name -> name without them; the prefixes.

    Raises:
      ValueError: there are several models.
    """
    plain, removed = without_wrappers(names)
    bases = {name.removesuffix(_ANCHOR) for name in plain.values() if f".{name}".endswith(f".{_ANCHOR}")}
    if bases and not bases & {"", "model."}:  # else the model is where it should be
        if len(bases) > 1:
            places = ", ".join(sorted(map(shown, bases)))
            raise ValueError(f"its tensors are those of several models, under {places}: keep those of one")
        (base,) = bases
        outer = base.removesuffix("model.") if base.endswith(".model.") else base
        removed.append(outer)
        for name, without in plain.items():
            in_decoder = without.startswith(f"{base}decoder.")
            plain[name] = "model." + without.removeprefix(base) if in_decoder else without.removeprefix(outer)
    for name, without in plain.items():
        if without.startswith(_CAST_HEAD):
            plain[name] = "lm_head." + without.removeprefix(_CAST_HEAD)
    return plain, removed


def is_no_weight(name: str, array: LazyArray) -> bool:
    """Whether a tensor that OPT does not have may be left out: a buffer, or what stands outside of OPT's modules.

    A tensor of numbers inside of them would be a weight, so the model is not the one that the config describes.
    """
    outside = name.split(".")[0] not in ("model", "decoder", "lm_head", "score", "qa_outputs")
    is_buffer = name.endswith((".position_ids", ".num_updates")) or not array.shape or array.dtype.kind in "biu"
    return outside or is_buffer


# Files ------------------------------------------------------------------------------------------------------

_MODEL_STATES = "mp_rank_00_model_states.pt"
_NAMED = ("pytorch_model_fsdp.bin", _MODEL_STATES)  # accelerate's, DeepSpeed's
_BESIDE = re.compile(r"optimizer|optim_states|model_states|scheduler|scaler|rng_state|random_states|training_args")
_OF_BASE = re.compile(r"(^|\.)flat_param_|^decoder\.")  # Hugging Face's base model has such names, too
_OF_METASEQ = re.compile(r"(^|\.)flat_param_|\.qkv_proj\.|^decoder\.(layer_norm|project_in_dim|project_out_dim)\.")


def torch_files(directory: Path) -> list[Path]:
    """The files in a directory with a config.json that may hold its model under the names that training code gives.

    A file of metaseq is none.
    """
    if not (directory / "config.json").is_file():
        return []
    for place in (directory, directory / _latest(directory)):
        for name in _NAMED:
            if (place / name).is_file() and not (place / "mp_rank_01_model_states.pt").is_file():
                return [place / name]
    suffixes = (".pt", ".pth", ".ckpt")
    paths = sorted(path for path in directory.iterdir() if path.suffix in suffixes and path.is_file())
    paths = [path for path in paths if not _BESIDE.search(path.name)]
    return [] if paths and is_metaseq(paths[0]) else paths


def _latest(directory: Path) -> str:
    """DeepSpeed's file with the name of the newest checkpoint below the directory."""
    if not (directory / "latest").is_file():
        return ""
    name = read_small(directory / "latest", 1000).decode("utf-8", "replace").strip()
    return name if re.fullmatch(r"[\w-][\w.-]*", name) else ""


def is_metaseq(path: Path) -> bool:
    """Whether the file is one of metaseq's, by its settings and the names of its tensors; False if it is damaged."""
    try:
        content = TorchFile(path, stubs=True).content
    except (OSError, ValueError):
        return False
    model = content.get("model", content) if isinstance(content, dict) else None
    names = [name for name in model if isinstance(name, str)] if isinstance(model, dict) else []
    noted = isinstance(content, dict) and ("cfg" in content or "shard_metadata" in content)
    return any((_OF_BASE if noted else _OF_METASEQ).search(name) for name in names)
