"""The files of LoRA adapters of PEFT: `adapter_config.json` and `adapter_model.safetensors` or `.bin`.

Names of tensors are those of the base after `base_model.model.`. `peft_merge.py` merges an adapter into its base.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats import names
from opt_jax.checkpoints.formats.mapped_files import shown
from opt_jax.checkpoints.formats.peft_merge import ADAPTED, CLASSES, EMBEDDING, Adapter, Pair
from opt_jax.checkpoints.formats.safetensors import read_safetensors
from opt_jax.checkpoints.formats.stored import open_tensor
from opt_jax.checkpoints.formats.torch_files import read_torch
from opt_jax.checkpoints.formats.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from opt_jax.checkpoints.formats.wrappers import note_of_prefixes, without_wrappers
from opt_jax.model.lora import LoRA
from opt_jax.system.reading import json_object, read_small

_PREFIX = "base_model.model."
_READ = frozenset(
    "r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules modules_to_save "
    "layers_to_transform ensure_weight_tying".split()
)
# They say how the adapter was made, or what happens in training. PEFT uses `fan_in_fan_out` for GPT-2's layers only.
_WITHOUT_EFFECT = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout bias "
    "fan_in_fan_out init_lora_weights megatron_core eva_config corda_config loftq_config lora_ga_config "
    "qalora_group_size runtime_config".split()
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
_LONGEST_PATTERN = 10_000


# Reading ----------------------------------------------------------------------------------------------------


def files_of_adapter(directory: Path) -> list[Path]:
    """What may be read of an adapter: its configuration, then its weights in one of their forms."""
    return [directory / name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)]


def open_adapter(directory: Path) -> Adapter:
    """The adapter in a directory, as `hub.resolve_adapter` returns it.

    Nothing but its description is read on a disk. From an object store all of it comes into memory.

    Raises:
      FileNotFoundError: the directory lacks a file.
      ValueError: a damaged file, a kind of adapter or an option that is not supported, a tensor that has no place in an
        OPT model, or half of a pair.
    """
    path, *weights = files_of_adapter(directory)
    if not path.is_file():
        raise FileNotFoundError(f"no PEFT adapter at {path}")
    settings = json_object(read_small(path), path)
    _check_settings(settings, path)
    where = next((file for file in weights if file.is_file()), None)
    if where is None:
        raise FileNotFoundError(f"{directory} has no weights: none of {', '.join(ADAPTER_WEIGHTS)}")
    tensors = read_safetensors(where) if where.suffix == ".safetensors" else read_torch(where)
    arrays = {name: open_tensor(where, tensors.map, view) for name, view in tensors.items()}
    halves: dict[str, dict[str, LazyArray]] = {}
    replaced: dict[str, LazyArray] = {}
    prefix = "model."
    plain, wrappers = without_wrappers(arrays)
    for name, array in arrays.items():
        key = plain[name].removeprefix(_PREFIX)
        prefix = "" if key.startswith("decoder.") else prefix
        if array.dtype.name not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"{where}: tensor {shown(name)} is {array.dtype.name}, not a floating point number")
        try:
            path, part = _place(key)
        except KeyError:
            raise ValueError(f"{where}: tensor {shown(name)} has no place in an OPT model") from None
        place, slot = (halves.setdefault(path, {}), part) if part else (replaced, path)
        if slot in place:
            raise ValueError(f"{where}: tensor {shown(name)} is there twice")
        place[slot] = array if part is None and not names.to_hf(path)[1] else array.T
    if not arrays:
        raise ValueError(f"{where} holds no tensors")
    opened = Adapter(where, settings, {}, replaced, prefix, note_of_prefixes(where, wrappers))
    pairs = {path: _pair(opened, path, half) for path, half in halves.items()}
    return dataclasses.replace(opened, pairs=pairs)


def _place(key: str) -> tuple[str, str | None]:
    """A tensor's name -> (path of the parameter that it belongs to, "A" or "B" for half of a pair). KeyError: none."""
    if match := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", key):
        module, embedding, part, weight = match.groups()
        path = names.from_hf(f"{module}.weight")[0]
        if (path == EMBEDDING) != bool(embedding) or bool(embedding) == bool(weight) or not path.endswith(ADAPTED):
            raise KeyError(key)
        return path, part
    return names.from_hf(key.replace(".base_layer.", "."))[0], None


