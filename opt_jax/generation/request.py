"""The checks of `generate` and `score` (on the host), and the arrays that they pass to compiled functions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int32, UInt32

from opt_jax.generation.config import (
    FIELDS,
    GenerationConfig,
    check_ids,
    check_sequences,
    combine,
    is_integer,
    options_of,
    parse,
)
from opt_jax.generation.hf_options import ignored_fields, refused_fields
from opt_jax.generation.loop import Prompts
from opt_jax.generation.memory import check_memory, column_bytes, default_cache_dtype, host_memory
from opt_jax.generation.processors import Sequences
from opt_jax.generation.prompts import (
    GivenPrompts,
    Prefix,
    align,
    broadcast,
    bucket,
    check_ids_of,
    check_mask,
    check_prefix,
    compiled_prompts,
    given_prompts,
)
from opt_jax.generation.sampling import SamplingOptions
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.quantization import Int8Linear
from opt_jax.system.messages import shown
from opt_jax.system.reading import note_without_effect

DEFAULT_NEW_TOKENS = 20  # as in HF
_LARGEST_TABLE = 1 << 24  # most elements of an array of bad words or stop sequences, padded to the longest
_SLOTS = 8  # numbers of end tokens, stop sequences, ... are padded to multiples of this, so that few shapes compile


@dataclasses.dataclass(frozen=True)
class Request:
    """The checked arguments of `generate`, for B prompts and R = B * copies rows."""

    input_ids: Int32[np.ndarray, "B T"]  # as given; pads of ragged prompts are on the left
    prompts: Prompts
    max_new_tokens: int  # the largest of all rows
    options: SamplingOptions  # for R rows
    do_sample: bool
    pad_token_id: int
    copies: int  # rows for each prompt
    logprobs: int | None
    cache_dtype: str
    stops: Any  # what `tokenizer.stop_strings` returned; None without stop strings
    vocab_size: int
    column_bytes: int  # bytes of the keys and values in one column of one row
    given: GenerationConfig  # the options of all sources, combined

    @property
    def num_beams(self) -> int:
        """Number of beams for each prompt; 1: no beam search."""
        return self.given.num_beams or 1

    @property
    def rows(self) -> int:
        return len(self.input_ids) * self.copies

    @property
    def width(self) -> int:
        """Column of the first new token, in `DecodeState.tokens`."""
        return self.prompts.tokens.shape[1]

    @property
    def capacity(self) -> int:
        """Number of columns for new tokens."""
        return self.capacity_with(0)

    def capacity_with(self, more: int) -> int:
        """Number of columns for new tokens and at least `more` others. Fills up the bucket."""
        prefix = self.prompts.prefix
        width = self.prompts.mask.shape[1] + (0 if prefix is None else prefix.max_length)
        return bucket(width + self.max_new_tokens + more) - width

    def options_of(self, rows: np.ndarray) -> SamplingOptions:
        """The options of the given rows, on the device."""
        names = ("seeds", "samples", "min_new_tokens", "max_new_tokens")
        chosen = {name: jax.device_put(np.asarray(getattr(self.options, name))[rows]) for name in names}
        return dataclasses.replace(self.options, **chosen)


def check_request(  # noqa: PLR0913  (arguments of `generate`)
    model: OPTForCausalLM,
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    prefix: Any = None,
    options: dict[str, Any] | None = None,
    default_new_tokens: int = DEFAULT_NEW_TOKENS,
    inputs_embeds: Any = None,
    count_pads: bool = True,
) -> Request:
    """The arguments of `generate`, checked and with all defaults filled in.

    count_pads: whether pads in an array of prompts count for `max_length` and `min_length`, as in HF's `generate`.

    Raises:
      ValueError: see `generate`.
    """
    _check_model(model)
    options, prefix, config = dict(options or {}), check_prefix(model, prefix), model.config
    given = combine(checkpoint_options(model), generation_config, options, _generation_config_of(model))
    # HF's scripts pass the model's bos_token_id. Another value would have no effect.
    if options.get("bos_token_id") not in (None, config.bos_token_id):
        raise ValueError(f"bos_token_id={shown(options['bos_token_id'])} without effect: put it into input_ids")
    eos, pad = _special_ids(model, given)
    prompts = given_prompts(model, input_ids, attention_mask, inputs_embeds, prefix, pad, pad in eos)
    _check_embeds(prompts, prefix, given)
    if prefix is not None and given.cache_dtype is not None:
        raise ValueError(f"cache_dtype={given.cache_dtype} cannot change the dtype of a prefix: pass it to prefill")
    cache_dtype = given.cache_dtype or default_cache_dtype(model, prefix)
    texts, before = prompts.texts(), np.zeros(1, np.int32)
    if prefix is not None:
        texts = [np.append(i[m], t) for i, m, t in zip(*broadcast(prefix, len(texts)), texts, strict=True)]
        before = prefix.lengths
    used = before + prompts.mask.sum(1)
    widths = before + prompts.widths if count_pads else used
    most, least = _check_lengths(widths, used, config, given, default_new_tokens)
    if (given.num_beams or 1) > 1 and (len(set(most.tolist())) > 1 or len(set(least.tolist())) > 1):
        raise ValueError("num_beams and prompts of different lengths: give max_new_tokens, and no min_length")
    copies = given.num_return_sequences or 1
    logprobs = None if given.logprobs is None else min(given.logprobs, config.vocab_size)
    _check_host_memory(len(used) * copies, widths, most, logprobs, given)
    stops = _stop_strings(tokenizer, given.stop_strings, texts, config.vocab_size)
    read = compiled_prompts(prompts, prefix, config.max_position_embeddings)
    traced = _sampling_options(config.vocab_size, given, most, least, eos, pad)
    if stops is not None:
        read = dataclasses.replace(read, matched=stops.states)
        traced = dataclasses.replace(traced, stop_strings=jax.device_put(stops.table))
    return Request(
        input_ids=prompts.ids,
        prompts=read,
        max_new_tokens=int(most.max()),
        options=traced,
        do_sample=bool(given.do_sample),
        pad_token_id=pad,
        copies=copies,
        logprobs=logprobs,
        cache_dtype=cache_dtype,
        stops=stops,
        vocab_size=config.vocab_size,
        column_bytes=column_bytes(config, cache_dtype),
        given=given,
    )


def _check_embeds(prompts: GivenPrompts, prefix: Prefix | None, given: GenerationConfig) -> None:
    """Check that the other arguments can be combined with `inputs_embeds`."""
    if prompts.embeds is None:
        return
    if prefix is not None:
        raise ValueError("inputs_embeds and cache= cannot be combined: put the embeddings of the prefix before them")
    if not prompts.ids.shape[1] and given.forced_bos_token_id is not None:
        raise ValueError("forced_bos_token_id looks at the prompt's tokens: pass input_ids beside inputs_embeds")


def _check_host_memory(
    rows: int, widths: np.ndarray, most: np.ndarray, logprobs: int | None, given: GenerationConfig
) -> None:
    # 16 bytes for each token: its id, and arrays made from the ids. 8 for each log-probability and its token.
    nbytes = int(widths.max() + most.max()) * 16 + int(most.max()) * 8 * (logprobs or 0)
    check_memory(rows * nbytes, host_memory(), rows, given)


def _stop_strings(tokenizer: Any, strings: Any, prompts: Sequence[np.ndarray], vocab_size: int) -> Any:
    """What the tokenizer makes of the stop strings; None without any."""
    if strings is None:
        return None
    if not hasattr(tokenizer, "stop_strings"):
        wrong = "" if tokenizer is None else f", an opt_jax.OPTTokenizer, not a {type(tokenizer).__name__}"
        raise ValueError(f"stop_strings need the tokenizer: pass tokenizer={wrong}")
    return tokenizer.stop_strings(strings, prompts, vocab_size)


def check_batch_size(batch_size: Any, progress_bar: Any) -> None:
    """Check the arguments of `generate` for continuous batching; ValueError if they are invalid."""
    if batch_size is None:
        if progress_bar:
            raise ValueError("progress_bar without effect: pass batch_size as well")
        return
    if not is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size={shown(batch_size)} must be an integer of at least 1")


def check_return_cache(request: Request, return_cache: Any, batch_size: int | None) -> None:
    """Check that a call can return its cache; ValueError if not."""
    if not isinstance(return_cache, bool):
        raise ValueError(f"return_cache={shown(return_cache)} must be True or False")
    if not return_cache:
        return
    if request.num_beams > 1:
        raise ValueError("return_cache is not supported with num_beams: the cache has one row for all beams")
    if batch_size is not None and batch_size < request.rows:
        raise ValueError(f"return_cache needs all rows at a time: leave out batch_size={batch_size}")
    if request.prompts.embeds is not None:
        raise ValueError("return_cache is not supported with inputs_embeds: a cache goes on from token ids")


def check_score(model: OPTForCausalLM, input_ids: Any, attention_mask: Any, unread: int = 0) -> tuple[np.ndarray, ...]:
    """ids and mask [B, T], and both padded on the left to [B, bucket + unread].

    unread: number of tokens at the end of a row that are scored but not read by the model, and need no position.
    """
    _check_model(model)
    ids = check_ids_of(model, input_ids, unread)
    eos, pad = _special_ids(model, GenerationConfig())
    mask = check_mask(ids, attention_mask, None if pad in eos else pad)
    padded_mask, padded = align(mask, model.config.max_position_embeddings, ids, unread=unread)
    return ids, mask, padded, padded_mask


def _check_model(model: Any) -> None:
    if not isinstance(model, OPTForCausalLM):
        raise ValueError(f"generation needs an OPTForCausalLM, not an {type(model).__name__}")
    _check_heads(model)


def _check_heads(model: OPTForCausalLM) -> None:
    """Check that each device of a mesh holds complete heads; if not, every step would send parts of them."""
    layers: Any = model.model.decoder.layers  # a list, or one stacked layer
    heads = model.config.num_attention_heads
    project = (layers[0] if hasattr(layers, "__getitem__") else layers).self_attn.q_proj
    name, axis = ("weight", 0) if isinstance(project, Int8Linear) else ("scales", -1)  # int8: [out, in]
    matrix = getattr(project, "kernel" if isinstance(project, nnx.Linear) else name).get_value()
    shards = matrix.shape[axis] // matrix.sharding.shard_shape(matrix.shape)[axis]
    if heads % shards:
        raise ValueError(f"{heads} attention heads cannot be split over {shards} devices: use a mesh that divides them")


def checkpoint_options(model: OPTForCausalLM) -> dict[str, Any]:
    """The content of the generation_config.json that the model was loaded with; empty without one."""
    text = model.generation_config_json
    return {} if text is None else parse(text, _generation_config_of(model))


def config_of(model: OPTForCausalLM) -> GenerationConfig:
    """The value of `model.generation_config`: the options of the file that there are here; the others are noted."""
    where, content = _generation_config_of(model), checkpoint_options(model)
    others = {**ignored_fields(content, FIELDS), **refused_fields()}
    note_without_effect(where, content, others)
    return GenerationConfig.from_dict({k: v for k, v in content.items() if k not in others}, where)


def assign_config(model: OPTForCausalLM, config: GenerationConfig | None) -> None:
    """Make `config` the defaults of `model.generate`; ValueError if it is not a GenerationConfig or None."""
    options_of(config)  # checks the type
    model.generation_config_json = None if config is None else config.to_json()


def _generation_config_of(model: OPTForCausalLM) -> str:
    """The name of the model's generation_config.json in messages."""
    return f"{'the checkpoint' if model.name_or_path is None else model.name_or_path}: generation_config.json"


