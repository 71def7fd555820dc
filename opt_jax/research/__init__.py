"""What papers do with the activations of a model. Each module names its paper."""

from opt_jax.research.collect import collect

__all__ = ["collect"]
