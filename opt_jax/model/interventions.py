"""Reading and changing activations at hook points: `run_with_cache`, `run_with_hooks`, and interventions as pytrees.

Names of points are those of TransformerLens, and so are `run_with_cache` and `run_with_hooks`. An intervention is a
pytree: its values, positions, heads and scales are traced, so other ones compile nothing, and JAX differentiates them.
"""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from opt_jax.config import OPTConfig
from opt_jax.model import hooks
from opt_jax.model.decoder import DecoderInputs, Ids, LayerNorm, Mask, OPTDecoder, positions_of
from opt_jax.model.heads import OPTModel
from opt_jax.model.outputs import BaseModelOutput
from opt_jax.parallel.rules import is_per_device
from opt_jax.system.messages import shown

# Point, without `blocks.{i}.` -> (its axes, what it is). Axes: see decoder.py; 1: an axis of that length.
POINTS: dict[str, tuple[str, str]] = {
    "hook_embed": ("BTP", "token embeddings, or the call's `inputs_embeds`"),
    "hook_project_in": ("BTD", "what `project_in` makes of them (350M)"),
    "hook_pos_embed": ("BTD", "position embeddings"),
    "hook_resid_pre": ("BTD", "the residual stream that enters the layer"),
    "ln1.hook_scale": ("BT1", "sqrt(variance + epsilon) in the LayerNorm before attention (post-norm: after it)"),
    "ln1.hook_normalized": ("BTD", "the output of that LayerNorm, with its scale and bias"),
    "attn.hook_q": ("BTHK", "queries, with bias, before they are scaled by K^-0.5"),
    "attn.hook_k": ("BTHK", "keys of this call's tokens; a cache holds what the hook returns"),
    "attn.hook_v": ("BTHK", "values of this call's tokens; a cache holds what the hook returns"),
    "attn.hook_attn_scores": ("BHTS", "float32 scores, scaled and masked; hidden ones are the least finite number"),
    "attn.hook_pattern": ("BHTS", "softmax of the scores, before dropout"),
    "attn.hook_z": ("BTHK", "the heads' outputs, before `out_proj`"),
    "attn.hook_result": ("BTHD", "what each head adds: `out_proj` of it alone, without the bias"),
    "hook_attn_out": ("BTD", "what attention adds to the residual stream: with bias, before dropout"),
    "hook_resid_mid": ("BTD", "the residual stream after attention (post-norm: the sum, before the LayerNorm)"),
    "ln2.hook_scale": ("BT1", "as in ln1, in the LayerNorm of the feed-forward block"),
    "ln2.hook_normalized": ("BTD", "the output of that LayerNorm, with its scale and bias"),
    "mlp.hook_pre": ("BTF", "neurons before the activation function"),
    "mlp.hook_post": ("BTF", "neurons after the activation function"),
    "hook_mlp_out": ("BTD", "what the feed-forward block adds to the residual stream: with bias, before dropout"),
    "hook_resid_post": ("BTD", "the residual stream after that block (post-norm: the sum, before the LayerNorm)"),
    "ln_final.hook_scale": ("BT1", "sqrt(variance + epsilon) in the final LayerNorm"),
    "ln_final.hook_normalized": ("BTD", "the output of the final LayerNorm, with its scale and bias"),
    "hook_project_out": ("BTP", "what `project_out` makes of the last layer's output (350M)"),
}  # fmt: skip
_OUTSIDE = ("hook_embed", "hook_project_in", "hook_pos_embed", "hook_project_out")
Names = str | Iterable[str] | Callable[[str], bool]
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

    Attributes:
      rows: of the batch. One that it does not have makes the result NaN, because the rows are known too late.
      positions: count the real tokens of a row over the whole sequence, also those in a cache and generated ones. -1 is
        the last real token of each call, so in decoding the token of each step.
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
    """`value` in the dtype of the activation; ValueError if it cannot be broadcast to its shape."""
    array = jnp.asarray(value)
    try:
        fits = np.broadcast_shapes(array.shape, like.shape) == like.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{what} of shape {array.shape} does not broadcast to {hook.name}, which is {like.shape} here")
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
    """Removes the span of `directions` [N, D] or [D], of any lengths but linearly independent, from the last axis."""

    directions: Any

    def changed(self, value: Array, hook: Hook) -> Array:
        rows = jnp.atleast_2d(jnp.asarray(self.directions, jnp.float32))
        if rows.ndim != 2 or rows.shape[1] != value.shape[-1]:
            raise ValueError(f"directions of shape {rows.shape} must be [N, {value.shape[-1]}] at {hook.name}")
        basis = jnp.linalg.qr(rows.T)[0]
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


