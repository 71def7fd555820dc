"""Options, which layer of them wins, and which are refused by name. HF's list of names: tests/parity."""

import ast
import dataclasses
import inspect
import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax import GenerationConfig
from opt_jax.generation import sampling
from opt_jax.generation.config import FIELDS, SAMPLING, check_ids, check_sequences, combine


def test_names_come_from_files_and_dicts(tmp_path):
    content = {
        "bos_token_id": 2,
        "eos_token_id": [2, 7],
        "do_sample": True,
        "top_k": 5,
        "num_beam_groups": 1,
        "top_h": None,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(content | {"transformers_version": "5.0"}))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.to_dict() == {"eos_token_id": [2, 7], "do_sample": True, "top_k": 5}
    assert config == GenerationConfig(eos_token_id=[2, 7], do_sample=True, top_k=5)
    assert GenerationConfig.from_pretrained("tiny").to_dict() == {"eos_token_id": 2, "pad_token_id": 1}
    assert pickle.loads(pickle.dumps(config)) == config == dataclasses.replace(config)
    with pytest.raises(dataclasses.FrozenInstanceError, match="GenerationConfig.top_k: write .*dataclasses.replace"):
        config.top_k = 3  # type: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"penalty_alpha": 0.6}', "generation_config.json: penalty_alpha=0.6 is not supported"),
        ("[]", "holds a list"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_files(tmp_path, content, words):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        GenerationConfig.from_pretrained(tmp_path)


def test_what_has_no_meaning_in_a_file_is_noted_and_left_out(tmp_path):
    meaningless = {
        "use_cache": False,
        "cache_implementation": "hybrid",
        "remove_invalid_values": True,
        "output_scores": True,
        "cache_config": {"backend": "quanto"},
        "no_such_option": [1],
    }
    content = meaningless | {"top_k": 5, "do_sample": True, "use_mtp": False, "transformers_version": "5.24.0"}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(content))
    words = [f"{name}=" for name in meaningless] + ["(no option of opt-jax)", "(changes no token)"]
    with pytest.warns(UserWarning, match=r"generation_config\.json: without effect: ") as noted:
        assert GenerationConfig.from_pretrained(tmp_path).to_dict() == {"top_k": 5, "do_sample": True}
    assert len(noted) == 1 and all(word in str(noted[0].message) for word in words)
    with pytest.warns(UserWarning, match=r"generation_config\.json: without effect: ") as noted:
        assert combine(content, None, {"top_k": None}).to_dict() == {"do_sample": True}
    assert len(noted) == 1 and all(word in str(noted[0].message) for word in words)
    # values that change nothing are not noted, nor are those that the caller replaces
    harmless = {"use_cache": True, "cache_implementation": "static", "remove_invalid_values": False, "low_memory": None}
    assert combine(harmless, None, {}).to_dict() == {}
    combine({"use_cache": False, "output_scores": True}, None, {"use_cache": True, "output_scores": None})


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("checkpoint", "config", "options", "result"),
    [
        # The higher layer wins. In a call, None is the default.
        (dict(top_k=1, do_sample=True), dict(top_k=2, top_p=0.5), dict(top_k=3), dict(top_k=3, top_p=0.5)),
        (dict(top_k=1, do_sample=True), dict(top_k=2), dict(top_k=None), dict(top_k=None, do_sample=True)),
        (dict(top_k=1, do_sample=True), dict(top_k=None), {}, dict(top_k=1)),
        (dict(stop_strings="x", penalty_alpha=0.6), None, dict.fromkeys(["stop_strings", "penalty_alpha"]), {}),
        (dict(max_length=20), None, dict(max_length=None), dict(max_length=None, max_new_tokens=None)),
        (dict(max_length=20), None, dict(max_new_tokens=None), dict(max_length=20)),
        (dict(top_k=1, do_sample=True), None, dict(temperature=0.5), dict(top_k=1, temperature=0.5, do_sample=True)),
        # An option of a lower layer that contradicts it is dropped.
        (dict(max_length=20), None, dict(max_new_tokens=3), dict(max_new_tokens=3, max_length=None)),
        ({}, dict(max_length=20), dict(max_new_tokens=3), dict(max_new_tokens=3, max_length=None)),
        (dict(min_length=20), dict(min_new_tokens=0), {}, dict(min_new_tokens=0, min_length=None)),
        (dict(do_sample=True, top_k=5), None, dict(do_sample=False), dict(do_sample=False, top_k=None)),
        ({}, dict(do_sample=True, num_return_sequences=2), dict(do_sample=False), dict(num_return_sequences=None)),
        # A checkpoint may say how to sample or draft without asking for it.
        (dict(top_k=5, temperature=0.5), None, dict(do_sample=True), dict(top_k=5, temperature=0.5)),
        (dict(top_k=5), None, dict(do_sample=False), dict(top_k=None)),
        (dict(max_matching_ngram_size=5), None, dict(prompt_lookup_num_tokens=3), dict(max_matching_ngram_size=5)),
        (dict(num_assistant_tokens=5), None, {}, dict(num_assistant_tokens=None)),
        # An unsupported option may be overruled by its default.
        (dict(penalty_alpha=0.6), None, dict(penalty_alpha=0), {}),
        # Options of beams are dropped together with the beams.
        (dict(num_beams=4, length_penalty=2), None, {}, dict(num_beams=4, length_penalty=2)),
        (dict(num_beams=4, length_penalty=2), None, dict(num_beams=1), dict(num_beams=1, length_penalty=None)),
    ],
)
def test_layers(checkpoint, config, options, result):
    combined = combine(checkpoint, None if config is None else GenerationConfig(**config), options)
    assert {name: getattr(combined, name) for name in result} == result


