"""A call with hooks, while JAX traces it: what the calls of `hooks.point` do then."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from opt_jax.model import hooks
from opt_jax.model.decoder import DecoderInputs, LayerNorm, OPTDecoder, positions_of
from opt_jax.model.hook_points import POINTS, find_points, is_outside, local_name
from opt_jax.model.interventions import Hook, Hooks, Intervention, as_hooks
from opt_jax.model.outputs import BaseModelOutput
from opt_jax.parallel.rules import constrain, is_per_device


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
            local_name(name) for names in (set(asked.names), *(names for names, _ in self.edits)) for name in names
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
        given, outside, traced = value, is_outside(local), isinstance(self._layer, jax.core.Tracer)
        name = local if outside else f"blocks.{'*' if traced else self._layer}.{local}"
        hook = Hook(name, None if outside else self._layer)
        for names, edits in self.edits:
            active = self._active(names, name, local)
            for edit in edits if active is not False else ():
                value = self._edited(edit, value, hook, POINTS[local][0], active)
        if local == "attn.hook_attn_scores":  # doubled, hidden scores would be infinite, and a pad's weights NaN
            value = jnp.where(given == jnp.finfo(given.dtype).min, given, value)
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
        if chosen:
            where = chosen[0]
            for mask in chosen[1:]:
                where = where & mask
            new = jnp.where(where, new, value)
        for wrong in out_of_range:
            new = jnp.where(wrong, jnp.nan, new)
        return new

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
        if getattr(project, "activation_bits", None) is not None:
            raise ValueError(
                "attn.hook_result is no sum of heads where out_proj rounds its inputs (activation_bits): use "
                "opt_jax.dequantize(model)"
            )
        heads = z.shape[2]
        alone = jnp.where(jnp.eye(heads, dtype=bool)[None, None, :, :, None], z[:, :, None], jnp.zeros((), z.dtype))
        bias = project(jnp.zeros((1, 1, heads * z.shape[3]), z.dtype))
        alone = project(alone.reshape(-1, heads, bias.shape[-1]))  # an int8 product takes three axes
        result = alone.reshape(*z.shape[:3], -1) - bias[:, :, None]
        result = constrain(result.transpose(0, 2, 1, 3), "heads").transpose(0, 2, 1, 3)
        return self._visit("attn.hook_result", result).sum(axis=2) + bias


def _is_in(index: Array, wanted: Any, size: int) -> tuple[Bool[Array, "..."], Bool[Array, ""]]:
    """Where `index` is one of the wanted indices, and whether one of these is outside the axis.

    (A wrong index that is known before tracing is an error; a traced one gives NaN, as a wrong token id does.)
    """
    wanted = jnp.asarray(wanted).reshape(-1)
    mask = (index.reshape(-1, 1) == jnp.where(wanted < 0, wanted + size, wanted)[None]).any(axis=-1)
    return mask.reshape(index.shape), ((wanted >= size) | (wanted < -size)).any()
