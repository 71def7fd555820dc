"""Reading and changing activations at hook points: `run_with_cache`, `run_with_hooks`, and interventions as pytrees.

Names of points are those of TransformerLens, and so are `run_with_cache` and `run_with_hooks`. An intervention is a
pytree: its values, positions, heads and scales are traced, so other ones compile nothing, and JAX differentiates them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from opt_jax.config import OPTConfig
from opt_jax.model import hooks
from opt_jax.model.decoder import Ids, Mask
from opt_jax.model.heads import OPTModel
from opt_jax.model.hook_points import POINTS, Names, find_points, is_outside, local_name, shape_of
from opt_jax.model.outputs import BaseModelOutput
from opt_jax.system.messages import shown

Indices = Int[Array, "..."] | np.ndarray | list[int] | range | int | None
_INDICES = ("rows", "positions", "heads", "neurons", "layers")
_NEVER = np.int32(2**31 - 1)  # a position that no token has


class Hook(NamedTuple):
    """What a Python function at a point is told: `function(value, hook)`.

    Attributes:
      name: the point. Under `lax.scan`, where one trace serves all layers, `blocks.*.` stands for the layer.
      layer: its number, traced under `lax.scan`; None outside of layers.
    """

    name: str
    layer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervention:
    """A change of the value at a point, everywhere or at chosen indices. An index may be negative, from the end.

    None is all of them.

    Attributes:
      rows: of the batch. One that it does not have makes the result NaN, because the rows are known too late.
      positions: count the real tokens of a row over the whole sequence, also those in a cache and generated ones. -1 is
        the last real token of each call, so in decoding the token of each step. One that a row does not have changes
        nothing: it may be a token still to come.
      heads: at points with an axis H.
      neurons: at `mlp.hook_pre` and `mlp.hook_post`.
      layers: the layers in which it acts, for a key that names the point of several.
    """

    rows: Indices = None
    positions: Indices = None
    heads: Indices = None
    neurons: Indices = None
    layers: Indices = None

    @property
    def from_end(self) -> bool:
        """Whether a position of this checked intervention, where it is known, counts from the end."""
        positions: Any = self.positions
        return isinstance(positions, np.ndarray) and bool((positions < 0).any())

    def changed(self, value: Array, hook: Hook) -> Array:
        """The new value, as if it were meant for all indices."""
        raise NotImplementedError


def _as(value: Any, like: Array, what: str, hook: Hook) -> Array:
    """`value` in the dtype of the activation; ValueError if it is complex, or cannot be broadcast to its shape."""
    array = jnp.asarray(value)
    if jnp.iscomplexobj(array):
        raise ValueError(f"{what} at {hook.name} is complex, and activations are real")
    try:
        fits = np.broadcast_shapes(array.shape, like.shape) == like.shape
    except ValueError:
        fits = False
    if not fits:
        known = f"{what} of shape {array.shape} does not broadcast to {hook.name}, which is {like.shape} here"
        raise ValueError(f"{known} (generate and score pad prompts, and a step reads one token: give T=1 there)")
    return array.reshape((1,) * (like.ndim - array.ndim) + array.shape).astype(like.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Add(Intervention):
    """Adds scale * value. Both broadcast to the activation."""

    value: Any
    scale: Any = 1.0

    def changed(self, value: Array, hook: Hook) -> Array:
        return value + _as(self.scale, value, "scale", hook) * _as(self.value, value, "Add", hook)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replace(Intervention):
    """Puts `value` in the place of the activation, to whose shape it broadcasts: all of it, or a mean, or a number."""

    value: Any

    def changed(self, value: Array, hook: Hook) -> Array:
        return jnp.broadcast_to(_as(self.value, value, "Replace", hook), value.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale(Intervention):
    """Multiplies by `factor`, which broadcasts to the activation."""

    factor: Any

    def changed(self, value: Array, hook: Hook) -> Array:
        return value * _as(self.factor, value, "Scale", hook)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zero(Intervention):
    """Sets to zero."""

    def changed(self, value: Array, hook: Hook) -> Array:  # noqa: ARG002
        return jnp.zeros_like(value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Project(Intervention):
    """Removes the span of `directions` [N, D] or [D] from the last axis.

    They may have any lengths but must be linearly independent, or the result is NaN: one of them may not be zero.
    """

    directions: Any

    def changed(self, value: Array, hook: Hook) -> Array:
        rows = jnp.atleast_2d(jnp.asarray(self.directions, jnp.float32))
        if rows.ndim != 2 or rows.shape[1] != value.shape[-1]:
            raise ValueError(f"directions of shape {rows.shape} must be [N, {value.shape[-1]}] at {hook.name}")
        basis, r = jnp.linalg.qr(rows.T)
        dependent = jnp.abs(jnp.diagonal(r)) <= 1e-6 * jnp.abs(r).max(axis=0)[: r.shape[0]]
        basis = jnp.where(dependent.any(), jnp.nan, basis)  # else it would hold a direction of no one's choice
        x = value.astype(jnp.float32)
        along = jnp.einsum("...d,dn->...n", x, basis, precision=lax.Precision.HIGHEST)
        return (x - jnp.einsum("...n,dn->...d", along, basis, precision=lax.Precision.HIGHEST)).astype(value.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call(Intervention):
    """Puts function(value, hook) in the place of the activation. JAX traces it, once for each function object."""

    function: Callable[[Array, Hook], Any] = dataclasses.field(metadata=dict(static=True))

    def changed(self, value: Array, hook: Hook) -> Array:
        token = hooks.active.set(None)  # for models that the function calls
        try:
            new = self.function(value, hook)
        finally:
            hooks.active.reset(token)
        if new is None:
            raise ValueError(f"the function at {hook.name} returned None: it must return the value to go on with")
        return jnp.broadcast_to(_as(new, value, "the result of the function", hook), value.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a call changes and keeps; a pytree.

    Attributes:
      edits: point or glob -> interventions, in the order in which they act.
      names: the points to keep.
    """

    edits: dict[str, tuple[Intervention, ...]]
    names: tuple[str, ...] = dataclasses.field(default=(), metadata=dict(static=True))


