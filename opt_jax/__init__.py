"""opt-jax: Meta's OPT language models (125M to 175B) in JAX/Flax, for TPU and GPU."""

import importlib
from typing import TYPE_CHECKING, Any

from opt_jax.config import OPTConfig

if TYPE_CHECKING:
    from opt_jax.decoder import stack_layers, unstack_layers
    from opt_jax.generation_config import GenerationConfig
    from opt_jax.model import (
        OPTForCausalLM,
        OPTForQuestionAnswering,
        OPTForSequenceClassification,
        OPTModel,
        named_parameters,
    )
    from opt_jax.model import OPTForCausalLM as AutoModelForCausalLM
    from opt_jax.pipelines import pipeline, score_texts, stream_text
    from opt_jax.quantization import quantize
    from opt_jax.text import AutoTokenizer, OPTTokenizer

# Loaded on first use, so that `import opt_jax` costs little and text processing needs no JAX.
_HOME = {
    "OPTModel": "model",
    "OPTForCausalLM": "model",
    "OPTForSequenceClassification": "model",
    "OPTForQuestionAnswering": "model",
    "named_parameters": "model",
    "stack_layers": "decoder",
    "unstack_layers": "decoder",
    "quantize": "quantization",
    "GenerationConfig": "generation_config",
    "OPTTokenizer": "text",
    "AutoTokenizer": "text",
    "pipeline": "pipelines",
    "stream_text": "pipelines",
    "score_texts": "pipelines",
}

__all__ = [
    "OPTConfig", "OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering",
    "AutoModelForCausalLM", "OPTTokenizer", "AutoTokenizer", "GenerationConfig",
    "pipeline", "stream_text", "score_texts", "named_parameters", "stack_layers", "unstack_layers", "quantize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "AutoModelForCausalLM":  # for scripts written for `transformers`
        return __getattr__("OPTForCausalLM")
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("opt-jax")
        except metadata.PackageNotFoundError:  # `python train.py` in a checkout, with the dependencies installed
            return "not installed"
    if name in _HOME:
        return getattr(importlib.import_module(f"opt_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'opt_jax' has no attribute {name!r}")
