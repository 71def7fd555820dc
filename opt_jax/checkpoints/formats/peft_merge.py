"""What a LoRA adapter of PEFT makes of its base: each part of a matrix, merged when it is read.

A matrix W [out, in] of the base has A [rank, in] and B [out, rank], and becomes W + scale * B A. The scale is
lora_alpha / rank, or lora_alpha / sqrt(rank) with `use_rslora`. Other tensors of the adapter replace those of the base:
heads and other modules of `modules_to_save`, biases, embeddings. What a field means: `peft/tuners/lora`.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.checkpoints.arrays import Checks, LazyArray, first_difference
from opt_jax.checkpoints.chunks import Index
from opt_jax.checkpoints.formats import names
from opt_jax.checkpoints.formats.mapped_files import shown
from opt_jax.config import OPTConfig
from opt_jax.model.lora import LoRA, is_trained

EMBEDDING, _HEAD = "model.decoder.embed_tokens.embedding", "lm_head.kernel"
CLASSES = {  # PEFT's task -> the class with its head, and the head
    "CAUSAL_LM": ("OPTForCausalLM", "lm_head"),
    "SEQ_CLS": ("OPTForSequenceClassification", "score"),
    "QUESTION_ANS": ("OPTForQuestionAnswering", "qa_outputs"),
}
ADAPTED = (".kernel", EMBEDDING)  # ends of the paths of parameters that may have a pair
_TARGETS = ("q_proj", "v_proj")  # PEFT's for OPT, if the config names none
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
        self._warn_of_base(base)
        replaced, tied = dict(self.replaced), causal and config.tie_word_embeddings and EMBEDDING in arrays
        if tied and self._unties():
            if self.settings.get("ensure_weight_tying"):
                raise ValueError(f"{self.where}: an adapter with ensure_weight_tying is not supported")
            # PEFT adapts the input and the output apart: one of the two remains as it was.
            replaced.setdefault(_HEAD, (arrays if self._saves("embed_tokens") else {**arrays, **replaced})[EMBEDDING].T)
            config = dataclasses.replace(config, tie_word_embeddings=False)
        elif tied and _HEAD in replaced:
            if first_difference(replaced.pop(_HEAD).T, {**arrays, **replaced}[EMBEDDING]) is not None:
                raise ValueError(f"{self.where}: lm_head.weight is not the embedding, to which {base} ties it")
        adapted = dict(arrays)
        for path, array in replaced.items():
            like = arrays.get(path, arrays.get(EMBEDDING, array))
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
                array = arrays[EMBEDDING].T if EMBEDDING in arrays else None
            if array is None:
                raise ValueError(
                    f"{self.where}: the pair of {self.module_name(path)} has no place in the model: {hint}"
                )
            if array.shape != (shape := (pair.a.shape[0], pair.b.shape[1])):
                ours, theirs = ("x".join(map(str, size)) for size in (shape, array.shape))
                raise ValueError(
                    f"{self.where}: the pair of {self.module_name(path)} is for {ours}, not {theirs}: {hint}"
                )
        head = CLASSES.get(self.settings.get("task_type", ""), ("", ""))[1]
        places = {path: self.module_name(path) for path in arrays} | ({f"{head}.kernel": head} if head else {})
        for path, module in places.items():
            if path.endswith(ADAPTED) and path not in self.pairs and self._targets(module):
                raise ValueError(f"{self.where}: there is no pair for {module}, which target_modules names: {hint}")
            if path not in self.replaced and self._saves(module):
                raise ValueError(f"{self.where}: there is no tensor for {module}, which modules_to_save names: {hint}")
        for module in map(self.module_name, self.pairs):
            if not (self._targets(module) or self.settings.get("ensure_weight_tying")):  # PEFT would leave it out
                raise ValueError(f"{self.where}: the pair of {module} is not a target of adapter_config.json")

    def _warn_of_base(self, base: object) -> None:
        """Warn of another repository of the hub than the one that the adapter names. Its shapes may be the same."""
        cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{base}/")
        named, name = self.settings.get("base_model_name_or_path"), cached and "/".join(cached.groups())
        if name and isinstance(named, str) and named and named.lower() != name.lower():
            text = f"{self.where}: its base is {shown(named)}, not {name}: the result is wrong if their weights differ"
            warnings.warn(text, stacklevel=2)

    def module_name(self, path: str) -> str:
        """The name of the parameter's module in the adapter."""
        module = names.to_hf(path)[0].rpartition(".")[0]
        return module if self.prefix else module.removeprefix("model.")

    def _saves(self, module: str) -> bool:
        """Whether modules_to_save names the module, by PEFT's rule."""
        return any(module.endswith(name) for name in self.settings.get("modules_to_save") or ())

    def _unties(self) -> bool:
        """Whether it gives one of two tied matrices other values than the other."""
        saved = {EMBEDDING: self._saves("embed_tokens"), _HEAD: self._saves("lm_head")}
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
        return LazyArray(array.shape, dtype, lambda index: self._round(path, array.read(index), dtype), array.chunk)

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

        return LazyArray(matrix.shape, dtype, read, matrix.chunk)


def _named(names_or_pattern: Any, module: str) -> Iterator[bool]:
    if isinstance(names_or_pattern, str):
        yield bool(names_or_pattern) and re.fullmatch(names_or_pattern, module) is not None
    else:
        yield from (f".{module}".endswith(f".{name}") for name in names_or_pattern or ())