def _special_ids(model: OPTForCausalLM, given: GenerationConfig) -> tuple[list[int], int]:
    """The end tokens and the pad."""
    config, hint = model.config, "; for no end token use []"
    eos = config.eos_token_id if given.eos_token_id is None else given.eos_token_id
    eos = [] if eos is None else list(dict.fromkeys(check_ids("eos_token_id", eos, config.vocab_size, hint)))
    pad = config.pad_token_id if given.pad_token_id is None else given.pad_token_id
    pad = (eos or [0])[0] if pad is None else pad
    if not is_integer(pad):
        raise ValueError(f"pad_token_id={shown(pad)} must be a token id")
    return eos, check_ids("pad_token_id", [pad], config.vocab_size)[0]


def _check_lengths(
    widths: np.ndarray, used: np.ndarray, config: Any, given: GenerationConfig, default: int
) -> tuple[Int32[np.ndarray, " B"], Int32[np.ndarray, " B"]]:
    """The largest and the smallest number of new tokens of each prompt.

    Args:
      widths: the length of each prompt for `max_length` and `min_length`.
      used: the number of positions that each prompt takes.
      config: the model's config.
      given: the options.
      default: the largest number of new tokens if the options say nothing.
    """
    limit = config.max_position_embeddings
    if given.max_length is not None:
        most = given.max_length - widths
        if most.min() < 1:
            raise ValueError(
                f"max_length={given.max_length} leaves no new token after prompts of {widths.max()}: use max_new_tokens"
            )
    elif given.max_new_tokens is not None:
        most = np.full_like(widths, given.max_new_tokens)
    else:
        room = limit - (used if (given.num_beams or 1) == 1 else np.full_like(used, used.max()))
        most = np.clip(room, 1, default)
    if (used + most > limit).any():
        row = int(np.argmax(used + most))
        raise ValueError(
            f"a prompt of {used[row]} tokens and {most[row]} new ones are more than "
            f"max_position_embeddings={limit}: shorten the prompt, or ask for fewer new tokens"
        )
    asked = {"min_new_tokens": np.full_like(widths, given.min_new_tokens or 0), "min_length": -widths}
    asked["min_length"] += given.min_length or 0
    for name, least in asked.items():
        if (least > most).any():
            row = int(np.argmax(least - most))
            raise ValueError(
                f"{name}={getattr(given, name)} asks for {least[row]} new tokens, more than the maximum of {most[row]}"
            )
    return most.astype(np.int32), np.maximum(0, np.maximum(*asked.values())).astype(np.int32)