def point_names(config: OPTConfig) -> list[str]:
    """The names of all points of a model, in the order in which the computation meets them."""
    missing = set()
    if config.embed_dim == config.hidden_size:
        missing |= {"hook_project_in", "hook_project_out"}
    if not config.has_final_layer_norm:
        missing |= {"ln_final.hook_scale", "ln_final.hook_normalized"}
    local = [name for name in POINTS if name not in missing]
    inside = [name for name in local if not _is_outside(name)]
    first, last = local.index(inside[0]), local.index(inside[-1])
    blocks = [f"blocks.{i}.{name}" for i in range(config.num_hidden_layers) for name in inside]
    return [*local[:first], *blocks, *local[last + 1 :]]


def _is_outside(name: str) -> bool:
    return name in _OUTSIDE or name.startswith("ln_final.")


def find_points(config: OPTConfig, names: Names) -> list[str]:
    """The points that `names` stands for: a name, a glob such as `blocks.*.hook_resid_post`, several, or a predicate.

    Raises:
      ValueError: a name or glob that no point has.
    """
    known = point_names(config)
    if callable(names):
        selected = [name for name in known if names(name)]
        if not selected:
            raise ValueError("names: the function is true for no point of this model")
        return selected
    selected = set()
    for name in [names] if isinstance(names, str) else names:
        matches = fnmatch.filter(known, name) if isinstance(name, str) else []
        if not matches:
            near = difflib.get_close_matches(str(name), known, 3, 0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ": opt_jax.point_names(model.config) lists all"
            raise ValueError(f"no hook point is named {shown(name, 80)}{hint}")
        selected.update(matches)
    return [name for name in known if name in selected]


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
        points = find_points(config, key)
        edits_here = given if isinstance(given, tuple | list) else (given,)
        checked[key] = tuple(_check(config, points, key, edit) for edit in edits_here)
    return Hooks(checked, keep)


def _check(config: OPTConfig, points: list[str], key: str, given: Any) -> Intervention:
    function: Any = given
    edit = Call(function) if callable(given) else given
    if not isinstance(edit, Intervention):
        raise ValueError(
            f"{key}: {shown(given, 80)} is no intervention (Add, Replace, Scale, Zero, Project) or function"
        )
    sizes = dict(heads=config.num_attention_heads, neurons=config.ffn_dim, layers=config.num_hidden_layers)
    indices = {name: _indices(getattr(edit, name), f"{key}: {name}", sizes.get(name)) for name in _INDICES}
    edit = dataclasses.replace(edit, **indices)
    for point in points:
        axes = POINTS[_local(point)][0]
        for name, axis in (("heads", "H"), ("neurons", "F")):
            if getattr(edit, name) is not None and axis not in axes:
                raise ValueError(f"{key}: {point} has no {name}; its axes are {_shape(axes)}")
        if edit.layers is not None and _is_outside(_local(point)):
            raise ValueError(f"{key}: layers= without effect, {point} is in no layer")
    return edit


def _indices(given: Any, name: str, size: int | None) -> Any:
    """Checked indices: an int32 array of NumPy where they are known, else a traced one; None for None."""
    if given is None:
        return None
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


def _local(point: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", point)


def _shape(axes: str) -> str:
    return f"[{', '.join(axes)}]"


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
      The output, and name -> array; `interventions.POINTS` has the shapes.

    Raises:
      ValueError: as the call and `as_hooks`.
    """
    if isinstance(names, str) and names == "*":
        names = lambda name: not name.endswith("hook_result")  # noqa: E731
    asked = as_hooks(model.config, hooks, names)
    if not asked.names:
        raise ValueError("names is empty: name a point, or call the model itself")
    out = model(input_ids, attention_mask, hooks=asked, **kwargs)
    kept = out.activations
    return dataclasses.replace(out, activations=None), {name: kept[name] for name in asked.names}


def run_with_hooks(model: Any, input_ids: Any = None, attention_mask: Any = None, *, hooks: Any, **kwargs: Any) -> Any:
    """The output of a call with interventions: TransformerLens `run_with_hooks`.

    Args:
      model: any of the models, with separate or stacked layers.
      input_ids, attention_mask: as in a call of the model.
      hooks: dict from the name of a point, or a glob, to an `Intervention`, a function(value, hook) -> value, or a
        tuple of these, which act in order.
      **kwargs: other arguments of a call of the model.

    Raises:
      ValueError: as the call and `as_hooks`.
    """
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


# While a call is traced -----------------------------------------------------------------------------------------------


def run(model: Any, inputs: DecoderInputs) -> BaseModelOutput:
    """The output of a base model for a call with hooks; what they keep is in `activations`."""
    if is_per_device():
        raise ValueError("hooks do not work inside a training step: call model.forward in a function of your own")
    run = Active(model.decoder, inputs, as_hooks(model.config, inputs.hooks))
    token = hooks.active.set(run)
    try:
        out = model.decoder(inputs)
    finally:
        hooks.active.reset(token)
    kept = {name: run.kept[name] for name in run.hooks.names}
    return dataclasses.replace(out, activations=kept or None)


class Active:
    """The hooks of the call that is being traced."""

    def __init__(self, decoder: OPTDecoder, inputs: DecoderInputs, asked: Hooks):
        self.config, self.hooks, self.batch = decoder.config, asked, inputs.shape[0]
        self.edits = [(set(find_points(self.config, key)), edits) for key, edits in asked.edits.items()]
        self._named = {
            _local(name) for names in (set(asked.names), *(names for names, _ in self.edits)) for name in names
        }
        self.kept: dict[str, Array] = {}
        self._layer: Any = None  # the layer at hand: its number, or a traced one
        self._in_scan: dict[str, Array] | None = None  # what the layer at hand keeps, under `lax.scan`
        if inputs.cache is None and decoder.implementation != "xla":
            for name in ("attn.hook_attn_scores", "attn.hook_pattern"):
                if name in self._named:
                    raise ValueError(
                        f"{name} needs attn_implementation='xla': {decoder.implementation!r} never stores the weights"
                    )
        if inputs.cache is not None and inputs.cache.valid.ndim == 3:  # beams: the axis T is that of branches
            self.positions = jnp.broadcast_to(inputs.cache.next_position[:, None], inputs.shape)
            self.from_end = jnp.full(inputs.shape, -1, jnp.int32)
        else:
            self.positions = positions_of(dataclasses.replace(inputs, segment_ids=None))  # -1 at pads
            end = self.positions.max(axis=1, keepdims=True) + 1
            self.from_end = jnp.where(self.positions < 0, 0, self.positions - end)

    def wants(self, local: str) -> bool:
        return local in self._named

    def at(self, local: str, value: Array, *computed_from: Any) -> Array:
        """See `hooks.point`."""
        if local == "hook_pos_embed":  # one row, where all rows have the same positions
            value = jnp.broadcast_to(value, (self.batch, *value.shape[1:]))
        if local == "attn.hook_result":
            return self._sum_of_heads(*computed_from) if local in self._named else value
        if computed_from and local.replace("normalized", "scale") in self._named:
            value = self._normalized(local, *computed_from)
        return self._visit(local, value) if local in self._named else value

    def _visit(self, local: str, value: Array) -> Array:
        outside, traced = _is_outside(local), isinstance(self._layer, jax.core.Tracer)
        name = local if outside else f"blocks.{'*' if traced else self._layer}.{local}"
        hook = Hook(name, None if outside else self._layer)
        for names, edits in self.edits:
            active = self._active(names, name, local)
            for edit in edits if active is not False else ():
                value = self._edited(edit, value, hook, POINTS[local][0], active)
        if traced and not outside:
            assert self._in_scan is not None
            if self._layers_of(set(self.hooks.names), local):
                self._in_scan[local] = value
        elif name in self.hooks.names:
            self.kept[name] = value
        return value

    def _layers_of(self, names: set[str], local: str) -> list[int]:
        return [i for i in range(self.config.num_hidden_layers) if f"blocks.{i}.{local}" in names]

    def _active(self, names: set[str], name: str, local: str) -> Any:
        """Whether these names include the point: a bool, or a traced one under `lax.scan`."""
        if "*" not in name:
            return name in names
        layers = self._layers_of(names, local)
        if len(layers) in (0, self.config.num_hidden_layers):
            return bool(layers)
        return (jnp.asarray(layers) == self._layer).any()

    def _edited(self, edit: Intervention, value: Array, hook: Hook, axes: str, active: Any) -> Array:
        chosen, out_of_range = [] if active is True else [active], []
        for indices, letter in ((edit.rows, "B"), (edit.heads, "H"), (edit.neurons, "F")):
            if indices is not None:
                size = value.shape[axes.index(letter)]
                mask, wrong = _is_in(jnp.arange(size, dtype=jnp.int32), indices, size)
                chosen.append(mask.reshape([-1 if letter == axis else 1 for axis in axes]))
                out_of_range.append(wrong)
        if edit.positions is not None:
            wanted = jnp.asarray(edit.positions).reshape(-1)[:, None, None]
            real = self.positions >= 0
            mask = jnp.where(wanted < 0, self.from_end[None] == wanted, self.positions[None] == wanted)
            mask = mask.any(axis=0) & real
            shape = {"B": mask.shape[0], "T": mask.shape[1]}
            chosen.append(mask.reshape([shape.get(axis, 1) for axis in axes]))
        if edit.layers is not None:
            mask, wrong = _is_in(jnp.asarray(hook.layer, jnp.int32), edit.layers, self.config.num_hidden_layers)
            chosen.append(mask)
            out_of_range.append(wrong)
        new = edit.changed(value, hook)
        for wrong in out_of_range:
            new = jnp.where(wrong, jnp.nan, new)
        if not chosen:
            return new
        where = chosen[0]
        for mask in chosen[1:]:
            where = where & mask
        return jnp.where(where, new, value)

    def in_layer(self, layer: Callable[..., Any], number: int, wrap: Callable[..., Any]) -> Callable[..., Any]:
        """See `hooks.in_layer`. What the layer keeps leaves the rematerialised function as a result of it."""

        def run(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Array]]:
            before, self.kept, self._layer = self.kept, {}, number
            try:
                return layer(*args, **kwargs), self.kept
            finally:
                self.kept, self._layer = before, None

        def unwrapped(*args: Any, **kwargs: Any) -> Any:
            result, kept = wrap(run)(*args, **kwargs)
            self.kept |= kept
            return result

        return unwrapped

    def scan(self, body: Callable[..., Any], wrap: Callable[..., Any], carry: Any, layers: Any) -> Any:
        """See `hooks.scan`. Buffers for the points of the layers that were asked for are carried along."""

        def run(carry: Any, numbered: tuple[Any, Any]) -> tuple[Any, dict[str, Array]]:
            self._layer, layer = numbered
            self._in_scan = {}
            try:
                return body(carry, layer), self._in_scan
            finally:
                self._layer = self._in_scan = None

        depth = self.config.num_hidden_layers
        numbered = (jnp.arange(depth, dtype=jnp.int32), layers)
        _, shapes = jax.eval_shape(
            run, carry, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), numbered)
        )
        asked = {local: self._layers_of(set(self.hooks.names), local) for local in shapes}
        place = {
            local: jnp.asarray([kept.index(i) if i in kept else depth for i in range(depth)], jnp.int32)
            for local, kept in asked.items()
        }
        buffers = {local: jnp.zeros((len(asked[local]), *x.shape), x.dtype) for local, x in shapes.items()}
        wrapped = wrap(run)

        def step(carry: tuple[Any, Any], numbered: tuple[Any, Any]) -> tuple[Any, Any]:
            (new, result), kept = wrapped(carry[0], numbered)
            put = {k: b.at[place[k][numbered[0]]].set(kept[k], mode="drop") for k, b in carry[1].items()}
            return (new, put), result

        (carry, buffers), results = lax.scan(step, (carry, buffers), numbered)
        for local, kept in asked.items():
            self.kept |= {f"blocks.{i}.{local}": buffers[local][n] for n, i in enumerate(kept)}
        return carry, results

    def _normalized(self, local: str, norm: LayerNorm, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The output of a LayerNorm whose `hook_scale` is read or changed."""
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        scale = jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + norm.epsilon)
        y = centred / self._visit(local.replace("normalized", "scale"), scale)
        if norm.scale is not None:
            y = y * norm.scale.get_value().astype(jnp.float32)[None, None]
        if norm.bias is not None:
            y = y + norm.bias.get_value().astype(jnp.float32)[None, None]
        return y.astype(norm.dtype)

    def _sum_of_heads(self, project: Any, z: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """The output of `out_proj` from what each head adds to it (`hook_result`)."""
        heads = z.shape[2]
        alone = jnp.where(jnp.eye(heads, dtype=bool)[None, None, :, :, None], z[:, :, None], jnp.zeros((), z.dtype))
        bias = project(jnp.zeros((1, 1, heads * z.shape[3]), z.dtype))
        result = project(alone.reshape(*z.shape[:2], heads, -1)) - bias[:, :, None]
        return self._visit("attn.hook_result", result).sum(axis=2) + bias


def _is_in(index: Array, wanted: Any, size: int) -> tuple[Bool[Array, "..."], Bool[Array, ""]]:
    """Where `index` is one of the wanted indices, and whether one of these is outside the axis.

    (A wrong index that is known before tracing is an error; a traced one gives NaN, as a wrong token id does.)
    """
    wanted = jnp.asarray(wanted).reshape(-1)
    mask = (index.reshape(-1, 1) == jnp.where(wanted < 0, wanted + size, wanted)[None]).any(axis=-1)
    return mask.reshape(index.shape), ((wanted >= size) | (wanted < -size)).any()
