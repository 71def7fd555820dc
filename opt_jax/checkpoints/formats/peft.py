"""LoRA adapters of PEFT: `adapter_config.json` and `adapter_model.safetensors` or `.bin`. Merges them into a base.

A matrix W [out, in] of the base has A [rank, in] and B [out, rank], and becomes W + scale * B A. The scale is
lora_alpha / rank, or lora_alpha / sqrt(rank) with `use_rslora`. Other tensors in the file replace those of the base:
heads and other modules of `modules_to_save`, biases, embeddings. Names are those of the base after `base_model.model.`.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint; what a field means: `peft/tuners/lora`.
"""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from opt_jax.checkpoints.arrays import Checks, LazyArray, first_difference
from opt_jax.checkpoints.chunks import Index
from opt_jax.checkpoints.download import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from opt_jax.checkpoints.formats import names
from opt_jax.checkpoints.formats.mapped_files import shown
from opt_jax.checkpoints.formats.safetensors import read_safetensors
from opt_jax.checkpoints.formats.stored import open_tensor
from opt_jax.checkpoints.formats.torch_files import read_torch
from opt_jax.checkpoints.formats.wrappers import note_of_prefixes, without_wrappers
from opt_jax.config import OPTConfig
from opt_jax.model.lora import LoRA, is_trained
from opt_jax.system.reading import json_object, read_small

_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.decoder.embed_tokens.embedding", "lm_head.kernel"
CLASSES = {  # PEFT's task -> the class with its head, and the head
    "CAUSAL_LM": ("OPTForCausalLM", "lm_head"),
    "SEQ_CLS": ("OPTForSequenceClassification", "score"),
    "QUESTION_ANS": ("OPTForQuestionAnswering", "qa_outputs"),
}
_ADAPTED = (".kernel", _EMBEDDING)  # ends of the paths of parameters that may have a pair
_TARGETS = ("q_proj", "v_proj")  # PEFT's for OPT, if the config names none
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
_BLOCK_BYTES = 4 << 20  # of a sum; several are held, by each of the threads that convert


