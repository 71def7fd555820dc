"""`Checkpoint`: the form in which the converter reads every checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt_jax.checkpoints import hub, pretrained
from opt_jax.checkpoints.arrays import Checks, LazyArray
from opt_jax.checkpoints.formats import hf
from opt_jax.checkpoints.source_files import SourceFiles
from opt_jax.config import OPTConfig
from opt_jax.model import heads

CLASSES = ("OPTForCausalLM", "OPTModel", "OPTForSequenceClassification", "OPTForQuestionAnswering")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its description, and arrays that are read when they are used.

    Attributes:
      where: the file or directory that error messages name.
      format: a description for people, such as "Hugging Face safetensors, 3 files".
      config: the architecture.
      raw_config: the content of the config.json to write, with the fields that `OPTConfig` does not have.
      arrays: maps our parameter paths to arrays in our layout (kernels are [in, out]). `check` compares them with the
        model's parameters.
      companions: directories with the model's tokenizer files and generation_config.json. Of two files with the same
        name, that in the first directory counts.
      checks: comparisons of tensors that are stored more than once. Run them before you use the arrays.
      files: all files that are read. Call `files.check` after the last reading and before the result is published.
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

    @property
    def quantization(self) -> Any:
        """The `quantization_config` of the config.json, or the content of an older file of settings; {} without any."""
        return hub.quantization(self.where)[2]

    def check(self) -> None:
        """Check that the tensors are exactly those of the model, and that copies of one tensor are equal.

        Raises:
          ValueError: a tensor is missing, left over or misshapen, or copies differ. Names it as HF does.
        """
        check_shapes(self)
        for check in self.checks:
            check()


def check_shapes(opened: Checkpoint) -> None:
    """Check that the tensors are exactly those of the model; no data is read.

    Raises:
      ValueError: a tensor is missing, left over or misshapen. Names it as HF does.
    """
    model = getattr(heads, opened.raw_config["architectures"][0])
    pretrained.check_parameters(model, opened.config, opened.arrays, opened.where, stored_as=hf.stored_as)