@pytest.mark.parametrize(
    ("checkpoint", "options", "words"),
    [
        (dict(top_k=5, temperature=0.5, top_p=1.0), {}, r"top_k=5 .*do_sample=True\), temperature=0.5 \(needs"),
        (dict(do_sample=False, min_p=0.5), {}, r"min_p=0.5 \(needs do_sample=True\)$"),
        (dict(early_stopping=True), dict(top_k=None, temperature=None), r"early_stopping=True \(needs num_beams\)$"),
        (dict(max_matching_ngram_size=3), {}, r"max_matching_ngram_size=3 \(needs prompt_lookup_num_tokens\)$"),
    ],
)
def test_what_has_no_effect_in_a_file_is_noted_and_left_out(checkpoint, options, words):
    with pytest.warns(UserWarning, match=f"a/generation_config.json: without effect: .*{words}") as noted:
        result = combine(checkpoint, None, options, "a/generation_config.json")
    assert len(noted) == 1 and not result.to_dict().keys() & checkpoint.keys() - {"top_p", "do_sample"}


@pytest.mark.parametrize(
    ("checkpoint", "options", "words"),
    [
        (dict(penalty_alpha=0.6), {}, r"the checkpoint's generation_config\.json: penalty_alpha=0.6 is not supported"),
        ({}, dict(penalty_alpha=0.6), "generate: penalty_alpha=0.6 is not supported"),
        ({}, dict(num_beams=0), "num_beams=0 must be an integer of at least 1"),
        (dict(num_beams="4"), {}, "num_beams='4' must be an integer"),
        ({}, dict(num_beams=np.array([(1, 2)], "i4,i4")), "num_beams=.* must be an integer of at least 1"),
        ({}, dict(prompt_lookup_num_tokens=np.zeros(2)), "prompt_lookup_num_tokens=.* must be an integer"),
        ({}, dict(num_beams=2, num_return_sequences=3), "num_return_sequences=3 is more than num_beams=2"),
        (
            {},
            dict(length_penalty=2.0, early_stopping=True),
            "length_penalty, early_stopping without effect: .*num_beams",
        ),
        (
            {},
            dict(num_beams=2, early_stopping="sometimes"),
            "early_stopping='sometimes' must be True, False or \"never\"",
        ),
        ({}, dict(num_beams=2, length_penalty=float("nan")), "length_penalty=nan"),
        ({}, dict(assistant_model=object()), "assistant_model=.* is not supported"),
        ({}, dict(use_cache=False), "generate: use_cache=False is not supported by opt-jax: leave it out"),
        ({}, dict(cache_implementation="quantized"), 'not supported .* write cache_dtype="int8"$'),
        ({}, dict(past_key_values=()), "past_key_values=.* not supported .*: write cache=, from model.prefill or"),
        ({}, dict(streamer=3), "streamer=3 .* iterate over opt_jax.stream_text"),
        ({}, dict(output_scores=True), "output_scores=True .* logprobs=n"),
        ({}, dict(top_q=None), "generate: there is no option 'top_q'"),
        ({}, dict(top_q=4), "generate: there is no option 'top_q'"),
        ({}, dict(max_new_tokens=1, max_length=9), "not both"),
        ({}, dict(no_repeat_ngram_size=np.int64(2**32 + 2)), "no_repeat_ngram_size=.*4294967298.* below 2"),
        ({}, dict(max_new_tokens=1.5), "max_new_tokens=1.5 must be an integer of at least 1"),
        ({}, dict(max_new_tokens=True), "max_new_tokens=True must be an integer"),
        ({}, dict(max_length=0), "max_length=0"),
        ({}, dict(min_length=-1), "min_length=-1"),
        ({}, dict(do_sample="yes"), "do_sample='yes' must be True or False"),
        ({}, dict(do_sample=True, temperature="hot"), "temperature='hot' must be a positive number"),
        ({}, dict(do_sample=True, temperature=float("inf")), "temperature=inf"),
        ({}, dict(do_sample=True, min_p=1.5), r"min_p=1.5 must be in \[0, 1\]"),
        ({}, dict(do_sample=True, typical_p=0), r"typical_p=0 must be in \(0, 1\]"),
        ({}, dict(typical_p=0.5, min_p=0.1), "min_p, typical_p without effect: .*do_sample=True"),
        ({}, dict(repetition_penalty=0), "repetition_penalty=0 must be a positive number"),
        ({}, dict(presence_penalty=float("nan")), "presence_penalty=nan"),
        ({}, dict(no_repeat_ngram_size=-2), "no_repeat_ngram_size=-2"),
        ({}, dict(num_return_sequences=0, do_sample=True), "num_return_sequences=0"),
        ({}, dict(num_return_sequences=2), "num_return_sequences=2 would return equal rows: pass do_sample=True"),
        ({}, dict(logprobs=-1), "logprobs=-1"),
    ],
)
def test_refused(checkpoint, options, words):
    with pytest.raises(ValueError, match=words):
        combine(checkpoint, None, options)