def as_hooks(config: OPTConfig, edits: Any, names: Names = ()) -> Hooks:
    """Checked hooks.

    Args:
      config: of the model.
      edits: dict name or glob -> an intervention, a function, or a tuple of these; or Hooks; or None.
      names: the points to keep, as in `find_points`.

    Raises:
      ValueError: an unknown name; something that is no intervention; indices on an axis that the point does not have.
    """
    keep = tuple(find_points(config, names))
    if isinstance(edits, Hooks):
        return Hooks(edits.edits, tuple(dict.fromkeys([*edits.names, *keep])))
    if not (edits is None or isinstance(edits, Mapping)):
        raise ValueError(f"hooks must be a dict from names of points to interventions, not {shown(edits, 80)}")
    checked = {}
    for key, given in (edits or {}).items():
        points = find_points(config, [key])
        edits_here = given if isinstance(given, tuple | list) else (given,)
        checked[key] = tuple(_check(config, points, key, edit) for edit in edits_here)
    return Hooks(checked, keep)


def _check(config: OPTConfig, points: list[str], key: str, given: Any) -> Intervention:
    function: Any = given
    edit = Call(function) if callable(given) and not isinstance(given, type) else given
    if not isinstance(edit, Intervention):
        raise ValueError(
            f"{key}: {shown(given, 80)} is no intervention (Add, Replace, Scale, Zero, Project) or function"
        )
    sizes = dict(heads=config.num_attention_heads, neurons=config.ffn_dim, layers=config.num_hidden_layers)
    indices = {name: _indices(getattr(edit, name), f"{key}: {name}", sizes.get(name)) for name in _INDICES}
    edit = dataclasses.replace(edit, **indices)
    for point in points:
        axes = POINTS[local_name(point)][0]
        for name, axis in (("heads", "H"), ("neurons", "F")):
            if getattr(edit, name) is not None and axis not in axes:
                where = point if key == point else f"{key}: {point}"
                raise ValueError(f"{where} has no {name}; its axes are {shape_of(axes)}")
        if edit.layers is not None and is_outside(local_name(point)):
            raise ValueError(f"{key}: layers= without effect, {point} is in no layer")
    if isinstance(edit.layers, np.ndarray):
        without = {int(i) % sizes["layers"] for i in edit.layers.ravel()} - {int(p.split(".")[1]) for p in points}
        if without:
            raise ValueError(f"{key}: layers={sorted(without)} without effect, because the name has no point in them")
    return edit


