"""Prompts as callers give them, on the host, and as compiled code takes them: padded on the left, to a few widths."""

import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from opt_jax.generation.loop import Prompts
from opt_jax.model.cache import KVCache
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.ids import as_ids, as_mask
from opt_jax.model.inputs import check_inputs


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Tokens before the prompts, with their keys and values: of all prompts (one row), or of each one (B rows).

    `prefill` returns one row, and `generate(..., return_cache=True)` one for each row of its result.
    """

    input_ids: Int32[np.ndarray, "b P"]  # padded on the left
    mask: Bool[np.ndarray, "b P"]
    cache: KVCache  # b rows, without the last `unread` tokens
    unread: int = 0  # 1: the model has not read the last token yet

    @property
    def lengths(self) -> Int32[np.ndarray, " b"]:
        """Number of tokens in each row."""
        return self.mask.sum(1, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class GivenPrompts:
    """The checked prompts of a call."""

    ids: Int32[np.ndarray, "B t"]  # what a row of the result begins with: t = T, or 0 for embeddings alone
    mask: Bool[np.ndarray, "B T"]  # true at real tokens
    embeds: Float[np.ndarray, "B T P"] | None
    widths: Int[np.ndarray, " B"]  # their lengths for `max_length`: with pads (as in HF), unless they were ragged lists

    def texts(self) -> list[Int32[np.ndarray, " n"]]:
        """The tokens of each row, without pads."""
        return [row[mask[: len(row)]] for row, mask in zip(self.ids, self.mask, strict=True)]


def bucket(size: int, least: int = 16) -> int:
    """`size` rounded up to one of 16, 24, 32, 48, 64, 96, ...: few shapes to compile, at most a third wasted."""
    full = least
    while full < size:
        full *= 2
    return full * 3 // 4 if full > least and full % 4 == 0 and size <= full * 3 // 4 else full


def batch_bucket(rows: int) -> int:
    """`rows` rounded up to one of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    return bucket(rows, 1)


def given_prompts(
    model: OPTForCausalLM,
    input_ids: Any,
    attention_mask: Any,
    inputs_embeds: Any,
    prefix: Prefix | None,
    pad: int,
    pad_is_end: bool,
) -> GivenPrompts:
    """The prompts of `generate`, checked, with pads behind a row's last token moved before its first.

    Raises:
      ValueError: see `generate`.

    Warns:
      UserWarning: a row was padded on the right.
    """
    if input_ids is None and inputs_embeds is None:
        if prefix is None or not prefix.unread:
            raise ValueError("give input_ids or inputs_embeds: the model has read all tokens so far")
        rows = len(prefix.input_ids)
        return GivenPrompts(np.zeros((rows, 0), np.int32), np.zeros((rows, 0), bool), None, np.zeros(rows, np.int32))
    embeds = None if inputs_embeds is None else _check_embeds(model, inputs_embeds)
    ids, ragged = _rectangle(input_ids, attention_mask, model.config.max_position_embeddings)
    if ids is not None:
        ids = check_ids_of(model, ids)
        if embeds is not None and embeds.shape[:2] != ids.shape:
            raise ValueError(f"inputs_embeds must be those of input_ids, {ids.shape}, not {embeds.shape[:2]}")
        if ragged is not None:
            ids = np.where(ragged, ids, pad).astype(np.int32)
        mask = check_mask(ids, attention_mask, None if pad_is_end else pad)
        mask = mask if ragged is None else mask & ragged
    else:
        assert embeds is not None
        ids = np.zeros(embeds.shape[:2], np.int32)
        mask = check_mask(ids, attention_mask, None)
    mask, ids, embeds = _to_the_left(mask, ids, embeds)
    widths = np.full(len(mask), mask.shape[1]) if ragged is None else ragged.sum(1)
    return GivenPrompts(ids if input_ids is not None else ids[:, :0], mask, embeds, widths)


def _check_embeds(model: OPTForCausalLM, inputs_embeds: Any) -> np.ndarray:
    embeds = check_inputs(model, {"inputs_embeds": inputs_embeds})["inputs_embeds"]
    return np.asarray(embeds).astype(model.dtype)


