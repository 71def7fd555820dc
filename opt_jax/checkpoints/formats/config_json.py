"""The architecture in a `config.json` of Hugging Face, read and written."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_jax.config import OPTConfig
from opt_jax.system.messages import shown
from opt_jax.system.reading import FieldsWithoutEffect, json_object, note_without_effect, read_small

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


def from_hf(cls: type[OPTConfig], source: str | os.PathLike[str] | Mapping[str, Any], where: str) -> OPTConfig:
    """See `OPTConfig.from_hf`."""
    if isinstance(source, Mapping):
        content = dict(source)
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no OPT configuration at {path}")
        where = str(path)
        content = json_object(read_small(path), path)
    if content.get("model_type", "opt") != "opt":
        raise ValueError(f"{where}: model_type is {shown(content['model_type'])}, not 'opt'")
    known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
    fields = {k: v for k, v in content.items() if k in known}
    extra = {k: v for k, v in content.items() if k not in known and k != "model_type"}
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


def to_hf(config: OPTConfig) -> dict[str, Any]:
    """See `OPTConfig.to_hf`."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "extra"}
    if isinstance(config.eos_token_id, tuple):
        fields["eos_token_id"] = list(config.eos_token_id)
    num_labels, extra = fields.pop("num_labels"), dict(config.extra)
    labels = extra.get("id2label")
    if not isinstance(labels, Mapping) or len(labels) != num_labels:  # replaced since it was read, or never named
        extra["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        extra["label2id"] = {f"LABEL_{i}": i for i in range(num_labels)}
    return {"model_type": "opt"} | fields | extra