def _sampling_options(
    vocab_size: int, given: GenerationConfig, most: np.ndarray, least: np.ndarray, eos: list[int], pad: int
) -> SamplingOptions:
    def scalar(dtype: Any, value: Any, off: Any = None) -> jax.Array | None:
        """The value as a scalar array; None if the processor is off."""
        # jnp.asarray would compile a program for every dtype.
        return None if value is None or value == off else jax.device_put(dtype(value))

    def token_ids(name: str) -> jax.Array | None:
        values = check_ids(name, given_ids, vocab_size) if (given_ids := getattr(given, name)) is not None else []
        return _slots(values, vocab_size) if values else None

    copies = given.num_return_sequences or 1
    seeds, samples = _check_seed(given.seed, len(most), copies)
    _check_forced(given, vocab_size)
    bad_words, stops = given.bad_words_ids, given.stop_token_ids
    if bad_words is not None:
        bad_words = check_sequences("bad_words_ids", bad_words, vocab_size)
    ends = [[i] for i in eos]
    if stops is not None:
        stops = check_sequences("stop_token_ids", stops, vocab_size, or_ids=True)
    return SamplingOptions(
        temperature=jax.device_put(np.float32(given.temperature or 1)),
        top_k=jax.device_put(np.int32(min(given.top_k or 0, vocab_size))),
        top_p=jax.device_put(np.float32(given.top_p or 1)),
        seeds=jax.device_put(seeds),
        samples=jax.device_put(samples),
        eos_token_ids=_slots(eos, vocab_size),
        pad_token_id=jax.device_put(np.int32(pad)),
        min_new_tokens=jax.device_put(np.repeat(least, copies)),
        max_new_tokens=jax.device_put(np.repeat(most, copies)),
        min_p=scalar(np.float32, given.min_p, 0),
        typical_p=scalar(np.float32, given.typical_p, 1),
        repetition_penalty=scalar(np.float32, given.repetition_penalty, 1),
        presence_penalty=scalar(np.float32, given.presence_penalty, 0),
        frequency_penalty=scalar(np.float32, given.frequency_penalty, 0),
        no_repeat_ngram_size=scalar(np.int32, given.no_repeat_ngram_size, 0),
        bad_words=_sequences("bad_words_ids", [word for word in bad_words or [] if word not in ends], vocab_size),
        suppress_tokens=token_ids("suppress_tokens"),
        begin_suppress_tokens=token_ids("begin_suppress_tokens"),
        forced_bos_token_id=token_ids("forced_bos_token_id"),
        forced_eos_token_id=token_ids("forced_eos_token_id"),
        stop_sequences=_sequences("stop_token_ids", stops or [], vocab_size),
    )