def _pair(opened: Adapter, path: str, half: Mapping[str, LazyArray]) -> Pair:
    module, settings, where = opened.module_name(path), opened.settings, opened.where
    for part, other in ("AB", "BA"):
        if part not in half:
            raise ValueError(f"{where}: the pair of {module} has no lora_{part}, only lora_{other}")
    a, b = half["A"], half["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or not 0 < a.shape[1] == b.shape[0]:
        raise ValueError(f"{where}: lora_A {a.shape[::-1]} and lora_B {b.shape[::-1]} of {module} are no pair")
    rank = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
    if a.shape[1] != rank:
        raise ValueError(f"{where}: the pair of {module} has rank {a.shape[1]}, but {ADAPTER_CONFIG} says {rank}")
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return Pair(a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the name: `peft.utils.other.get_pattern_key`."""
    matches = (key for key in patterns or {} if re.match(rf"(.*\.)?({key})$", module))
    return (patterns or {}).get(next(matches, module), default)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_pattern(value: Any, template: str = "{}") -> bool:
    if not isinstance(value, str) or len(value) > _LONGEST_PATTERN:
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(template.replace("{}", value))
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_table(value: Any, is_value: Callable[[Any], bool]) -> bool:
    """Whether it is a rank_pattern or alpha_pattern, see `_by_pattern`."""
    if not isinstance(value, dict):
        return value is None
    return all(_is_pattern(key, r"(.*\.)?({})$") and is_value(entry) for key, entry in value.items())


def _is_names(value: Any, or_pattern: bool = True) -> bool:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value is None or is_list or or_pattern and _is_pattern(value)


def _check_settings(settings: dict[str, Any], where: Path) -> None:
    """ValueError for another kind of adapter, a field that is not supported, or a bad value."""
    if settings.get("peft_type") != "LORA":
        kind = shown(settings.get("peft_type"))
        raise ValueError(f"{where}: peft_type {kind} is not supported, only LORA: let peft merge it, where it can")
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where}: init_lora_weights {shown(initial)} changes the base, which is not supported: let peft save it "
            "with path_initial_model_for_weight_conversion"
        )
    for name, value in settings.items():
        neutral = value in (None, False, "") or value in ([], {})
        if name == "layers_pattern" and value in ("layers", ["layers"]) or neutral:
            continue
        if name not in _READ | _WITHOUT_EFFECT:
            raise ValueError(f"{where}: {shown(name)} is not supported (its value is {shown(value)})")
    settings.setdefault("r", 8)  # PEFT's defaults
    settings.setdefault("lora_alpha", 8)
    get, layers = settings.get, settings.get("layers_to_transform")
    numbers = [layers] if not isinstance(layers, list) else layers
    checks = {
        "task_type": isinstance(get("task_type"), str | None),
        "r": _is_count(settings["r"]),
        "lora_alpha": _is_number(settings["lora_alpha"]),
        "use_rslora": isinstance(get("use_rslora"), bool | None),
        "rank_pattern": _is_table(get("rank_pattern"), _is_count),
        "alpha_pattern": _is_table(get("alpha_pattern"), _is_number),
        "target_modules": _is_names(get("target_modules")),
        "exclude_modules": _is_names(get("exclude_modules")),
        "modules_to_save": _is_names(get("modules_to_save"), or_pattern=False),
        "layers_to_transform": layers is None or all(type(number) is int for number in numbers),
    }
    for name, good in checks.items():
        if not good:
            raise ValueError(f"{where}: {name} cannot be {shown(settings.get(name))}")


# Writing ----------------------------------------------------------------------------------------------------


def adapter_files(parameters: Mapping[str, np.ndarray], lora: LoRA, base: str | None, cls: str) -> dict[str, bytes]:
    """Name -> content of the two files of an adapter that PEFT loads.

    Args:
      parameters: path -> array of each parameter that was trained, those of the layers stacked or not.
      lora: its options.
      base: the name of the base model.
      cls: the name of the model's class.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, array in parameters.items():
        stacked = ".layers." in path and not re.search(r"\.layers\.\d+\.", path)
        for i, layer in enumerate(array) if stacked else [(None, array)]:
            one = path if i is None else path.replace(".layers.", f".layers.{i}.")
            kernel, _, part = one.partition("_lora_")
            name, transposed = names.to_hf(kernel)
            name = name.replace(".weight", f".lora_{part.upper()}.weight") if part else name
            name = name.removeprefix("model.") if cls == "OPTModel" else name
            values = np.asarray(layer, np.float32)
            tensors[_PREFIX + name] = np.ascontiguousarray(values.T if transposed else values)
    task = next((task for task, (name, _) in CLASSES.items() if name == cls), None)
    heads = sorted({path.partition(".")[0] for path in parameters if "_lora_" not in path})
    settings = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "modules_to_save": heads or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }
    return {
        ADAPTER_WEIGHTS[0]: save(tensors, {"format": "pt"}),
        ADAPTER_CONFIG: json.dumps(settings, indent=2).encode() + b"\n",
    }
