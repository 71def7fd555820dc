"""OPT architecture settings: the nine published sizes, Hugging Face's config.json in and out. No arrays, no mesh."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_jax.system.reading import FieldsWithoutEffect, json_object, note_without_effect, read_small, shown

# Activations of `transformers.activations.ACT2FN` that OPT variants use; model.py maps each to its function.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish", "tanh")
MAX_LABELS = 1_000_000
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# What transformers does for these fields of a config.json (for some of them, older versions) is not done here.
_CALL, _GENERATION = "pass it to the model's call", "put it into generation_config.json, or pass it to generate"
_WITHOUT_EFFECT: FieldsWithoutEffect = {
    "output_hidden_states": ((False,), _CALL),
    "output_attentions": ((False,), _CALL),
    "return_dict": ((True,), "a call returns a dataclass"),
    "gradient_checkpointing": ((False,), "build the model with remat"),
    **dict.fromkeys(("do_sample", "early_stopping"), ((False,), _GENERATION)),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size"), ((0,), _GENERATION)),
    **dict.fromkeys(
        (
            "temperature",
            "top_p",
            "typical_p",
            "repetition_penalty",
            "length_penalty",
            "num_beams",
            "num_return_sequences",
        ),
        ((1,), _GENERATION),
    ),
    **dict.fromkeys(
        ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
        ((), _GENERATION),
    ),
    "top_k": ((0, 50), _GENERATION),
    "max_length": ((20,), _GENERATION),
}

# Table 1 of the OPT paper (Zhang et al. 2022): layers, heads, width. Every size has ffn = 4 * width.
_SIZES = {
    "125m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "1.3b": (24, 32, 2048),
    "2.7b": (32, 32, 2560),
    "6.7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
    "30b": (48, 56, 7168),
    "66b": (64, 72, 9216),
    "175b": (96, 96, 12288),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Architecture of an OPT model; names and defaults are those of `transformers.OPTConfig`.

    Raises:
      ValueError: a field has a wrong type or value; the message names the field.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None  # None means hidden_size
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    problem_type: str | None = None
    # Fields of a config.json that do not change the architecture (architectures, dtype, id2label, ...): carried along.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for field in dataclasses.fields(self):
            self._check_type(field)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "ffn_dim",
            "max_position_embeddings",
            "word_embed_proj_dim",
            "num_attention_heads",
            "num_labels",
        ):
            self._require(0 < getattr(self, name) < 2**31, name, "a positive integer below 2**31")
        self._require(self.num_labels <= MAX_LABELS, "num_labels", f"at most {MAX_LABELS}")  # a config.json names each
        for name in ("dropout", "attention_dropout", "layerdrop"):
            self._require(0 <= getattr(self, name) < 1, name, "a probability in [0, 1)")
        self._require(0 <= self.init_std <= sys.float_info.max, "init_std", "a finite number >= 0")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"OPTConfig: hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}"
            )
        names = ", ".join(ACTIVATIONS)
        self._require(self.activation_function in ACTIVATIONS, "activation_function", f"one of {names}")
        self._require(
            self.problem_type in (None, *PROBLEM_TYPES), "problem_type", "None or one of " + ", ".join(PROBLEM_TYPES)
        )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("OPTConfig: problem_type='single_label_classification' with num_labels=1 learns nothing")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, tuple) else () if value is None else (value,)
            self._require(all(0 <= i < self.vocab_size for i in ids), name, f"in [0, vocab_size={self.vocab_size})")

    def _require(self, ok: bool, name: str, what: str) -> None:
        if not ok:
            raise ValueError(f"OPTConfig: {name}={shown(getattr(self, name))} must be {what}")

    def _check_type(self, field: dataclasses.Field) -> None:
        value, kind = getattr(self, field.name), str(field.type)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if kind.startswith("int"):
            ok = is_int or (value is None and "None" in kind)
            if "tuple" in kind and isinstance(value, tuple):
                ok = all(isinstance(i, int) and not isinstance(i, bool) for i in value)
            self._require(ok, field.name, "an integer" + (" or null" if "None" in kind else ""))
        elif kind == "<class 'int'>":
            self._require(is_int, field.name, "an integer")
        elif kind == "<class 'float'>":
            self._require(is_int or isinstance(value, float), field.name, "a number")
        elif kind == "<class 'bool'>":
            self._require(isinstance(value, bool), field.name, "true or false")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        """Width of the token embeddings and of what the heads see: `word_embed_proj_dim`, never None."""
        return self.word_embed_proj_dim or self.hidden_size

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "OPTConfig":
        """One of the nine published sizes ("125m" ... "175b"), as in Table 1 of the paper and HF's configs.

        Raises:
          ValueError: unknown size.
        """
        key = name.lower().removeprefix("facebook/").removeprefix("opt-")
        if key not in _SIZES:
            raise ValueError(f"unknown OPT size {name!r}; the presets are {', '.join(_SIZES)}")
        layers, heads, width = _SIZES[key]
        fields: dict[str, Any] = dict(
            num_hidden_layers=layers, num_attention_heads=heads, hidden_size=width, ffn_dim=4 * width
        )
        if key == "350m":  # the one post-norm model, with embeddings narrower than the residual stream
            fields |= dict(do_layer_norm_before=False, word_embed_proj_dim=512)
        return cls(**(fields | overrides))

    @classmethod
    def from_hf(cls, source: str | os.PathLike | Mapping[str, Any], *, where: str = "config") -> "OPTConfig":
        """From a `config.json` of `transformers`: its path, the directory it is in, or its content as a dict.

        Fields that are not OPT's architecture are kept in `extra` and come back out of `to_hf`. A warning names those
        that change something in transformers and nothing here (`output_hidden_states`, options of generation, ...).
        `where`: what messages call a dict.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: not JSON, not an OPT model, or a bad field (named).
        """
        if isinstance(source, Mapping):
            raw = dict(source)
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            if not path.is_file():
                raise FileNotFoundError(f"no OPT configuration at {path}")
            where = str(path)
            raw = json_object(read_small(path), path)
        if raw.get("model_type", "opt") != "opt":
            raise ValueError(f"{where}: model_type is {shown(raw['model_type'])}, not 'opt'")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields = {k: v for k, v in raw.items() if k in known}
        extra = {k: v for k, v in raw.items() if k not in known and k != "model_type"}
        note_without_effect(where, extra, _WITHOUT_EFFECT)
        labels = extra.get("id2label")
        if isinstance(labels, Mapping):  # HF writes the label names, not their number
            if fields.setdefault("num_labels", len(labels)) != len(labels):
                raise ValueError(
                    f"{where}: num_labels={shown(fields['num_labels'])} but id2label names {len(labels)} labels"
                )
        try:
            return cls(**fields, extra=extra)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` and `from_hf` read back to the same model."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        num_labels, extra = fields.pop("num_labels"), dict(self.extra)
        labels = extra.get("id2label")
        if not isinstance(labels, Mapping) or len(labels) != num_labels:  # replaced since it was read, or never named
            extra["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
            extra["label2id"] = {f"LABEL_{i}": i for i in range(num_labels)}
        return {"model_type": "opt"} | fields | extra
