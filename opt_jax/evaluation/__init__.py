"""Evaluation: perplexity of long texts, and tasks of EleutherAI's lm-evaluation-harness."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_jax.evaluation._perplexity import perplexity
    from opt_jax.evaluation.harness import OPTLM

__all__ = ["OPTLM", "perplexity"]


def __getattr__(name: str) -> Any:  # lazy, so that `opt-jax --help` imports neither JAX nor the harness
    if name == "perplexity":
        from opt_jax.evaluation._perplexity import perplexity

        return perplexity
    if name == "OPTLM":
        from opt_jax.evaluation.harness import OPTLM

        return OPTLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
