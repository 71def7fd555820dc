"""HF's options of generation that `GenerationConfig` lacks. No arrays."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from opt_jax.system.messages import shown
from opt_jax.system.reading import FieldsWithoutEffect, note_without_effect

# Options that never change tokens here. (HF starts an empty prompt with BOS; here it is an error.)
INERT = {"bos_token_id", "transformers_version", "_from_model_config", "return_dict_in_generate"}


class Missing(NamedTuple):
    """An option that is not supported."""

    harmless: tuple[Any, ...] = ()  # values that are accepted, because generation does what they say. None always is
    instead: str = ""  # what to write instead
    ignored: bool = False  # it changes no token in HF: a checkpoint's file may have any value, which is noted


_LEAVE_OUT, _CALL = "leave it out", "call the model itself: model(input_ids, output_attentions=True)"
_NO_PYTHON = "the compiled loop calls no Python; stop_strings, stop_token_ids and bad_words_ids need none"
_DRAFTS = "num_assistant_tokens is the number of drafted tokens"

UNSUPPORTED = {
    "num_beam_groups": Missing((1,)),
    "diversity_penalty": Missing((0,)),
    "constraints": Missing(),
    "force_words_ids": Missing(),
    "low_memory": Missing((False,), _LEAVE_OUT, ignored=True),
    "penalty_alpha": Missing((0,)),
    "dola_layers": Missing(),
    "max_time": Missing((), "give max_new_tokens, or leave the loop over opt_jax.generation.stream"),
    "use_mtp": Missing((False,)),
    "use_cache": Missing((True,), "leave it out: generation always has a cache, with the same tokens", ignored=True),
    "cache_implementation": Missing(
        ("static",), 'leave it out; for a quantized cache write cache_dtype="int8"', ignored=True
    ),
    "cache_config": Missing((), 'leave it out; for a quantized cache write cache_dtype="int8"', ignored=True),
    "max_cache_len": Missing((), "leave it out: prompt and max_new_tokens are the length of the cache", ignored=True),
    "prefill_chunk_size": Missing((), _LEAVE_OUT, ignored=True),
    "top_h": Missing(),
    "epsilon_cutoff": Missing((0,)),
    "eta_cutoff": Missing((0,)),
    "renormalize_logits": Missing((False,)),
    "remove_invalid_values": Missing((False,), _LEAVE_OUT, ignored=True),
    "exponential_decay_length_penalty": Missing(),
    "sequence_bias": Missing(),
    "encoder_repetition_penalty": Missing((1,), "repetition_penalty counts the prompt, too"),
    "encoder_no_repeat_ngram_size": Missing((0,), "no_repeat_ngram_size counts the prompt, too"),
    "decoder_start_token_id": Missing((), "leave it out: OPT has no encoder", ignored=True),
    "token_healing": Missing((False,)),
    "guidance_scale": Missing((1,)),
    "watermarking_config": Missing(),
    "negative_prompt_ids": Missing(),
    "output_attentions": Missing((False,), _CALL, ignored=True),
    "output_hidden_states": Missing((False,), _CALL.replace("attentions", "hidden_states"), ignored=True),
    "output_scores": Missing((False,), "logprobs=n records log-probabilities; beams have sequences_scores", True),
    "output_logits": Missing((False,), "logprobs=n records log-probabilities", ignored=True),
    "is_assistant": Missing((False,), _LEAVE_OUT, ignored=True),
    "assistant_model": Missing((), "pass it to generate"),
    "assistant_tokenizer": Missing((), "leave it out: assistant_model must have the tokenizer of the model"),
    "num_assistant_tokens_schedule": Missing(("constant",), _DRAFTS, ignored=True),
    "assistant_confidence_threshold": Missing((0.4,), _DRAFTS, ignored=True),
    "assistant_early_exit": Missing((), "pass a smaller model as assistant_model", ignored=True),
    "assistant_lookbehind": Missing((10,), _LEAVE_OUT, ignored=True),
    "target_lookbehind": Missing((10,), _LEAVE_OUT, ignored=True),
    "assistant_ensemble_weight": Missing(),
    "speculation_type": Missing(),
    "compile_config": Missing((), "leave it out: generation is always compiled", ignored=True),
    "disable_compile": Missing((False,), "leave it out, or use jax.disable_jit()", ignored=True),
    "continuous_batching_config": Missing((), "use batch_size", ignored=True),
    "logits_processor": Missing((), _NO_PYTHON),
    "stopping_criteria": Missing((), _NO_PYTHON),
    "prefix_allowed_tokens_fn": Missing((), _NO_PYTHON),
    "custom_generate": Missing((), _NO_PYTHON),
    "streamer": Missing((), "iterate over opt_jax.stream_text(model, tokenizer, prompt), or opt_jax.generation.stream"),
    "synced_gpus": Missing((False,), _LEAVE_OUT),
    # No options of HF's GenerationConfig, but arguments in scripts.
    "labels": Missing((), "leave it out: prompts have no labels"),
    "offset_mapping": Missing((), "leave it out: the model needs input_ids and attention_mask"),
    "inputs": Missing((), "write input_ids"),
    "past_key_values": Missing((), "write cache=, from model.prefill or from generate(..., return_cache=True)"),
    "position_ids": Missing((), "leave it out: positions follow from attention_mask"),
    "token_type_ids": Missing((), "leave it out: OPT has none"),
    "generator": Missing((), "write seed="),
    "prng_key": Missing((), "write seed="),
    "params": Missing((), "leave it out: a model holds its parameters"),
    "trace": Missing((True,), _LEAVE_OUT),
    "truncation": Missing((False,), "shorten the prompt: tokenizer(..., truncation=True)"),
    "use_model_defaults": Missing((True,), "None switches off an option of the checkpoint: top_k=None"),
    "handle_long_generation": Missing((), "shorten the prompt: tokenizer(..., truncation=True)"),
    "clean_up_tokenization_spaces": Missing((False,), "leave it out: it would change the text"),
    "return_tensors": Missing((False,), "use model.generate"),
    "return_text": Missing((True,), "use model.generate"),
}


def check_names(options: Mapping[str, Any], where: str, fields: Iterable[str]) -> None:
    """Check the names of options, and that those which are not supported ask for nothing.

    Raises:
      ValueError: an unknown or unsupported option; the message begins with `where`.
    """
    for name, value in options.items():
        if (missing := UNSUPPORTED.get(name)) is not None:
            plain = isinstance(value, str) or not isinstance(value, Iterable)  # comparing an array gives an array
            if value is not None and not (plain and value in missing.harmless):
                hint = f": {missing.instead}" if missing.instead else ""
                raise ValueError(f"{where}: {name}={shown(value)} is not supported by opt-jax{hint}")
        elif name not in fields and name not in INERT:
            raise ValueError(f"{where}: there is no option {shown(name)} (see opt_jax.GenerationConfig)")


def ignored_fields(names: Iterable[str], fields: Iterable[str]) -> FieldsWithoutEffect:
    """The names in a checkpoint's file that have no meaning here, for `note_without_effect`."""
    ignored: dict[str, tuple[tuple[Any, ...], str]] = {}
    for name in names:
        missing = UNSUPPORTED.get(name)
        if missing is not None and missing.ignored:
            ignored[name] = missing.harmless, "changes no token"
        elif missing is None and name not in fields and name not in INERT:
            ignored[name] = (), "no option of opt-jax"
    return ignored


def refused_fields() -> FieldsWithoutEffect:
    """The names that `generate` refuses, for `note_without_effect` of what leaves them out."""
    hint = "not supported: generate refuses it unless you pass None for it, or assign another generation_config"
    return {name: (missing.harmless, hint) for name, missing in UNSUPPORTED.items() if not missing.ignored}


def without_ignored(content: Mapping[str, Any], where: str, fields: Iterable[str]) -> dict[str, Any]:
    """The content of a checkpoint's file without the names that have no meaning here.

    Warns:
      UserWarning: there are such names.
    """
    ignored = ignored_fields(content, fields)
    note_without_effect(where, content, ignored)
    return {name: value for name, value in content.items() if name not in ignored}
