"""Options of `generate`, named as in HF's `GenerationConfig`: their sources, precedence and checks. No arrays."""

import dataclasses
import json
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opt_jax.checkpoints import hub
from opt_jax.checkpoints.hf_scripts import unchangeable
from opt_jax.generation.hf_options import check_names, ignored_fields, without_ignored
from opt_jax.system.messages import shown
from opt_jax.system.reading import asks_for_nothing, json_object, note_without_effect, read_small

# Options that need do_sample=True -> values that have no effect even then.
SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_k": (0,),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
}
# Options that need num_beams above 1 -> values that have no effect even then.
_BEAMS: dict[str, tuple[Any, ...]] = {"length_penalty": (1,), "early_stopping": (False,)}
_CACHE_DTYPES = ("int8", "float16", "bfloat16", "float32")
# Options of speculative decoding (`opt_jax.generation.speculative`).
_DRAFTS = ("num_assistant_tokens", "max_matching_ngram_size")
_LOOKUP: dict[str, tuple[Any, ...]] = {"max_matching_ngram_size": (2,)}
_LENGTHS = ({"max_length", "max_new_tokens"}, {"min_length", "min_new_tokens"})


@unchangeable("write model.generation_config = dataclasses.replace(model.generation_config, {name}={value})")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of `generate`. Where one is None, `generation_config.json` of the checkpoint decides, else the default.

    Args:
      max_new_tokens: the most tokens to add to a prompt. Without this and max_length: 20, or as many as fit into the
        context.
      max_length: the most tokens of prompt and continuation together; where `input_ids` is an array, its pads count.
        Give this or max_new_tokens, not both.
      min_new_tokens: no end token is chosen before this many new tokens.
      min_length: the same limit for prompt and continuation together.
      do_sample: True: draw tokens at random; False: choose the most likely token.
      temperature: above 0; below 1 is less random.
      top_k: draw from the k most likely tokens; 0: from all, the default (HF: 50).
      top_p: draw from the smallest set of most likely tokens whose probabilities add up to top_p; 1: from all.
      min_p: draw from tokens with at least min_p times the probability of the most likely one; 0: from all.
      typical_p: draw from the tokens whose information is closest to the entropy, as few as have probability typical_p
        together (locally typical sampling); 1: from all.
      repetition_penalty: above 1 makes tokens of the prompt and the continuation less likely; 1: off.
      presence_penalty: subtracted from the logit of each token of the continuation (OpenAI's and vLLM's definition:
        tokens of the prompt do not count); 0: off.
      frequency_penalty: the same, times the number of occurrences; 0: off.
      no_repeat_ngram_size: no n-gram of this size appears twice in prompt and continuation; 0: off.
      bad_words_ids: token sequences that are never completed. A sequence that is one end token is ignored, as in HF.
      suppress_tokens: tokens that are never chosen.
      begin_suppress_tokens: tokens that are never chosen first.
      forced_bos_token_id: the first new token after a prompt of one token.
      forced_eos_token_id: an id or a list of ids. A row that reaches its maximum length ends with one of them.
      eos_token_id: an end token or a list of them; default: the model config's; []: none.
      pad_token_id: fills rows that have ended; default: the model config's, else the first end token.
      stop_token_ids: token sequences (or single tokens) that end a row. They stay in the row.
      stop_strings: strings that end a row, wherever tokens begin and end; a string may begin in the prompt. Needs
        `tokenizer=`.
      num_beams: beam search with this many beams for each prompt; with do_sample, beam sampling.
      length_penalty: a beam's score is its log-probability / (number of new tokens) ** length_penalty; default 1.
      early_stopping: when a prompt is done. True: once it has num_beams finished beams; False: once its best running
        beam is worse than all finished ones; "never": once its best running beam cannot become better than these.
      num_assistant_tokens: number of tokens that `assistant_model` drafts at a time; default: as in the assistant's
        `generation_config.json`, else 5 (HF: 20, and fewer where the assistant is not sure).
      prompt_lookup_num_tokens: the most tokens to draft at a time by prompt lookup: the tokens that followed an earlier
        occurrence of the row's last tokens; 0: off. Like num_assistant_tokens at most the size of the context.
      max_matching_ngram_size: the most last tokens that prompt lookup compares; default 2, as in HF.
      num_return_sequences: number of rows for each prompt, which follow each other in the output. Needs do_sample, or
        at least as many beams.
      seed: in [0, 2**32); the same call gives the same tokens. With one number, row i draws by the seed and i. With a
        sequence of one number for each prompt, a row draws by its seed and its index among the prompt's rows.
      cache_dtype: dtype of the KV cache: "int8" (needs the extra `int8`), "float16", "bfloat16" or "float32"; default:
        the compute dtype, and on a CPU float32 for half precision (twice the memory, and faster).
      logprobs: record the log-probability of each new token, and the n most likely tokens with theirs; 0: of the chosen
        token only.

    Raises:
      ValueError: an option that opt-jax does not support, or that does not exist.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Any = None
    suppress_tokens: Any = None
    begin_suppress_tokens: Any = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Any = None
    eos_token_id: Any = None
    pad_token_id: int | None = None
    stop_token_ids: Any = None
    stop_strings: Any = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: Any = None
    num_assistant_tokens: int | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    num_return_sequences: int | None = None
    seed: Any = None
    cache_dtype: str | None = None
    logprobs: int | None = None

    def __new__(cls, **options: Any):
        """A new object; ValueError for options that do not exist or have no effect."""
        check_names(options, "GenerationConfig", FIELDS)
        if others := [name for name in options if name not in FIELDS]:
            raise ValueError(f"GenerationConfig: {', '.join(others)} have no effect: leave them out, or use from_dict")
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], where: str = "generation config") -> "GenerationConfig":
        """A GenerationConfig from HF's names and values, without those that have no effect here (use_cache=True, ...).

        Raises:
          ValueError: an unknown or unsupported option; the message begins with `where`.
        """
        check_names(options, where, FIELDS)
        return cls(**{name: value for name, value in options.items() if name in FIELDS})

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "GenerationConfig":
        """The GenerationConfig of a checkpoint: a hub id, a directory or "tiny".

        Raises:
          FileNotFoundError: the checkpoint has no generation_config.json.
          ValueError: an option of the file would change tokens, and is not supported.

        Warns:
          UserWarning: the file has options without meaning here. They are left out.
        """
        folder = hub.resolve(
            name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, weights=False
        )
        path = folder / "generation_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        content = parse(read_small(path).decode("utf-8", "replace"), str(path))
        return cls.from_dict(without_ignored(content, str(path), FIELDS), str(path))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the options that are not None into `generation_config.json` of a directory.

        Raises:
          FileExistsError, ValueError: see `hub.write_into`.
        """
        hub.write_into(directory, "generation_config.json", self.to_json().encode())

    def to_json(self) -> str:
        """The content of a `generation_config.json`."""
        return json.dumps(self.to_dict(), indent=2, default=_plain) + "\n"

    def check(self) -> None:
        """Check values and combinations of options.

        Raises:
          ValueError: a value is out of range, or options contradict each other.
        """
        _check_values(self)

    def to_dict(self) -> dict[str, Any]:
        """The options that are not None."""
        return {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}


def _plain(value: Any) -> Any:
    """An array or a number of NumPy or JAX as JSON has it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(f"GenerationConfig: {shown(value)} cannot be written to JSON")