def _indices(given: Any, name: str, size: int | None) -> Any:
    """Checked indices: an int32 array of NumPy where they are known, else a traced one; None for None."""
    if given is None:
        return None
    if isinstance(given, slice):
        raise ValueError(f"{name} must be a number, a list, a range or an array of integers, not a slice")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        array: Any = jnp.asarray(given)
    else:
        array = np.asarray(given)
        array = array.astype(np.int32) if array.size == 0 or np.issubdtype(array.dtype, np.integer) else array
        if size is not None and array.dtype == np.int32 and ((array >= size) | (array < -size)).any():
            raise ValueError(f"{name}={shown(array.tolist(), 80)}: there are {size}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    return array


def run_with_cache(
    model: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    *,
    names: Names = "*",
    hooks: Any = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Array]]:
    """The output of a call, and the activations at hook points: TransformerLens `run_with_cache`.

    Args:
      model: any of the models, with separate or stacked layers.
      input_ids, attention_mask: as in a call of the model.
      names: the points: a name, a glob (`blocks.*.hook_resid_post`), a list of these, or a predicate. The default is
        all of them, except `attn.hook_result`, which takes H times the memory of the others. Others are not kept.
      hooks: interventions, as in `run_with_hooks`. A point is kept after its interventions.
      **kwargs: other arguments of a call of the model.

    Returns:
      The output, and name -> array; docs/hook_points.md has the shapes.

    Raises:
      ValueError: an unknown name, an intervention that its point cannot have, or as the call.
    """
    if isinstance(names, str) and names == "*":
        names = lambda name: not name.endswith("hook_result")  # noqa: E731
    if "names_filter" in kwargs:
        raise ValueError("names_filter of TransformerLens is names= here")
    asked = as_hooks(model.config, hooks, names)
    if not asked.names:
        raise ValueError("names is empty: name a point, or call the model itself")
    out = model(input_ids, attention_mask, hooks=asked, **kwargs)
    kept = out.activations
    return dataclasses.replace(out, activations=None), {name: kept[name] for name in asked.names}


def run_with_hooks(
    model: Any, input_ids: Any = None, attention_mask: Any = None, *, hooks: Any = None, **kwargs: Any
) -> Any:
    """The output of a call with interventions: TransformerLens `run_with_hooks`.

    Args:
      model: any of the models, with separate or stacked layers.
      input_ids, attention_mask: as in a call of the model.
      hooks: dict from the name of a point, or a glob, to an `Intervention`, a function(value, hook) -> value, or a
        tuple of these, which act in order.
      **kwargs: other arguments of a call of the model.

    Raises:
      ValueError: an unknown name, an intervention that its point cannot have, or as the call.
    """
    for theirs, ours in (("fwd_hooks", "hooks={name: function}"), ("bwd_hooks", "jax.grad of an Add of zeros")):
        if theirs in kwargs:
            raise ValueError(f"{theirs} of TransformerLens is {ours} here")
    return model(input_ids, attention_mask, hooks=as_hooks(model.config, hooks), **kwargs)


class HookedModel(OPTModel):
    """A base model whose every call has `hooks`."""

    hooks: Hooks

    def forward(self, input_ids: Ids = None, attention_mask: Mask = None, **rest: Any) -> BaseModelOutput:
        """As `OPTModel.forward`."""
        return super().forward(input_ids, attention_mask, **{"hooks": self.hooks} | rest)


def with_hooks(model: Any, hooks: Any, rows: int | None = None, unread: int = 0) -> Any:
    """A model with a head that shares the arrays of `model`, and whose every call has these hooks (`run_with_hooks`).

    Args:
      model: the model.
      hooks: as in `run_with_hooks`.
      rows: the number of rows that the caller gave, if the model may get more, which are padding.
      unread: the number of tokens at the end of each row that the model does not read.

    Raises:
      ValueError: see `as_hooks`; or a row that does not exist.
    """
    checked = as_hooks(model.config, hooks)
    edits = {key: tuple(_of_rows(edit, key, rows, unread) for edit in edits) for key, edits in checked.edits.items()}
    checked = dataclasses.replace(checked, edits=edits)
    hooked = jax.tree.map(lambda x: x, model)
    hooked.model.__class__ = HookedModel
    hooked.model.hooks = nnx.data(checked)
    return hooked


def _of_rows(edit: Intervention, key: str, rows: int | None, unread: int) -> Intervention:
    """The edit with rows that count from the first one, and positions that count from the last token that is read."""
    changed = {}
    if edit.rows is not None and rows is not None:
        chosen = _indices(edit.rows, f"{key}: rows", rows)
        changed["rows"] = chosen + rows * (chosen < 0)
    if edit.positions is not None and unread:
        at: Any = edit.positions
        changed["positions"] = np.where(at < -unread, at + unread, np.where(at < 0, _NEVER, at))
    return dataclasses.replace(edit, **changed)