def _check_seed(seed: Any, batch: int, copies: int) -> tuple[UInt32[np.ndarray, " R"], Int32[np.ndarray, " R"]]:
    """The seed of each row, and its index among the rows with this seed."""
    given, seed = seed, seed.tolist() if hasattr(seed, "tolist") else 0 if seed is None else seed
    one = is_integer(seed)
    seeds: Sequence[Any] = [seed] * batch if one else seed
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or len(seeds) != batch:
        raise ValueError(f"seed={shown(given)} must be a number, or one number for each of the {batch} prompts")
    if bad := [s for s in seeds if not is_integer(s) or not 0 <= s < 2**32]:
        raise ValueError(f"seed={shown(bad[0])} must be in [0, 2**32)")
    samples = np.arange(batch * copies) if one else np.tile(np.arange(copies), batch)
    return np.repeat(np.array(seeds, np.uint32), copies), samples.astype(np.int32)


def _check_forced(given: GenerationConfig, vocab_size: int) -> None:
    if given.forced_bos_token_id is not None and not is_integer(given.forced_bos_token_id):
        raise ValueError(f"forced_bos_token_id={shown(given.forced_bos_token_id)} must be one token id")
    names = ("suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")
    suppressed, *forced = ([] if (v := getattr(given, n)) is None else check_ids(n, v, vocab_size) for n in names)
    for name, ids in zip(names[1:], forced, strict=True):
        if ids and set(ids) <= set(suppressed):  # all logits would be -inf
            raise ValueError(f"{name}={shown(getattr(given, name))} is also in suppress_tokens, which leaves no token")