FIELDS = tuple(field.name for field in dataclasses.fields(GenerationConfig))


def parse(text: str, where: str) -> dict[str, Any]:
    """The JSON object in the text of a generation_config.json; ValueError if it is no object."""
    return json_object(text, where)


def combine(
    checkpoint: Mapping[str, Any],
    config: GenerationConfig | None,
    options: Mapping[str, Any],
    where: str = "the checkpoint's generation_config.json",
) -> GenerationConfig:
    """One config from three sources. Keyword arguments win over `config`, and `config` wins over the checkpoint.

    An option of a lower source that contradicts a higher one is dropped. A keyword argument that is None drops the
    option of the lower sources.

    Args:
      checkpoint: content of the checkpoint's generation_config.json.
      config: the argument `generation_config` of `generate`.
      options: the keyword arguments of `generate`.
      where: the name of the checkpoint's file in messages.

    Raises:
      ValueError: an option that does not exist or is not supported, a value out of range, or a contradiction within one
        source.

    Warns:
      UserWarning: an option of the checkpoint has no effect, such as a temperature without do_sample, or no meaning.
    """
    given = override(options_of(config), options)
    _check_each(given)
    merged = override(checkpoint, given)
    unused = dict(ignored_fields(merged.keys() - given.keys(), FIELDS))
    check_names({k: v for k, v in merged.items() if k not in given and k not in unused}, where, FIELDS)
    _check_each({k: merged[k] for k in merged.keys() & {"do_sample", "num_beams", "prompt_lookup_num_tokens"}})
    for names, is_used, hint in (
        (SAMPLING, merged.get("do_sample"), "needs do_sample=True"),
        (_BEAMS, (merged.get("num_beams") or 1) > 1, "needs num_beams"),
        (_LOOKUP, merged.get("prompt_lookup_num_tokens"), "needs prompt_lookup_num_tokens"),
    ):
        unused |= {} if is_used else {name: (harmless, hint) for name, harmless in names.items()}
    note_without_effect(where, {k: v for k, v in merged.items() if k not in given}, unused)
    dropped = {*unused, "num_assistant_tokens"}  # this one is for a model used as assistant
    merged = {k: v for k, v in merged.items() if k in given or k not in dropped}
    result = GenerationConfig.from_dict(merged, "generate")
    result.check()
    return result


