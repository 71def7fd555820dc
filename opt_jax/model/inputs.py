"""Checks of a model's inputs: shapes always, values only outside of `jax.jit`, where they are known."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from opt_jax.model.cache import KVCache
from opt_jax.model.ids import LEAST, MOST, as_array, check_integers, check_mask, check_range
from opt_jax.model.outputs import problem_type
from opt_jax.system.messages import shown

_INTEGERS = ("input_ids", "position_ids", "segment_ids", "start_positions", "end_positions")


def check_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of `OPTPreTrainedModel.__call__` that are not None, as JAX arrays.

    Raises:
      ValueError: an argument is invalid. The message names it.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if ("input_ids" in inputs) == ("inputs_embeds" in inputs):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    config, cache = model.config, inputs.get("cache")
    for name in ("attention_mask", "inputs_embeds", "labels", *_INTEGERS):
        if name in inputs:
            inputs[name] = _array(name, inputs[name])

    if "input_ids" in inputs:
        ids = inputs["input_ids"]
        if ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, tokens], not of shape {ids.shape}")
        inputs["input_ids"] = _within("input_ids", ids, 0, config.vocab_size - 1)
    else:
        embeds = inputs["inputs_embeds"]
        if embeds.ndim != 3 or embeds.shape[2] != config.word_embed_proj_dim:
            raise ValueError(
                f"inputs_embeds must be [batch, tokens, word_embed_proj_dim={config.word_embed_proj_dim}], "
                f"not of shape {embeds.shape}"
            )
    batch, length = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"inputs are empty: batch {batch}, {length} tokens")
    if length > config.max_position_embeddings:
        raise ValueError(f"{length} tokens are more than max_position_embeddings={config.max_position_embeddings}")

    if "attention_mask" in inputs:
        inputs["attention_mask"] = _check_mask(inputs["attention_mask"], batch, length, cache)
    for name in ("position_ids", "segment_ids"):
        if name in inputs:
            _check_shape(name, inputs[name], batch, length)
    if "position_ids" in inputs:
        inputs["position_ids"] = _within("position_ids", inputs["position_ids"], -1, config.max_position_embeddings - 1)
    if "labels" in inputs:
        _check_labels(model, inputs, batch, length)
    _check_answers(inputs, batch)
    _check_options(inputs, length)
    if cache is not None:
        if "segment_ids" in inputs:
            raise ValueError("segment_ids cannot be combined with a cache: a cache holds one segment per row")
        _check_cache(config, cache, batch, inputs.get("attention_mask"), length)
    return inputs


def _array(name: str, value: Any) -> jax.Array:
    """`value` as a JAX array; ids and integer labels as int32, checked before the cast."""
    array = value if isinstance(value, jax.Array) else as_array(name, value)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"{name} must be numbers, not {array.dtype}")
    if name in _INTEGERS:
        check_integers(name, array)
    if name in _INTEGERS or (name == "labels" and np.issubdtype(array.dtype, np.integer)):
        if _is_known(array):
            check_range(name, array)
        if isinstance(array, np.ndarray):  # cast here, because jnp.asarray compiles a conversion for every shape
            array = array.astype(np.int32)
        elif not _is_known(array):
            array = _cap(array)
        return jnp.asarray(array, jnp.int32)  # without a dtype, it would compile a copy of a NumPy array
    if name == "attention_mask" and array.dtype != bool:
        if _is_known(array):
            check_mask(name, np.asarray(array))
        if isinstance(array, np.ndarray):
            array = array != 0  # a cast to float32 would turn 1e-300 into 0
    return jnp.asarray(array)


def _within(name: str, x: jax.Array, low: int, high: int) -> jax.Array:
    """The ids, checked. Under `jax.jit` an id below `low` becomes the largest int32, for which the result is NaN.

    (A negative id would index the table from its end. An id above `high` gives NaN by itself.)
    """
    if _is_known(x):
        check_range(name, x, low, high)
        return x
    return jnp.where(x < low, jnp.int32(MOST), x)


def _cap(x: jax.Array) -> jax.Array:
    """The ids as int32. Under `jax.jit` a value outside of int32 becomes the largest int32, which gives NaN.

    (A cast would wrap it to another id.) Arrays whose dtype fits into int32 are returned unchanged.
    """
    limits = jnp.iinfo(x.dtype)
    if LEAST <= limits.min and limits.max <= MOST:
        return x
    low, high = x.dtype.type(max(LEAST, int(limits.min))), x.dtype.type(MOST)
    return jnp.where((x < low) | (x > high), high, x)


def _is_known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _check_shape(name: str, array: jax.Array, batch: int, length: int) -> None:
    if array.shape != (batch, length):
        raise ValueError(f"{name} must be [batch={batch}, tokens={length}], not of shape {array.shape}")


def _check_mask(mask: jax.Array, batch: int, length: int, cache: KVCache | None) -> jax.Array:
    """The mask as bool [B, T]. With a cache, HF's [B, past + T] is accepted, and the past is cut off."""
    if cache is not None and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] > length:
        if _is_known(cache.column) and mask.shape[1] != int(cache.column) + length:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens, but the cache holds {int(cache.column)} and "
                f"{length} are new"
            )
        mask = mask[:, -length:]
    _check_shape("attention_mask", mask, batch, length)
    return mask.astype(bool)


