"""Text generation on token ids: options, logits processors, compiled loops, and the host loop that runs them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_jax.generation.generate import stream

__all__ = ["stream"]


def __getattr__(name: str) -> Any:  # lazy, so that `GenerationConfig` alone imports no JAX
    if name == "stream":
        from opt_jax.generation.generate import stream

        return stream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
