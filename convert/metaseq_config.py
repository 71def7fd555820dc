"""Reads the architecture of a metaseq checkpoint from the settings that are stored in it.

The settings are `cfg` (with groups, one of them "model") or `args`. Each is a dict, an `argparse.Namespace` or an
omegaconf `DictConfig`; our unpickler returns the last two as a `Stub`. Source of names and defaults: metaseq's
models/transformer_lm.py of May 2022 (decoder_input_dim, decoder_normalize_before: the 350M) and of 2023 (disable_bias,
disable_affine_ln).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_jax.checkpoints.formats.unpickle import Stub
from opt_jax.config import OPTConfig

# metaseq's name -> (our field, type of the value). If two names of one field are set, the first one here counts.
_FIELDS: dict[str, tuple[str, type]] = {
    "decoder_layers": ("num_hidden_layers", int),
    "decoder_embed_dim": ("hidden_size", int),
    "decoder_ffn_embed_dim": ("ffn_dim", int),
    "decoder_attention_heads": ("num_attention_heads", int),
    "decoder_input_dim": ("word_embed_proj_dim", int),
    "decoder_output_dim": ("word_embed_proj_dim", int),
    "max_target_positions": ("max_position_embeddings", int),
    "tokens_per_sample": ("max_position_embeddings", int),
    "activation_fn": ("activation_function", str),
    "decoder_normalize_before": ("do_layer_norm_before", bool),
    "no_decoder_final_norm": ("_remove_final_layer_norm", bool),
    "share_decoder_input_output_embed": ("tie_word_embeddings", bool),
    "disable_bias": ("enable_bias", bool),
    "disable_affine_ln": ("layer_norm_elementwise_affine", bool),
    "dropout": ("dropout", float),
    "attention_dropout": ("attention_dropout", float),
}
_NEGATED = ("disable_bias", "disable_affine_ln")
_REQUIRED = ("decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_attention_heads")
_LIMITS = {"decoder_layers": 1000}  # a huge number in a damaged file would cost minutes and memory
TRAINING = ("dropout", "attention_dropout")  # no part of the architecture: a given config's values count
# OPT has these values only. Others add no parameters, so the check of the tensors would not notice them.
_SUPPORTED_VALUES: dict[str, Any] = {
    "no_scale_embedding": True,
    "decoder_learned_pos": True,
    "alibi": False,
    "attn_variant": "default",
}
_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}
# A given config may have these instead: metaseq's gelu has meant both forms, and the tanh form has two names.
_EQUAL_ACTIVATIONS = {"gelu": ("gelu_new", "gelu_pytorch_tanh"), "gelu_new": ("gelu_pytorch_tanh",)}


def read_settings(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint's settings, as a map from metaseq's name to value, or None if it has none.

    Only names of this module's tables, and only those that are set.
    """
    for key in ("cfg", "args"):
        root = _entries(dict.get(dict(content), key))
        for group in (_entries(root.get("model")), root):
            if "decoder_layers" in group:
                values = {name: _resolve(root, group[name]) for name in (*_FIELDS, *_SUPPORTED_VALUES) if name in group}
                return {name: value for name, value in values.items() if value not in (None, "???")}
    return None


def _entries(node: Any) -> dict[str, Any]:
    """The entries of a dict, Namespace or DictConfig; {} for anything else."""
    if isinstance(node, Stub):
        # An object with __slots__ has the state (dict, slots).
        state = node.state[0] if isinstance(node.state, tuple) and node.state else node.state
        pairs = {item[0]: item[1] for item in node.items if isinstance(item, tuple) and isinstance(item[0], str)}
        node = dict.get(state, "_content", state) if isinstance(state, dict) else pairs
    return dict(dict.items(node)) if isinstance(node, dict) else {}


def _plain(value: Any) -> Any:
    """The value itself, if it is wrapped in an omegaconf node or a member of an enum."""
    for _ in range(3):  # at most an enum member in a node
        if not isinstance(value, Stub):
            break
        entries = _entries(value)
        value = entries["_val"] if "_val" in entries else value.args[0] if len(value.args) == 1 else value
    return value