def _slots(ids: list[int], padding: int) -> jax.Array:
    """The ids, padded to a multiple of `_SLOTS`. `padding`: an id outside the vocabulary."""
    count = -(-max(len(ids), 1) // _SLOTS) * _SLOTS
    return jax.device_put(np.array(ids + [padding] * (count - len(ids)), np.int32))


def _sequences(name: str, sequences: list[list[int]], padding: int) -> Sequences | None:
    """The sequences, padded to a multiple of `_SLOTS` in number and a power of two in length; None without any."""
    if not sequences:
        return None
    count = -(-len(sequences) // _SLOTS) * _SLOTS
    length = 1 << (max(map(len, sequences)) - 1).bit_length()
    if count * length > _LARGEST_TABLE:
        raise ValueError(
            f"{name} has {len(sequences):,} sequences, the longest of {max(map(len, sequences)):,} tokens: padded they "
            f"are {count * length:,} ids, more than {_LARGEST_TABLE:,}; leave long ones out"
        )
    ids, used = np.full((count, length), padding, np.int32), np.zeros((count, length), bool)
    used[len(sequences) :, -1] = True  # a padding sequence never matches: no token has its id
    for row, sequence in enumerate(sequences):
        ids[row, -len(sequence) :], used[row, -len(sequence) :] = sequence, True
    return Sequences(jax.device_put(ids), jax.device_put(used))
