"""Lines of scripts for `transformers`: they work, or the error says what to write. See also test_interface.py."""

import copy
import dataclasses
import inspect
import json
import pickle
import re

import jax
import numpy as np
import pytest
from flax import nnx
from reference import our_model

import opt_jax
from opt_jax import GenerationConfig, OPTConfig, OPTForCausalLM, OPTForSequenceClassification, OPTTokenizer
from opt_jax.checkpoints import hf_scripts, publish

TEXTS = ["Hello world", "def"]


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m")


@pytest.fixture(scope="module")
def tokenizer():
    return OPTTokenizer.from_pretrained("tiny")


# The config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*(name for name in hf_scripts.CONFIG if name != "vocab_size"), "n_positions"])
def test_fields_that_the_config_lacks_say_what_to_write(name):
    hint = re.escape(hf_scripts.CONFIG.get(name, "what else a config.json holds is in extra={"))
    with pytest.raises(ValueError, match=f"^OPTConfig takes no '{name}': {hint}"):
        OPTConfig(**{name: True})  # type: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"^OPTConfig takes no '{name}'"):
        dataclasses.replace(OPTConfig(), **{name: True})
    hint = re.escape(hf_scripts.CONFIG.get(name, "there is no such field"))
    with pytest.raises(dataclasses.FrozenInstanceError, match=f"OPTConfig.{name}: {hint}$"):
        setattr(OPTConfig(), name, True)
    with pytest.raises(ValueError, match="no 'hidden_dim': did you mean hidden_size"):
        OPTConfig(hidden_dim=3)  # type: ignore[reportCallIssue]


def test_fields_cannot_be_assigned():
    for name, value in (("pad_token_id", 7), ("dropout", 0.5)):
        with pytest.raises(dataclasses.FrozenInstanceError, match=rf"from_pretrained\(..., {name}={value}\), or a new"):
            setattr(OPTConfig(), name, value)
    with pytest.raises(dataclasses.FrozenInstanceError, match="model.resize_token_embeddings"):
        OPTConfig().vocab_size = 5  # type: ignore[reportAttributeAccessIssue]
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"replace\(model.generation_config, top_k=5\)"):
        GenerationConfig().top_k = 5  # type: ignore[reportAttributeAccessIssue]


def test_a_config_as_a_dict_and_what_else_its_file_holds():
    config = OPTConfig.from_dict({"num_labels": 2, "id2label": {"0": "no", "1": "yes"}, "architectures": ["A"], "x": 3})
    assert config.to_dict() == config.to_hf() and OPTConfig.from_dict(config.to_dict()) == config
    assert config.model_type == "opt" and config.architectures == ["A"] and config.x == 3  # type: ignore[reportAttributeAccessIssue]
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}  # type: ignore[reportAttributeAccessIssue]
    assert dataclasses.replace(config, num_labels=1).id2label == {0: "LABEL_0"}  # type: ignore[reportAttributeAccessIssue]
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config and same.extra == config.extra
    assert not hasattr(config, "absent") and not hasattr(OPTConfig(), "architectures")


def test_constructors_say_what_they_need(model):
    for make in (OPTForCausalLM, OPTForCausalLM.from_config):
        with pytest.raises(ValueError, match=r"OPTForCausalLM\(config\) draws its parameters: pass rngs=nnx.Rngs\(0\)"):
            make(model.config)
        with pytest.raises(ValueError, match="takes an OPTConfig, not a str: OPTForCausalLM.from_pretrained loads"):
            make("tiny", rngs=nnx.Rngs(0))  # type: ignore[reportArgumentType]
    one, other = (
        make(model.config, rngs=nnx.Rngs(5))
        for make in (OPTForSequenceClassification, opt_jax.AutoModelForSequenceClassification.from_config)
    )
    assert type(one) is type(other)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one), jax.tree.leaves(other))
    with pytest.raises(ValueError, match="from_config takes no torch_dtype"):
        OPTForCausalLM.from_config(model.config, torch_dtype="auto")


# Tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hf_scripts.TOKENIZING)
def test_arguments_of_a_tokenizer_say_what_to_write(tokenizer, name):
    for call in (tokenizer, tokenizer.encode):
        with pytest.raises(ValueError, match=f"a tokenizer's call takes no {name} "):
            call("a", **{name: "x"})
        with pytest.raises(ValueError, match="has no argument 'paddin': did you mean padding"):
            call("a", paddin=True)


