"""What the converter reads from: one form for every supported checkpoint, opened lazily."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_jax.config import OPTConfig
from opt_jax.storage import LazyArray


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint of which nothing but the description has been read.

    Attributes:
      where: the file or directory that error messages name.
      format: for people, as in "Hugging Face safetensors, 3 files".
      config: the architecture. `raw_config`: the content of the config.json to write, fields unknown to us included.
      arrays: our parameter paths -> arrays in our orientation (kernels [in, out]), exactly those of the model.
      companions: directories whose tokenizer files and generation_config.json go with the model, the first one first.
    """

    where: Path
    format: str
    config: OPTConfig
    raw_config: Mapping[str, Any]
    arrays: Mapping[str, LazyArray]
    companions: tuple[Path, ...] = ()