def check_ids_of(model: OPTForCausalLM, input_ids: Any, unread: int = 0) -> Int32[np.ndarray, "B T"]:
    """The ids on the host, of at most `unread` more tokens than the model has positions."""
    longer = getattr(input_ids, "shape", ())[1:] == (model.config.max_position_embeddings + unread,)
    parts = np.split(np.asarray(input_ids), [unread], axis=1) if longer and unread else [input_ids]
    return np.concatenate([check_inputs(model, {"input_ids": part})["input_ids"] for part in parts], axis=1)


def _rectangle(input_ids: Any, attention_mask: Any, limit: int) -> tuple[Any, np.ndarray | None]:
    """An array padded on the left and its mask, for prompts of different lengths. Other inputs as given, and None."""
    if not isinstance(input_ids, Sequence) or not all(hasattr(row, "__len__") for row in input_ids):
        return input_ids, None
    lengths = np.array([len(row) for row in input_ids])
    if attention_mask is not None or len(set(lengths.tolist())) < 2:
        return input_ids, None
    if not lengths.all():
        raise ValueError(f"row {int(np.argmin(lengths))} has no token: start empty prompts with the BOS token")
    if lengths.max() > limit:  # before the array is allocated
        raise ValueError(f"{lengths.max()} tokens are more than max_position_embeddings={limit}")
    mask = np.arange(lengths.max())[::-1] < lengths[:, None]
    rows = [as_ids(f"row {i} of input_ids", row) for i, row in enumerate(input_ids)]
    if nested := [i for i, row in enumerate(rows) if row.ndim != 1]:
        raise ValueError(f"row {nested[0]} of input_ids must be a sequence of token ids")
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def check_mask(ids: np.ndarray, attention_mask: Any, pad: int | None) -> Bool[np.ndarray, "B T"]:
    """The mask [B, T], true at real tokens."""
    mask = ids != pad if attention_mask is None else as_mask("attention_mask", attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be of the shape of input_ids, {ids.shape}, not {mask.shape}")
    if not mask.any(1).all():
        raise ValueError(f"row {int(np.argmin(mask.any(1)))} has no token: start empty prompts with the BOS token")
    return mask


def _to_the_left(mask: np.ndarray, *arrays: Any) -> list[Any]:
    """The mask and the arrays [B, T, ...], rotated so that each row ends with a real token. Holes stay."""
    shift, columns = mask[:, ::-1].argmax(1), np.arange(mask.shape[1])
    if not shift.any():
        return [mask, *arrays]
    warnings.warn("prompts padded on the right were moved to the right end of their rows, pads first", stacklevel=4)
    return _taken((columns - shift[:, None]) % len(columns), mask, *arrays)


def align(mask: np.ndarray, limit: int, *arrays: Any, unread: int = 0) -> list[Any]:
    """The mask and the arrays [B, T, ...] with all pads moved to the left, cut or padded to a bucket."""
    width = int(mask.sum(1).max())
    fill = min(bucket(width - unread), limit) + unread - width
    moved = _taken(np.argsort(mask, axis=1, kind="stable"), mask, *arrays)
    pads = lambda x: ((0, 0), (fill, 0), *((0, 0) for _ in x.shape[2:]))  # noqa: E731
    return [None if x is None else np.pad(x[:, x.shape[1] - width :], pads(x)) for x in moved]


def _taken(columns: np.ndarray, *arrays: Any) -> list[Any]:
    """x[b, columns[b]] for each row b of each array; None for None."""
    index = lambda x: columns.reshape(*columns.shape, *[1] * (x.ndim - 2))  # noqa: E731
    return [None if x is None else np.take_along_axis(x, index(x), axis=1) for x in arrays]


def check_prefix(model: OPTForCausalLM, prefix: Any) -> Prefix | None:
    """The prefix; ValueError if it is not one of this model."""
    if prefix is None:
        return None
    if not isinstance(prefix, Prefix):
        raise ValueError(f"cache must be what model.prefill returns, not a {type(prefix).__name__}")
    config, keys = model.config, prefix.cache.k
    shape = (config.num_hidden_layers, config.num_attention_heads, config.head_dim)
    if (len(keys), keys[0].shape[1], keys[0].shape[3]) != shape:
        raise ValueError("cache is from a model of another shape: call prefill of this model")
    return prefix


def broadcast(prefix: Prefix, rows: int) -> tuple[Int32[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """The tokens and the mask of a prefix, for each of the prompts."""
    if len(prefix.input_ids) not in (1, rows):
        raise ValueError(f"cache has {len(prefix.input_ids)} rows for {rows} prompts: it needs one, or one for each")
    ids, mask = (np.broadcast_to(x, (rows, x.shape[1])) for x in (prefix.input_ids, prefix.mask))
    return ids, mask


def compiled_prompts(given: GivenPrompts, prefix: Prefix | None, limit: int) -> Prompts:
    """The prompts, and the prefix before them, for compiled code."""
    alone = given.ids.shape != given.mask.shape  # embeddings without ids: no token is known
    ids, mask = (np.zeros(given.mask.shape, np.int32) if alone else given.ids), given.mask
    if prefix is None:
        mask, ids, embeds = align(mask, limit, ids, given.embeds)
        lengths = np.zeros(len(ids), np.int32) if alone else mask.sum(1, dtype=np.int32)
        return Prompts(ids if embeds is None else None, mask, ids, lengths, embeds=embeds)
    before, known = broadcast(prefix, len(ids))
    read = before.shape[1] - prefix.unread  # the columns that the cache holds
    mask, ids = align(np.hstack([known[:, read:], mask]), limit, np.hstack([before[:, read:], ids]))
    every, all_ids = np.hstack([known[:, :read], mask]), np.hstack([before[:, :read], ids])
    (tokens,) = _taken(np.argsort(every, axis=1, kind="stable"), all_ids)
    fill = prefix.cache.max_length - read  # to the width of the two buckets, of prefix and prompts
    tokens = np.pad(tokens, ((0, 0), (fill, 0)))
    return Prompts(ids, mask, tokens, every.sum(1, dtype=np.int32), prefix.cache)


def take_prompts(prompts: Prompts, rows: np.ndarray, cut: bool = True) -> Prompts:
    """The given rows of the prompts, cut to the bucket of the longest of them unless told not to."""
    mask, ids, embeds = prompts.mask[rows], *(None if x is None else x[rows] for x in (prompts.ids, prompts.embeds))
    if cut:
        mask, ids, embeds = align(mask, mask.shape[1], ids, embeds)
    matched, prefix = None if prompts.matched is None else prompts.matched[rows], prompts.prefix
    if prefix is not None and prefix.batch_size > 1 and not np.array_equal(rows, np.arange(prefix.batch_size)):
        prefix = _take_rows(prefix, rows)
    return Prompts(ids, mask, prompts.tokens[rows], prompts.lengths[rows], prefix, matched, embeds)


def continued(prompts: Prompts, copies: int, tokens: np.ndarray, lengths: np.ndarray, cache: KVCache) -> Prefix:
    """The rows after a call of `generate`, for the next one.

    Args:
      prompts: those of the call.
      copies: number of rows for each prompt.
      tokens: [R, N], the new tokens. The cache has all but the last one of each row.
      lengths: [R], their numbers.
      cache: the cache after the last step. It may have more rows, and pads after a row's end as if they were tokens.
    """
    rows, width = np.arange(len(tokens)) // copies, prompts.tokens.shape[1]
    known = np.arange(width) >= width - prompts.lengths[rows, None]
    every = np.hstack([known, np.arange(tokens.shape[1]) < lengths[:, None]])
    ids = np.hstack([prompts.tokens[rows], tokens])
    mask, ids = _taken(np.argsort(every, axis=1, kind="stable"), every, ids)
    count = mask.sum(1, dtype=np.int32)
    columns = min(bucket(int(count.max()) - 1), cache.max_length)
    longest = np.s_[:, ids.shape[1] - int(count.max()) :]
    return Prefix(ids[longest], mask[longest], _settled(cache, count - 1, columns=columns), unread=1)


# Compiled -----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="columns")
def _settled(cache: KVCache, count: Int[Array, " R"], *, columns: int) -> KVCache:
    """The first R rows of a cache. Row r keeps its first count[r] tokens, in the first columns."""
    cache = jax.tree.map(lambda x: x[: count.size] if x.ndim else x, cache)
    valid = cache.valid & (jnp.cumsum(cache.valid, axis=1, dtype=jnp.int32) <= count[:, None])
    cache = dataclasses.replace(cache, valid=valid, next_position=count).compact()
    k, v = jax.tree.map(lambda x: x[:, :, :columns], (cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v, valid=cache.valid[:, :columns])


@jax.jit
def _take_rows(cache: KVCache, rows: np.ndarray) -> KVCache:
    return jax.tree.map(lambda x: x[rows] if x.ndim else x, cache)