def test_arguments_of_a_tokenizer_that_ask_for_what_is_so_anyway(tokenizer):
    expected = tokenizer(TEXTS)
    options = dict(
        return_attention_mask=True, return_token_type_ids=False, stride=0, verbose=False, is_split_into_words=None
    )
    got = tokenizer(TEXTS, **options)
    assert got.keys() == expected.keys() and (got.input_ids == expected.input_ids).all()
    cut = dict(max_length=3)
    assert tokenizer.encode(TEXTS[0], truncation="longest_first", **cut) == tokenizer.encode(
        TEXTS[0], truncation=True, **cut
    )
    assert len(tokenizer.encode(TEXTS[0], truncation=True, **cut)) == 3
    assert tokenizer.encode(TEXTS[0], return_tensors="np").tolist() == [tokenizer.encode(TEXTS[0])]
    for fast in (True, False):
        assert len(OPTTokenizer.from_pretrained("tiny", use_fast=fast)) == len(tokenizer)
    with pytest.raises(ValueError, match="has no argument 'paddin_side': did you mean padding_side"):
        OPTTokenizer.from_pretrained("tiny", paddin_side="left")


def test_attributes_of_tokenizers_say_what_to_write(tokenizer):
    for owner, table in ((tokenizer, hf_scripts.VOCABULARY), (tokenizer("a"), hf_scripts.ENCODING)):
        assert not hasattr(owner, "absent")
        for name in table:
            with pytest.raises(AttributeError, match=f"has no attribute '{name}': ..."):
                getattr(owner, name)
    for same in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert same.encode("x") == tokenizer.encode("x")


# Calls ----------------------------------------------------------------------------------------------------------------


def test_a_dict_or_a_text_is_no_array(model, tokenizer):
    inputs = tokenizer("def")
    for call in (model, model.generate, model.score):
        with pytest.raises(ValueError, match=r"input_ids must be an array, not a BatchEncoding: .*\*\*inputs"):
            call(inputs)
        with pytest.raises(ValueError, match=r"input_ids must be an array, not a dict: .*\*\*inputs"):
            call(dict(inputs))
        with pytest.raises(ValueError, match=r"input_ids must be ids, not text: .*\*\*tokenizer"):
            call("def")
    for name in ("labels", "offset_mapping"):
        with pytest.raises(ValueError, match=f"{name}=.* is not supported by opt-jax: leave it out"):
            model.generate(np.array([[2, 3]]), **{name: 1})


@pytest.mark.parametrize("name", hf_scripts.PUSHING)
def test_arguments_of_push_to_hub_say_what_to_write(model, tokenizer, name):
    for pushed in (model, tokenizer):
        with pytest.raises(ValueError, match=f"push_to_hub takes no {name} "):
            pushed.push_to_hub("me/small", **{name: "x"})
    with pytest.raises(ValueError, match="push_to_hub has no argument 'privat': did you mean private"):
        model.push_to_hub("me/small", privat=True)
    assert {"token", "private"} <= {*inspect.signature(publish.push_tokenizer).parameters}


@pytest.mark.parametrize("name", hf_scripts.PACKAGE)
def test_names_of_other_packages_say_what_to_use(name):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}': ..."):
        getattr(opt_jax, name)


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [50, 120])
def test_resizing_a_copy_leaves_the_original_alone(size):
    model, ids = our_model("opt-125m"), np.array([[2, 98]])
    expected = np.asarray(model(ids).logits)
    other = copy.copy(model)
    assert other.get_input_embeddings().embedding.get_value() is model.get_input_embeddings().embedding.get_value()
    other.resize_token_embeddings(size)
    assert (model.config.vocab_size, other.config.vocab_size) == (99, size)
    np.testing.assert_array_equal(model(ids).logits, expected)
    assert other(ids % size).logits.shape[-1] == size


def test_generation_configs_with_unsupported_fields(tmp_path):
    """They are read. `generate` refuses them by name, unless the caller leaves them out."""
    model, ids = our_model("opt-125m"), np.array([[2, 5]])
    model.generation_config_json = json.dumps(
        dict(max_new_tokens=3, epsilon_cutoff=0.1, use_cache=False, penalty_alpha=0)
    )
    with pytest.warns(UserWarning, match=r"epsilon_cutoff=0.1 \(not supported: generate refuses it .*use_cache=False"):
        config = model.generation_config
    assert config == GenerationConfig(max_new_tokens=3)
    with pytest.raises(ValueError, match="epsilon_cutoff=0.1 is not supported"):
        model.generate(ids)
    with pytest.warns(UserWarning, match="use_cache=False"):
        expected = model.generate(ids, epsilon_cutoff=None).sequences
    assert expected.shape == (1, 5)
    model.generation_config = config
    np.testing.assert_array_equal(model.generate(ids).sequences, expected)