@pytest.mark.parametrize("name", ["num_beams", "temperature", "eos_token_id", "bad_words_ids", "penalty_alpha", "seed"])
def test_messages_do_not_hold_arrays(name):
    for value in (np.array([[1.5, 777.25]]), jnp.full((1, 2), 777.25)):
        with pytest.raises(ValueError, match=rf"{name}=an array of shape \((1, 2|2,)\), float\d\d") as error:
            config = combine({}, None, {name: value, "do_sample": True})
            check_sequences(name, value, 10) if name == "bad_words_ids" else check_ids(name, getattr(config, name), 10)
        assert "777" not in str(error.value)


def test_constructor_refuses_what_there_is_not():
    with pytest.raises(ValueError, match="penalty_alpha=0.6 is not supported"):
        GenerationConfig(penalty_alpha=0.6)  # type: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="there is no option 'top_q'"):
        GenerationConfig(top_q=1)  # type: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="use_cache, bos_token_id have no effect: leave them out, or use from_dict"):
        GenerationConfig(use_cache=True, top_k=3, bos_token_id=2)  # type: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="GenerationConfig, not a dict"):
        combine({}, {"top_k": 3}, {})  # type: ignore[reportArgumentType]


def test_values_that_change_nothing_are_no_contradiction():
    combine({}, None, dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1, num_return_sequences=1))


def test_ids():
    for ids in (7, [7], (7,), np.array([7]), np.int64(7)):
        assert check_ids("x", ids, 10) == [7]
    assert check_sequences("x", [[1, 2], (3,), np.array([4])], 10) == [[1, 2], [3], [4]]
    for bad in (10, [3, -1], "7", [1.5], [[1]], None, True):
        with pytest.raises(ValueError, match="x"):
            check_ids("x", bad, 10)
    for bad in ([], [[]], [[10]], [3], "ab", 5):
        with pytest.raises(ValueError, match="x"):
            check_sequences("x", bad, 10)


def test_every_option_is_documented():
    documented = (GenerationConfig.__doc__ or "").partition("Args:")[2]
    assert [name for name in FIELDS if name not in documented] == []


def test_what_only_draws_use_is_refused_without_them():
    """The table must hold each option that `sampling.truncate` reads, or greedy decoding would ignore one silently."""
    tree = ast.parse(inspect.getsource(sampling.truncate))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "options"
    }
    assert read == set(SAMPLING)
