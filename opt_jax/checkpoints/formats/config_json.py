"""The architecture in a `config.json` of Hugging Face, read and written."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opt_jax.checkpoints import hf_scripts, hub
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
_LABELS = ("id2label", "label2id")


def from_hf(
    cls: type[OPTConfig], source: str | os.PathLike[str] | Mapping[str, Any], *, where: str = "config"
) -> OPTConfig:
    """The config in a `config.json` of `transformers`.

    Fields that are not part of the architecture are kept in `extra`, and `to_hf` writes them. A warning names those
    that have an effect in transformers but not here (`output_hidden_states`, options of generation, ...).

    Args:
      cls: OPTConfig.
      source: the path of the file or of its directory, or its content as a dict.
      where: the name of a dict in messages.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: not JSON, not an OPT model, or an invalid field, which the message names.
    """
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
    """The content of a `config.json`, from which `transformers` and `from_hf` get the same architecture."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "extra"}
    if isinstance(config.eos_token_id, tuple):
        fields["eos_token_id"] = list(config.eos_token_id)
    num_labels, extra = fields.pop("num_labels"), dict(config.extra)
    named = extra.get("id2label")
    if not isinstance(named, Mapping) or len(named) != num_labels:  # replaced since it was read, or never named
        extra["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        extra["label2id"] = {f"LABEL_{i}": i for i in range(num_labels)}
    return {"model_type": "opt"} | fields | extra


def labels(config: OPTConfig) -> dict[str, dict[Any, Any]]:
    """`id2label` and `label2id` of a config, with numbers as ids."""
    content = to_hf(config)
    names = {int(i) if str(i).isdecimal() else i: name for i, name in content["id2label"].items()}
    return {"id2label": names, "label2id": content.get("label2id") or {name: i for i, name in names.items()}}


def from_pretrained(
    cls: type[OPTConfig],
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **fields: Any,
) -> OPTConfig:
    """The config of a checkpoint.

    Args:
      cls: OPTConfig.
      name: a hub id, a directory or "tiny".
      revision, cache_dir, local_files_only: see `hub.resolve`.
      **fields: fields that differ from the checkpoint's, also `id2label` and `label2id`.

    Raises:
      FileNotFoundError, ValueError: no such checkpoint, an invalid config, or a field that does not exist.
    """
    folder = hub.resolve(name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, weights=False)
    config = from_hf(cls, hub.read_config(folder), where=str(folder / "config.json"))
    return override(config, hf_scripts.known("OPTConfig.from_pretrained", fields, hf_scripts.LOADING))


def override(config: OPTConfig, fields: Mapping[str, Any], others: Iterable[str] = ()) -> OPTConfig:
    """The config with other values of fields, or of `id2label` (then num_labels follows) and `label2id`.

    Args:
      config: the config.
      fields: name -> new value.
      others: more names to suggest for one that does not exist.

    Raises:
      ValueError: a field does not exist or has an invalid value, or num_labels contradicts id2label.
    """
    known = [field.name for field in dataclasses.fields(OPTConfig) if field.name != "extra"]
    for name in fields:
        if name not in known and name not in _LABELS:
            raise hf_scripts.unknown_argument("from_pretrained", name, [*known, *_LABELS, *others])
    changed = {name: value for name, value in fields.items() if name in known}
    labels = {name: dict(fields[name]) for name in _LABELS if fields.get(name) is not None}
    if "id2label" in labels:
        labels["id2label"] = {str(i): label for i, label in labels["id2label"].items()}
        if changed.setdefault("num_labels", len(labels["id2label"])) != len(labels["id2label"]):
            count = len(labels["id2label"])
            raise ValueError(f"num_labels={shown(changed['num_labels'])} but id2label names {count} labels")
    return dataclasses.replace(config, **changed, extra={**config.extra, **labels}) if fields else config


def save_pretrained(config: OPTConfig, directory: str | os.PathLike[str]) -> None:
    """Write `config.json` into a directory.

    Raises:
      FileExistsError, ValueError: see `hub.write_into`.
    """
    hub.write_into(directory, "config.json", json.dumps(to_hf(config), indent=2).encode() + b"\n")
