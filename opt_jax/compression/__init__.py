"""Quantisation and pruning of OPT after training, by the methods of papers. Each module names its paper."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_jax.compression._compress import compress

__all__ = ["compress"]


def __getattr__(name: str) -> Any:  # lazy, so that `opt-jax --help` does not import JAX
    if name == "compress":
        from opt_jax.compression._compress import compress

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
