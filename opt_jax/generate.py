"""Prompts to continuations: prefill, the compiled decode loop, streaming. Ids only, no text.

Two compiled functions do the work: `_prefill` reads the prompts and chooses the first token, `_decode` makes steps
until told to stop. Prompts are padded on the left to a few fixed lengths (`bucket`), so that each is compiled once per
bucket, batch size and kind of decoding (greedy or sampling); everything else is a traced value.
"""

import dataclasses
import math
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from opt_jax import sampling
from opt_jax.cache import KVCache
from opt_jax.inputs import check_inputs
from opt_jax.model import OPTForCausalLM
from opt_jax.sampling import SamplingOptions

DEFAULT_NEW_TOKENS = 20  # HF's
_EOS_SLOTS = 8  # more end tokens than this compile anew


@dataclasses.dataclass(frozen=True, eq=False)
class GenerateOutput:
    """What `generate` returns. Indexing, iterating and `len` go to the rows, as with the tensor that HF returns."""

    sequences: np.ndarray  # int32 [B, T + new]: the prompts as given, then the new tokens, pads after the end token

    def __getitem__(self, index: Any) -> Any:
        return self.sequences[index]

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.sequences)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Between two steps. `tokens[:, c]` is the token of cache column c; the last one is not in the cache yet."""

    cache: KVCache
    tokens: Int[Array, "B L"]
    step: Int[Array, ""]  # new tokens so far
    done: Bool[Array, " B"]  # rows that have ended


@dataclasses.dataclass(frozen=True)
class _Request:
    """The checked arguments of `generate`."""

    input_ids: np.ndarray  # [B, T] as given
    padded_ids: np.ndarray  # [B, bucket]
    mask: np.ndarray  # bool [B, bucket]
    max_new_tokens: int
    options: SamplingOptions
    do_sample: bool

    @property
    def cache_length(self) -> int:
        return bucket(self.padded_ids.shape[1] + self.max_new_tokens)


def generate(
    model: OPTForCausalLM,
    input_ids: Any,
    attention_mask: Any = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
) -> GenerateOutput:
    """Continue each prompt until its end token, all with one prefill and one compiled loop (HF `generate`).

    Args:
      input_ids: int [B, T], numpy, jax or nested lists; prompts of different lengths padded on the left.
      attention_mask: [B, T], nonzero at real tokens. Default as in HF: ids other than `pad_token_id`, if that is not an
        end token; else all.
      max_new_tokens: the most tokens to add to a prompt.
      max_length: the same, as length of the result, T included. Give one of the two; with neither, 20 new tokens, or
        what the context has room for.
      min_new_tokens: no end token before so many new ones.
      do_sample: draw at random, after temperature, top_k and top_p, in this order; False: the most likely token.
      temperature: above 0; less than 1 is less random.
      top_k: draw from the k most likely tokens only; None or 0: from all (HF: 50 unless told otherwise).
      top_p: draw from the fewest most likely tokens with this much probability; None or 1: from all.
      eos_token_id: one or several end tokens; default: the config's; []: none.
      pad_token_id: fills rows that have ended; default: the config's, else the first end token.
      seed: in [0, 2**32). The same call gives the same tokens. A row depends on its number, not on the other rows.

    Raises:
      ValueError: options that contradict each other or have no effect, prompts without a token or padded on the right,
        more positions than the model has, a stacked model (see `unstack_layers`), or one without LM head.
    """
    request = _check(
        model, input_ids, attention_mask, max_new_tokens, max_length, min_new_tokens, do_sample, temperature, top_k,
        top_p, eos_token_id, pad_token_id, seed,
    )  # fmt: skip
    state, _, _ = _start(model, request)
    state, _, _ = _decode(model, state, request.options, np.int32(request.max_new_tokens), do_sample=request.do_sample)
    tokens, step = jax.device_get((state.tokens, state.step))
    first = request.padded_ids.shape[1]
    return GenerateOutput(np.concatenate([request.input_ids, tokens[:, first : first + int(step)]], axis=1))


def stream(
    model: OPTForCausalLM, input_ids: Any, attention_mask: Any = None, **options: Any
) -> Generator[np.ndarray, None, None]:
    """The same tokens as they are made: an iterator of int32 [B], one for each step, pads for rows that have ended.

    Takes the arguments of `generate` and raises the same errors, at once. The device works on the next token while
    the caller works with this one.
    """
    return _stream(model, _check(model, input_ids, attention_mask, **options))


def _stream(model: OPTForCausalLM, request: _Request) -> Generator[np.ndarray, None, None]:
    following = _start(model, request)
    for step in range(1, request.max_new_tokens + 1):
        state, token, finished = following
        if step < request.max_new_tokens:  # dispatched before waiting for this token; does nothing if that was the last
            until = np.int32(step + 1)
            following = _decode(model, state, request.options, until, do_sample=request.do_sample)
        yield np.asarray(token)
        if finished:
            return


def bucket(length: int) -> int:
    """`length` rounded up to one of 16, 24, 32, 48, 64, 96, ...: few shapes to compile, at most a third wasted."""
    size = 16
    while size < length:
        size *= 2
    return size * 3 // 4 if 16 < size and length <= size * 3 // 4 else size


# Compiled -----------------------------------------------------------------------------------------------------


def _start(model: OPTForCausalLM, request: _Request):
    return _prefill(
        model, request.padded_ids, request.mask, request.options,
        cache_length=request.cache_length, do_sample=request.do_sample,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("cache_length", "do_sample"))
def _prefill(
    model: OPTForCausalLM,
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    options: SamplingOptions,
    *,
    cache_length: int,
    do_sample: bool,
) -> tuple[DecodeState, Int[Array, " B"], Bool[Array, ""]]:
    """Read the prompts and choose the first new token. Returns as `_decode`."""
    batch = ids.shape[0]
    out = model.forward(ids, mask, cache=model.init_cache(batch, cache_length), logits_to_keep=1)
    assert out.cache is not None
    tokens = jnp.pad(ids, ((0, 0), (0, cache_length - ids.shape[1])))
    state = DecodeState(out.cache, tokens, jnp.zeros((), jnp.int32), jnp.zeros((batch,), bool))
    return _report(_append(state, out.logits[:, -1], options, do_sample))


@partial(jax.jit, static_argnames="do_sample", donate_argnames="state")
def _decode(
    model: OPTForCausalLM, state: DecodeState, options: SamplingOptions, until: Int[Array, ""], *, do_sample: bool
) -> tuple[DecodeState, Int[Array, " B"], Bool[Array, ""]]:
    """Steps until there are `until` new tokens or every row has ended.

    Returns the state, for the next call to consume, and two arrays to keep: the last tokens, and whether that was all.
    """

    def step(state: DecodeState) -> DecodeState:
        out = model.forward(_last_token(state), cache=state.cache)
        return _append(dataclasses.replace(state, cache=out.cache), out.logits[:, -1], options, do_sample)

    return _report(lax.while_loop(lambda s: (s.step < until) & ~s.done.all(), step, state))


def _append(state: DecodeState, logits: Float[Array, "B V"], options: SamplingOptions, do_sample: bool) -> DecodeState:
    """Choose a token for each row that goes on, a pad for the others."""
    token = sampling.choose(logits, state.step, options, do_sample)
    token = jnp.where(state.done, options.pad_token_id, token)
    return DecodeState(
        cache=state.cache,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.cache.column)),
        step=state.step + 1,
        done=state.done | (token[:, None] == options.eos_token_ids).any(-1),
    )


def _report(state: DecodeState) -> tuple[DecodeState, Int[Array, " B"], Bool[Array, ""]]:
    return state, _last_token(state)[:, 0], state.done.all()


def _last_token(state: DecodeState) -> Int[Array, "B 1"]:
    return lax.dynamic_slice_in_dim(state.tokens, state.cache.column, 1, axis=1)


# Checks -------------------------------------------------------------------------------------------------------


def _check(
    model, input_ids, attention_mask=None, max_new_tokens=None, max_length=None, min_new_tokens=0, do_sample=False,
    temperature=1.0, top_k=None, top_p=None, eos_token_id=None, pad_token_id=None, seed=0,
) -> _Request:  # fmt: skip
    if not isinstance(model, OPTForCausalLM):
        raise ValueError(f"generation needs an OPTForCausalLM, not an {type(model).__name__}")
    config = model.config
    ids = np.asarray(check_inputs(model, {"input_ids": input_ids})["input_ids"])
    eos_token_id = config.eos_token_id if eos_token_id is None else eos_token_id
    eos = [int(i) for i in np.atleast_1d([] if eos_token_id is None else eos_token_id)]
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    pad = (eos or [0])[0] if pad is None else int(pad)
    for name, i in [*(("eos_token_id", i) for i in eos), ("pad_token_id", pad)]:
        if not 0 <= i < config.vocab_size:
            raise ValueError(f"{name} holds {i}, outside [0, {config.vocab_size - 1}]; for no end token use []")
    mask = _check_mask(ids, attention_mask, None if pad in eos else pad)
    width, room = ids.shape[1], config.max_position_embeddings - int(mask.sum(1).max())
    max_new_tokens = _check_length(width, room, config, max_new_tokens, max_length)
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"min_new_tokens={min_new_tokens} must be in [0, {max_new_tokens}], the most new tokens")
    _check_sampling(do_sample, temperature, top_k, top_p)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be in [0, 2**32)")

    def scalar(dtype, value):
        return jax.device_put(dtype(value))  # jnp.asarray would compile something for every dtype

    slots = math.ceil(max(len(eos), 1) / _EOS_SLOTS) * _EOS_SLOTS
    options = SamplingOptions(
        temperature=scalar(np.float32, temperature),
        top_k=scalar(np.int32, min(top_k or 0, config.vocab_size)),
        top_p=scalar(np.float32, 1.0 if top_p is None else top_p),
        seed=scalar(np.uint32, seed),
        eos_token_ids=jax.device_put(np.array(eos + [config.vocab_size] * (slots - len(eos)), np.int32)),
        pad_token_id=scalar(np.int32, pad),
        min_new_tokens=scalar(np.int32, min_new_tokens),
    )
    fill = ((0, 0), (min(bucket(width), config.max_position_embeddings) - width, 0))
    return _Request(ids, np.pad(ids, fill), np.pad(mask, fill), max_new_tokens, options, do_sample)


def _check_mask(ids: np.ndarray, attention_mask: Any, pad: int | None) -> np.ndarray:
    """bool [B, T], true at real tokens."""
    mask = ids != pad if attention_mask is None else np.asarray(attention_mask) != 0
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be of the shape of input_ids, {ids.shape}, not {mask.shape}")
    if not mask.any(1).all():
        raise ValueError(f"row {int(np.argmin(mask.any(1)))} has no token: start empty prompts with the BOS token")
    if not mask[:, -1].all():
        row = int(np.argmin(mask[:, -1]))
        raise ValueError(f"row {row} ends with padding: generation needs prompts padded on the left")
    return mask


def _check_length(width: int, room: int, config: Any, max_new_tokens: int | None, max_length: int | None) -> int:
    """The number of new tokens. `room`: positions left after the longest prompt."""
    if max_new_tokens is not None and max_length is not None:  # HF warns and lets max_new_tokens win
        raise ValueError(f"give max_new_tokens={max_new_tokens} or max_length={max_length}, not both")
    if max_length is not None:
        if max_length <= width:
            raise ValueError(
                f"max_length={max_length} leaves no new token after prompts of {width}: use max_new_tokens"
            )
        max_new_tokens = max_length - width
    if max_new_tokens is None:
        max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if max_new_tokens > room:
        limit = config.max_position_embeddings
        raise ValueError(
            f"a prompt of {limit - room} tokens and {max_new_tokens} new ones are more than "
            f"max_position_embeddings={limit}: shorten the prompt, or ask for fewer"
        )
    return max_new_tokens


def _check_sampling(do_sample: bool, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        hint = " (for the most likely tokens use do_sample=False)" if temperature == 0 else ""
        raise ValueError(f"temperature={temperature} must be a positive number{hint}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k={top_k} must be at least 1, or None or 0 for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    if not do_sample:  # HF warns
        given = {"temperature": temperature != 1, "top_k": top_k, "top_p": top_p not in (None, 1)}
        if unused := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{', '.join(unused)} without effect: pass do_sample=True as well")
