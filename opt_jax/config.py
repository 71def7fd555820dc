"""The architecture of an OPT model, and the nine published sizes. No arrays, no mesh."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from opt_jax.interface import ConfigMethods, unchangeable
from opt_jax.system.messages import shown

# Activations of `transformers.activations.ACT2FN` that OPT variants use; `decoder.py` maps each to its function.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish", "tanh")
MAX_LABELS = 1_000_000
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

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


@unchangeable
@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(ConfigMethods):
    """Architecture of an OPT model; names and defaults are those of `transformers.OPTConfig`.

    `ConfigMethods` reads and writes it: `from_hf`, `to_hf`, `from_pretrained`, `save_pretrained`.

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
    # Fields of a config.json besides the architecture (architectures, dtype, id2label, ...). `to_hf` writes them.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any], hash=False)

    def __post_init__(self):
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for field in dataclasses.fields(self):
            self._check_type(field)
        sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
        for name in (*sizes, "word_embed_proj_dim"):
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
            raise ValueError("OPTConfig: problem_type='single_label_classification' with num_labels=1 has a loss of 0")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, tuple) else () if value is None else (value,)
            self._require(all(0 <= i < self.vocab_size for i in ids), name, f"in [0, vocab_size={self.vocab_size})")

    def _require(self, ok: bool, name: str, what: str) -> None:
        if not ok:
            raise ValueError(f"OPTConfig: {name}={shown(getattr(self, name))} must be {what}")

    def _check_type(self, field: dataclasses.Field[Any]) -> None:
        value, kind = getattr(self, field.name), field.type
        if kind is bool:
            self._require(isinstance(value, bool), field.name, "true or false")
        elif kind is float:
            self._require(_is_integer(value) or isinstance(value, float), field.name, "a number")
        elif kind is int:
            self._require(_is_integer(value), field.name, "an integer")
        elif str(kind).startswith("int"):
            numbers = value if isinstance(value, tuple) and "tuple" in str(kind) else (value,)
            self._require(value is None or all(map(_is_integer, numbers)), field.name, "an integer or null")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        """Width of the token embeddings and of the inputs of heads: `word_embed_proj_dim`, never None."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a LayerNorm follows the last layer."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "OPTConfig":
        """The config of a published size ("125m" ... "175b"), as in Table 1 of the paper and HF's configs.

        Args:
          name: the size; a prefix "facebook/opt-" is ignored.
          **overrides: fields that differ from the published ones.

        Raises:
          ValueError: an unknown size, or an invalid field.
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


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
