"""The one form of every checkpoint that the converter reads: opened, described, nothing read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt_jax.checkpoints import pretrained
from opt_jax.checkpoints.arrays import Checks, LazyArray
from opt_jax.checkpoints.formats import hf
from opt_jax.checkpoints.source_files import SourceFiles
from opt_jax.config import OPTConfig
from opt_jax.model import heads

CLASSES = ("OPTForCausalLM", "OPTModel", "OPTForSequenceClassification", "OPTForQuestionAnswering")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint of which nothing but the description has been read.

    Attributes:
      where: the file or directory that error messages name.
      format: for people, as in "Hugging Face safetensors, 3 files".
      config: the architecture. `raw_config`: the content of the config.json to write, fields unknown to us included.
      arrays: our parameter paths -> arrays in our orientation (kernels [in, out]); after `check`, those of the model.
      companions: directories whose tokenizer files and generation_config.json go with the model, the first one first.
      checks: comparisons of what is stored more than once, to be run before the arrays are used.
      files: all that is read; `files.check` belongs between the last reading and publishing what was made of it.
    """

    where: Path
    format: str
    config: OPTConfig
    raw_config: Mapping[str, Any]
    arrays: Mapping[str, LazyArray]
    companions: tuple[Path, ...] = ()
    checks: Checks = ()
    files: SourceFiles = field(default_factory=SourceFiles)

    @property
    def parameters(self) -> int:
        return sum(array.size for array in self.arrays.values())

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def check(self) -> None:
        """Account for every tensor of the model and of the checkpoint, and compare what is stored more than once.

        Raises:
          ValueError: one too many, too few or misshapen, or copies that differ; names it as HF does.
        """
        check_shapes(self)
        for check in self.checks:
            check()


def check_shapes(opened: Checkpoint) -> None:
    """Account for every tensor of the model and of the checkpoint; no data is read.

    Raises:
      ValueError: one too many, too few or misshapen; names it as HF does.
    """
    model = getattr(heads, opened.raw_config["architectures"][0])
    pretrained.check_parameters(model, opened.config, opened.arrays, opened.where, stored_as=hf.stored_as)
