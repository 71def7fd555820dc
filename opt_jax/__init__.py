"""opt-jax: Meta's OPT language models (125M to 175B) in JAX/Flax, for TPU and GPU."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from opt_jax.config import OPTConfig

if TYPE_CHECKING:
    from opt_jax.config import OPTConfig as AutoConfig
    from opt_jax.generation.config import GenerationConfig
    from opt_jax.model.heads import (
        OPTForCausalLM,
        OPTForQuestionAnswering,
        OPTForSequenceClassification,
        OPTModel,
        named_parameters,
    )
    from opt_jax.model.heads import OPTForCausalLM as AutoModelForCausalLM
    from opt_jax.model.heads import OPTForQuestionAnswering as AutoModelForQuestionAnswering
    from opt_jax.model.heads import OPTForSequenceClassification as AutoModelForSequenceClassification
    from opt_jax.model.heads import OPTModel as AutoModel
    from opt_jax.model.hook_points import point_names
    from opt_jax.model.interventions import Add, Project, Replace, Scale, Zero
    from opt_jax.model.native_int8 import use_native_int8
    from opt_jax.model.packed_models import dequantize
    from opt_jax.model.quantization import quantize
    from opt_jax.model.relu_sparsity import use_relu_sparsity
    from opt_jax.model.stacking import stack_layers, unstack_layers
    from opt_jax.text.pipelines import pipeline, score_texts, stream_text
    from opt_jax.text.tokenizer import AutoTokenizer, OPTTokenizer

# The names are imported on first use, so that `import opt_jax` is fast and text processing needs no JAX.
_HOME = {
    "OPTModel": "model.heads",
    "OPTForCausalLM": "model.heads",
    "OPTForSequenceClassification": "model.heads",
    "OPTForQuestionAnswering": "model.heads",
    "named_parameters": "model.heads",
    "stack_layers": "model.stacking",
    "unstack_layers": "model.stacking",
    "quantize": "model.quantization",
    "dequantize": "model.packed_models",
    "use_native_int8": "model.native_int8",
    "use_relu_sparsity": "model.relu_sparsity",
    **dict.fromkeys(["Add", "Replace", "Scale", "Zero", "Project"], "model.interventions"),
    "point_names": "model.hook_points",
    "GenerationConfig": "generation.config",
    "OPTTokenizer": "text.tokenizer",
    "AutoTokenizer": "text.tokenizer",
    "pipeline": "text.pipelines",
    "stream_text": "text.pipelines",
    "score_texts": "text.pipelines",
}
# For scripts written for `transformers`.
_ALIASES = {
    "AutoConfig": "OPTConfig",
    "AutoModel": "OPTModel",
    "AutoModelForCausalLM": "OPTForCausalLM",
    "AutoModelForSequenceClassification": "OPTForSequenceClassification",
    "AutoModelForQuestionAnswering": "OPTForQuestionAnswering",
}

__all__ = [
    "OPTConfig",
    "OPTModel",
    "OPTForCausalLM",
    "OPTForSequenceClassification",
    "OPTForQuestionAnswering",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForQuestionAnswering",
    "OPTTokenizer",
    "AutoTokenizer",
    "GenerationConfig",
    "pipeline",
    "stream_text",
    "score_texts",
    "named_parameters",
    "stack_layers",
    "unstack_layers",
    "quantize",
    "dequantize",
    "use_native_int8",
    "use_relu_sparsity",
    "Add",
    "Replace",
    "Scale",
    "Zero",
    "Project",
    "point_names",
]


def __getattr__(name: str) -> Any:
    if name in _ALIASES:
        return getattr(sys.modules[__name__], _ALIASES[name])
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("opt-jax")
        except metadata.PackageNotFoundError:  # `python train.py` in a checkout, with the dependencies installed
            return "not installed"
    if name in _HOME:
        return getattr(importlib.import_module(f"opt_jax.{_HOME[name]}"), name)
    from opt_jax.checkpoints import hf_scripts

    plain = name.removeprefix("Flax").removeprefix("TF")  # FlaxOPTForCausalLM
    hints = {name: f"use opt_jax.{plain}"} if plain in __all__ else hf_scripts.PACKAGE
    raise hf_scripts.no_attribute("module 'opt_jax'", name, hints)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
