"""Hook points: named places of the computation at which a caller may read or change a value. Names of TransformerLens.

A point is the call `point(name, value)` in a module. Without hooks it returns the value itself, while JAX traces, so
the compiled program is the same as without it. `hook_points.py` lists all points; `hooked_call.py` is what hooks do.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
from jax import lax

# The `hooked_call.Active` of the call that is being traced; None: it has no hooks.
active: ContextVar[Any] = ContextVar("active", default=None)


def point(name: str, value: jax.Array, *computed_from: Any) -> jax.Array:
    """The value that the computation goes on with.

    Args:
      name: as in `hook_points.POINTS`, without the layer.
      value: the value without hooks.
      *computed_from: a module and its input, if hooks may need parts of the value, which it then computes again.
    """
    hooks = active.get()
    return value if hooks is None else hooks.at(name, value, *computed_from)


def wanted(name: str) -> bool:
    """Whether a hook reads or changes this point, in any layer; for what is computed in another way then."""
    hooks = active.get()
    return hooks is not None and hooks.wants(name)


def in_layer(layer: Callable[..., Any], number: int, wrap: Callable[..., Any]) -> Callable[..., Any]:
    """wrap(layer), with points of the layer `number`."""
    hooks = active.get()
    return wrap(layer) if hooks is None else hooks.in_layer(layer, number, wrap)


def scan(body: Callable[..., Any], wrap: Callable[..., Any], carry: Any, layers: Any) -> Any:
    """lax.scan(wrap(body), carry, layers), with points of the layers."""
    hooks = active.get()
    return lax.scan(wrap(body), carry, layers) if hooks is None else hooks.scan(body, wrap, carry, layers)