def options_of(config: GenerationConfig | None) -> dict[str, Any]:
    """The options in the argument `generation_config`; ValueError for another type, such as that of transformers."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise ValueError(
            f"generation_config must be an opt_jax.GenerationConfig, not a {type(config).__name__} of "
            f"{type(config).__module__}: use opt_jax.GenerationConfig.from_dict"
        )
    return config.to_dict()


def override(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `upper`, and those of `lower` that do not contradict them.

    None in the result says that a source below may not set the option either.
    """
    given = {k for k, v in upper.items() if v is not None}
    dropped = {name for names in _LENGTHS if names & given for name in names}
    if upper.get("do_sample") is False:
        dropped |= {*SAMPLING, "num_return_sequences"}
    for name, off, options in (("num_beams", 1, _BEAMS), ("prompt_lookup_num_tokens", 0, _LOOKUP)):
        if name in given and asks_for_nothing(upper[name], (off,)):  # values are not checked yet
            dropped |= {*options}
    return {k: v for k, v in lower.items() if k not in dropped} | dict(upper)


# Values -------------------------------------------------------------------------------------------------------


def is_integer(value: Any) -> bool:
    """Whether the value is a Python or NumPy integer, and not a boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _at_least(least: int) -> tuple[Callable[[Any], bool], str]:
    """A check for an integer of at least `least` that fits into int32, and its description."""
    return lambda x: is_integer(x) and least <= x < 2**31, f"an integer of at least {least} and below 2**31"


_LARGEST = 3.4e38  # in float32


def _real(holds: Callable[[Any], bool], words: str) -> tuple[Callable[[Any], bool], str]:
    def check(x: Any) -> bool:
        if not isinstance(x, numbers.Real) or isinstance(x, bool):
            return False
        return abs(x) < _LARGEST and holds(x)  # type: ignore[reportOperatorIssue]

    return check, words


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_return_sequences", "num_beams", *_DRAFTS), _at_least(1)),
    **dict.fromkeys(("min_new_tokens", "min_length", "no_repeat_ngram_size", "logprobs"), _at_least(0)),
    "prompt_lookup_num_tokens": _at_least(0),
    "top_k": (_at_least(0)[0], "at least 1 and below 2**31, or 0 for all tokens"),
    "temperature": _real(lambda x: x >= 1e-30, "a positive number of at least 1e-30"),  # keeps logits / x finite
    "repetition_penalty": _real(lambda x: x > 0, "a positive number"),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "length_penalty"), _real(lambda x: True, "a number")),
    "early_stopping": (lambda x: isinstance(x, bool) or isinstance(x, str) and x == "never", 'True, False or "never"'),
    **dict.fromkeys(("top_p", "typical_p"), _real(lambda x: 0 < x <= 1, "in (0, 1]")),
    "min_p": _real(lambda x: 0 <= x <= 1, "in [0, 1]"),
    "cache_dtype": (lambda x: isinstance(x, str) and x in _CACHE_DTYPES, f"one of {', '.join(_CACHE_DTYPES)}"),
    "do_sample": (lambda x: isinstance(x, bool), "True or False"),
}


def _check_each(options: Mapping[str, Any]) -> None:
    for name, (holds, words) in _RULES.items():
        value = options.get(name)
        if value is not None and not holds(value):
            hint = " (for the most likely tokens use do_sample=False)" if name == "temperature" else ""
            raise ValueError(f"{name}={shown(value)} must be {words}{hint}")


def _check_values(config: GenerationConfig) -> None:
    _check_each(config.to_dict())
    if config.max_new_tokens is not None and config.max_length is not None:  # HF warns and lets max_new_tokens win
        raise ValueError(f"give max_new_tokens={config.max_new_tokens} or max_length={config.max_length}, not both")
    beams, copies = config.num_beams or 1, config.num_return_sequences or 1
    if beams > 1:
        if copies > beams:
            raise ValueError(f"num_return_sequences={copies} is more than num_beams={beams}")
    elif unused := _asked_for(config, _BEAMS):  # HF warns
        raise ValueError(f"{', '.join(unused)} without effect: pass num_beams above 1 as well")
    if not config.do_sample:  # HF warns
        if unused := _asked_for(config, SAMPLING):
            raise ValueError(f"{', '.join(unused)} without effect: pass do_sample=True as well")
        if copies > 1 and beams == 1:
            raise ValueError(f"num_return_sequences={copies} would return equal rows: pass do_sample=True or num_beams")


def _asked_for(config: GenerationConfig, options: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Names of the options that are given a value with an effect."""
    return [name for name, harmless in options.items() if not asks_for_nothing(getattr(config, name), harmless)]