def _resolve(root: Mapping[str, Any], value: Any) -> Any:
    """The value. An interpolation like "${task.tokens_per_sample}" is replaced by what it refers to, or by None."""
    value = _plain(value)
    if isinstance(value, str) and (path := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        node: Any = root
        for part in path[1].split("."):
            node = _entries(node).get(part)
        value = _plain(node)
        return None if isinstance(value, str) and value.startswith("$") else value
    return value


def choose_config(settings: Mapping[str, Any] | None, given: OPTConfig | None, where: Path) -> OPTConfig:
    """The architecture: `given`, which must agree with the settings, or else that of the settings.

    Args:
      settings: see `read_settings`.
      given: the architecture that the user names. Without it the vocabulary has OPT's size, because the settings do not
        contain it.
      where: the file, for messages.

    Raises:
      ValueError: both are None; they contradict each other; or a setting is one that OPT does not have.
    """
    ask = "give the architecture with --model (125m ... 175b) or --config config.json"
    if settings is None:
        if given is None:
            raise ValueError(f"{where} holds no settings of its model: {ask}")
        return given
    for name, value in _SUPPORTED_VALUES.items():
        if settings.get(name, value) != value:
            shown = repr(settings[name])[:40]
            raise ValueError(f"{where}: {name}={shown} in its settings is not supported, only {value!r} is")
    fields = {ours: (name, value) for name, (ours, value) in _translate(settings, where).items()}
    if given is None:
        if absent := [name for name in _REQUIRED if name not in settings]:
            raise ValueError(f"{where}: {absent[0]} is not in its settings: {ask}")
        if fields.get("activation_function", ("", ""))[1] == "gelu":
            raise ValueError(
                f"{where}: activation_fn='gelu' means the exact form in some versions of metaseq and the tanh form in "
                "others: give --config config.json with activation_function 'gelu' (exact) or 'gelu_new' (tanh)"
            )
        try:
            return OPTConfig(**{ours: value for ours, (_, value) in fields.items()})
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
    for ours, (name, value) in fields.items():
        want = getattr(given, ours)
        same = (
            want == value
            or (ours == "activation_function" and want in _EQUAL_ACTIVATIONS.get(value, ()))
            or ours in TRAINING
        )
        # A given config may contradict decoder_normalize_before=True, because other versions of metaseq note it for
        # the 350M, too, which is post-norm. The check of the tensors finds a real contradiction: a pre-norm model has a
        # decoder.layer_norm, a post-norm one has none.
        stale = name == "decoder_normalize_before" and value and "no_decoder_final_norm" not in settings
        if not same and not stale:
            raise ValueError(
                f"{where}: {name}={settings[name]!r} in its settings, but {ours} is {want!r} in the given config"
            )
    return given


def _translate(settings: Mapping[str, Any], where: Path) -> dict[str, tuple[str, Any]]:
    """metaseq's name -> (our field, its value), with one name for each field."""
    fields: dict[str, tuple[str, Any]] = {}
    for name, (ours, kind) in _FIELDS.items():
        if name not in settings:
            continue
        value = settings[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{where}: {name} in its settings is of type {type(value).__name__}, not {kind.__name__}")
        if kind is int and not 0 < value <= _LIMITS.get(name, 1 << 24):
            raise ValueError(f"{where}: {name} in its settings is out of range")
        if name == "activation_fn" and value != "gelu":
            if value not in _ACTIVATIONS:
                raise ValueError(f"{where}: activation_fn={str(value)[:40]!r} in its settings is not supported")
            value = _ACTIVATIONS[value]
        fields.setdefault(ours, (name, value))
        if name == "decoder_output_dim" and value != fields[ours][1]:
            raise ValueError(
                f"{where}: decoder_output_dim={value} in its settings differs from "
                f"{fields[ours][0]}={fields[ours][1]}, which is not supported"
            )
    return {name: (ours, (not value) if name in _NEGATED else value) for ours, (name, value) in fields.items()}