@dataclass(frozen=True)
class Pair:
    """A [in, rank] and B [rank, out] of a matrix [in, out]; of an embedding [vocab, width] in the same way."""

    a: LazyArray
    b: LazyArray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An opened adapter, of which only the description has been read.

    Attributes:
      where: the file of its weights.
      settings: the content of adapter_config.json.
      pairs: path of a matrix -> its pair.
      replaced: path -> the array that takes the place of the base's.
      prefix: of the names of modules in the adapter: "model." or, if it was made for an `OPTModel`, "".
      notes: functions that warn of what was left out in its names.
    """

    where: Path
    settings: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    replaced: Mapping[str, LazyArray]
    prefix: str
    notes: Checks = ()

    def head_class(self, base: str) -> str:
        """The name of the adapted model's class: the one with the adapter's head; without any, that of the base."""
        heads = {path.partition(".")[0] for path in (*self.replaced, *self.pairs)}
        return next((cls for cls, head in CLASSES.values() if head in heads), base)

    def lora(self, depth: int) -> LoRA:
        """The options with which `LoRA.adapt` gives a model of `depth` layers the same adapters.

        Raises:
          ValueError: it cannot.
        """
        in_layers = [re.fullmatch(r"model\.decoder\.layers\.\d+\.(?:self_attn\.)?(\w+)\.kernel", p) for p in self.pairs]
        targets = tuple(sorted({match[1] for match in in_layers if match}))
        sizes = {(pair.rank, pair.scale) for pair in self.pairs.values()}
        alike = len(sizes) == 1 and all(in_layers) and len(in_layers) == depth * len(targets)
        if not alike or not all(map(is_trained, self.replaced)):
            raise ValueError(
                f"{self.where}: an adapter that is kept apart has the same matrices in all layers, with one rank and "
                "scale, and besides them at most the head of a task: merge this one (leave out merge_adapter)"
            )
        ((rank, scale),) = sizes
        return LoRA(rank, scale * rank, targets)

    def kept(self) -> dict[str, LazyArray]:
        """Path -> array of the adapter's matrices, as parameters of a model that `LoRA.adapt` returns."""
        halves = ((path, pair) for path, pair in self.pairs.items())
        return {f"{path}_lora_{part}": getattr(pair, part) for path, pair in halves for part in "ab"}

    def onto(
        self,
        arrays: Mapping[str, LazyArray],
        config: OPTConfig,
        base: object,
        *,
        causal: bool,
        merge: bool = True,
        dtype: Any = None,
    ) -> tuple[dict[str, LazyArray], OPTConfig]:
        """The parameters and the configuration of the adapted model. Matrices are merged when they are read.

        Args:
          arrays: the parameters of the base.
          config: its configuration.
          base: what it is called in messages.
          causal: whether the adapted model has an LM head.
          merge: False leaves out the pairs.
          dtype: of the arrays that change; default: that of the base. Sums of float32 are rounded to it once.

        Raises:
          ValueError: the adapter does not fit the base; names a tensor.
        """
        self._check(arrays, base)
        replaced, tied = dict(self.replaced), causal and config.tie_word_embeddings and _EMBEDDING in arrays
        if tied and self._unties():
            if self.settings.get("ensure_weight_tying"):
                raise ValueError(f"{self.where}: an adapter with ensure_weight_tying is not supported")
            # PEFT adapts the input and the output apart: one of the two remains as it was.
            replaced.setdefault(
                _HEAD, (arrays if self._saves("embed_tokens") else {**arrays, **replaced})[_EMBEDDING].T
            )
            config = dataclasses.replace(config, tie_word_embeddings=False)
        elif tied and _HEAD in replaced:
            if first_difference(replaced.pop(_HEAD).T, {**arrays, **replaced}[_EMBEDDING]) is not None:
                raise ValueError(f"{self.where}: lm_head.weight is not the embedding, to which {base} ties it")
        adapted = dict(arrays)
        for path, array in replaced.items():
            like = arrays.get(path, arrays.get(_EMBEDDING, array))
            adapted[path] = self._rounded(path, array, np.dtype(dtype or like.dtype))
        for path, pair in self.pairs.items() if merge else ():
            if (matrix := adapted.get(path)) is not None:  # a tied head that the adapted model does not have
                adapted[path] = self._merged(path, matrix, pair, np.dtype(dtype or matrix.dtype))
        if "score.kernel" in replaced and config.num_labels != (count := adapted["score.kernel"].shape[-1]):
            config = dataclasses.replace(config, num_labels=count)
        return adapted, config

    def _check(self, arrays: Mapping[str, LazyArray], base: object) -> None:
        """Find the place of each tensor, and the pair of each target."""
        named = self.settings.get("base_model_name_or_path")
        hint = f"is {base} its base?" + (f" It names {shown(named)}" if isinstance(named, str) and named else "")
        heads = tuple(f"{head}." for _, head in CLASSES.values())
        for path, array in self.replaced.items():
            if path not in arrays and not path.startswith(heads):
                raise ValueError(f"{self.where}: tensor {names.to_hf(path)[0]} has no place in the model: {hint}")
            if path in arrays and arrays[path].shape != array.shape and not path.startswith("score."):
                (name, transposed), shapes = names.to_hf(path), [array.shape, arrays[path].shape]
                ours, theirs = (shape[::-1] if transposed else shape for shape in shapes)
                raise ValueError(f"{self.where}: tensor {name} has shape {ours}, but the base's {theirs}: {hint}")
        for path, pair in self.pairs.items():
            array = arrays.get(path, self.replaced.get(path))
            if array is None and path == _HEAD:  # tied
                array = arrays[_EMBEDDING].T if _EMBEDDING in arrays else None
            if array is None:
                raise ValueError(f"{self.where}: the pair of {self._module(path)} has no place in the model: {hint}")
            if array.shape != (shape := (pair.a.shape[0], pair.b.shape[1])):
                ours, theirs = ("x".join(map(str, size)) for size in (shape, array.shape))
                raise ValueError(f"{self.where}: the pair of {self._module(path)} is for {ours}, not {theirs}: {hint}")
        head = CLASSES.get(self.settings.get("task_type", ""), ("", ""))[1]
        places = {path: self._module(path) for path in arrays} | ({f"{head}.kernel": head} if head else {})
        for path, module in places.items():
            if path.endswith(_ADAPTED) and path not in self.pairs and self._targets(module):
                raise ValueError(f"{self.where}: there is no pair for {module}, which target_modules names: {hint}")
            if path not in self.replaced and self._saves(module):
                raise ValueError(f"{self.where}: there is no tensor for {module}, which modules_to_save names: {hint}")

    def _module(self, path: str) -> str:
        """The name of the parameter's module in the adapter."""
        module = names.to_hf(path)[0].rpartition(".")[0]
        return module if self.prefix else module.removeprefix("model.")

    def _saves(self, module: str) -> bool:
        """Whether modules_to_save names the module, by PEFT's rule."""
        return any(module.endswith(name) for name in self.settings.get("modules_to_save") or ())

    def _unties(self) -> bool:
        """Whether it gives one of two tied matrices other values than the other."""
        saved = {_EMBEDDING: self._saves("embed_tokens"), _HEAD: self._saves("lm_head")}
        return any(path in self.pairs or saved[path] and path in self.replaced for path in saved)

    def _targets(self, module: str) -> bool:
        """Whether the module is to have a pair, by PEFT's rules (`check_target_module_exists`)."""
        settings = self.settings
        if any(_named(settings.get("exclude_modules"), module)) or self._saves(module):
            return False
        targets = settings.get("target_modules")
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return ".layers." in module or ".project_" in module or module == "qa_outputs"
        layers, number = settings.get("layers_to_transform"), re.search(r"\.layers\.(\d+)\.", f".{module}")
        if layers not in (None, []) and not isinstance(targets, str):
            chosen = [layers] if isinstance(layers, int) else layers
            if number is None or int(number[1]) not in chosen:
                return False
        return any(_named(_TARGETS if targets is None else targets, module))

    def _rounded(self, path: str, array: LazyArray, dtype: np.dtype) -> LazyArray:
        if array.dtype == dtype:
            return array
        return LazyArray(array.shape, dtype, lambda index: self._round(path, array.read(index), dtype))

    def _round(self, path: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        with np.errstate(over="ignore"):  # reported below
            rounded = values.astype(dtype)
        if (np.isfinite(values) & ~np.isfinite(rounded)).any():
            raise ValueError(f"{self.where}: {names.to_hf(path)[0]} gets values that {dtype} cannot hold: use float32")
        return rounded

    def _merged(self, path: str, matrix: LazyArray, pair: Pair, dtype: np.dtype) -> LazyArray:
        wide = np.promote_types(matrix.dtype, np.float32)

        def read(index: Index) -> np.ndarray:
            ranks = slice(0, pair.rank)
            a, b = pair.a.read((index[0], ranks)).astype(wide), pair.b.read((ranks, index[1])).astype(wide)
            values = matrix.read(index)
            out = np.empty(values.shape, dtype)
            step = max(1, _BLOCK_BYTES // (wide.itemsize * max(1, values.shape[1])))
            for start in range(0, len(out), step):
                part = slice(start, start + step)
                with np.errstate(over="ignore", invalid="ignore"):  # infinities, in a damaged file
                    total = values[part].astype(wide) + pair.scale * (a[part] @ b)
                out[part] = self._round(path, total, dtype)
            return out

        return LazyArray(matrix.shape, dtype, read, matrix.in_chunks)


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
        if (path == _EMBEDDING) != bool(embedding) or bool(embedding) == bool(weight) or not path.endswith(_ADAPTED):
            raise KeyError(key)
        return path, part
    return names.from_hf(key.replace(".base_layer.", "."))[0], None


def _pair(opened: Adapter, path: str, half: Mapping[str, LazyArray]) -> Pair:
    module, settings, where = opened._module(path), opened.settings, opened.where
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


def _named(names_or_pattern: Any, module: str) -> Iterator[bool]:
    if isinstance(names_or_pattern, str):
        yield bool(names_or_pattern) and re.fullmatch(names_or_pattern, module) is not None
    else:
        yield from (f".{module}".endswith(f".{name}") for name in names_or_pattern or ())


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