def _check_labels(model: Any, inputs: dict[str, Any], batch: int, length: int) -> None:
    labels, config = inputs["labels"], model.config
    if hasattr(model, "lm_head"):
        if inputs.get("logits_to_keep"):
            raise ValueError("labels need all logits: leave logits_to_keep at 0")
        _check_shape("labels", labels, batch, length)
        _check_classes("labels", labels, config.vocab_size)
    elif hasattr(model, "score"):
        shapes, kind = [(batch,), (batch, 1)], problem_type(config, labels.dtype)
        if kind != "single_label_classification":
            shapes = [(batch, config.num_labels)] + (shapes[:1] if config.num_labels == 1 else [])
        if labels.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"labels for {kind} must be of shape {expected}, not {labels.shape}")
        if kind == "single_label_classification":
            _check_classes(f"labels for {kind}", labels, config.num_labels)


def _check_classes(name: str, labels: jax.Array, count: int) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, not {labels.dtype}")
    if _is_known(labels):
        check_range("labels", np.where(np.asarray(labels) == -100, 0, labels), 0, count - 1)


def _check_answers(inputs: dict[str, Any], batch: int) -> None:
    names = [name for name in ("start_positions", "end_positions") if name in inputs]
    if len(names) == 1:
        raise ValueError(f"{names[0]} alone gives no loss: give start_positions and end_positions")
    for name in names:
        if inputs[name].shape not in ((batch,), (batch, 1)):
            raise ValueError(f"{name} must be [batch={batch}], not of shape {inputs[name].shape}")


def _check_options(inputs: dict[str, Any], length: int) -> None:
    if "logits_to_keep" in inputs:
        keep = inputs["logits_to_keep"]
        if not isinstance(keep, (int, np.integer)) or not 0 <= keep <= length:
            raise ValueError(f"logits_to_keep={shown(keep)} must be between 0 (all) and the number of tokens, {length}")
        inputs["logits_to_keep"] = int(keep)
    for name in ("output_hidden_states", "output_attentions"):
        if name in inputs:
            inputs[name] = bool(inputs[name])
    if "dropout_key" in inputs and not isinstance(inputs["dropout_key"], (jax.Array, np.ndarray)):
        raise ValueError(f"dropout_key must be a key such as jax.random.key(0), not {shown(inputs['dropout_key'])}")


def _check_cache(config: Any, cache: KVCache, batch: int, mask: jax.Array | None, length: int) -> None:
    shape = (config.num_hidden_layers, batch, config.num_attention_heads, cache.max_length, config.head_dim)
    if (len(cache.k), *cache.k[0].shape) != shape:
        raise ValueError(
            f"the cache is for (layers, batch, heads, length, head_dim) = {(len(cache.k), *cache.k[0].shape)}, "
            f"this call needs {shape}"
        )
    if _is_known(cache.column) and int(cache.column) + length > cache.max_length:
        raise ValueError(
            f"the cache has room for {cache.max_length - int(cache.column)} more tokens, not {length}: "
            "make it longer with init_cache"
        )
    if _is_known(cache.next_position) and (mask is None or _is_known(mask)):
        new = length if mask is None else np.asarray(mask).sum(1)  # a pad takes no position
        most = int((np.asarray(cache.next_position) + new).max())
        if most > config.max_position_embeddings:
            raise ValueError(f"position {most} exceeds max_position_embeddings={config.max_position_embeddings}")