def check_ids(name: str, ids: Any, vocab_size: int, hint: str = "") -> list[int]:
    """A list of ids, from one id or a sequence; ValueError if one is not in the vocabulary."""
    given, ids = ids, ids.tolist() if hasattr(ids, "tolist") else ids  # NumPy and JAX
    values = [ids] if is_integer(ids) else list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else None
    if values is None or not all(map(is_integer, values)):
        raise ValueError(f"{name}={shown(given)} must be a token id or a sequence of them")
    for i in values:
        if not 0 <= i < vocab_size:
            raise ValueError(f"{name} holds {i}, outside [0, {vocab_size - 1}]{hint}")
    return [int(i) for i in values]


def check_sequences(name: str, sequences: Any, vocab_size: int, or_ids: bool = False) -> list[list[int]]:
    """Lists of ids, from sequences of ids that are not empty (with `or_ids`: or single ids); ValueError otherwise."""
    given = sequences
    if hasattr(sequences, "tolist"):  # an array: its rows, or single ids
        sequences = list(sequences) if sequences.ndim > 1 else sequences.tolist()
    if not isinstance(sequences, Iterable) or isinstance(sequences, str):
        raise ValueError(f"{name}={shown(given)} must be a list of sequences of token ids")
    sequences = list(sequences)
    holds = lambda s: or_ids if is_integer(s) else hasattr(s, "__len__") and len(s) > 0  # noqa: E731
    if not sequences or not all(map(holds, sequences)):
        raise ValueError(f"{name}={shown(given)} must hold at least one sequence, and no empty one")
    return [check_ids(name, sequence, vocab_size) for sequence in sequences]
