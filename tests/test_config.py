"""OPTConfig: the presets, reading and writing Hugging Face's config.json, and errors that name the field."""

import dataclasses
import json
import warnings

import pytest

from opt_jax import OPTConfig

# The config.json of facebook/opt-350m: fields of all kinds, also some that do not concern the architecture.
OPT_350M = {
    "_name_or_path": "facebook/opt-350m",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}


@pytest.mark.parametrize(
    ("name", "layers", "heads", "width", "head_dim"),
    [
        ("125m", 12, 12, 768, 64),
        ("350m", 24, 16, 1024, 64),
        ("1.3b", 24, 32, 2048, 64),
        ("2.7b", 32, 32, 2560, 80),
        ("6.7b", 32, 32, 4096, 128),
        ("13b", 40, 40, 5120, 128),
        ("30b", 48, 56, 7168, 128),
        ("66b", 64, 72, 9216, 128),
        ("175b", 96, 96, 12288, 128),
    ],
)
def test_presets_are_table_1_of_the_paper(name, layers, heads, width, head_dim):
    config = OPTConfig.preset(name)
    got = (config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.head_dim)
    assert got == (layers, heads, width, head_dim)
    assert config.ffn_dim == 4 * width and config.vocab_size == 50272 and config.max_position_embeddings == 2048
    assert config.word_embed_proj_dim == config.embed_dim == (512 if name == "350m" else width)
    assert config.do_layer_norm_before == (name != "350m")
    assert OPTConfig.preset(f"facebook/opt-{name}") == OPTConfig.preset(name.upper()) == config


def test_presets_take_changes_and_refuse_other_names():
    assert OPTConfig.preset("125m", dropout=0.0).dropout == 0.0
    with pytest.raises(ValueError, match="'125'; the presets are 125m, 350m"):
        OPTConfig.preset("125")


def test_hf_config_in_and_out(tmp_path):
    config = OPTConfig.from_hf(OPT_350M)
    assert dataclasses.replace(config, extra={}) == OPTConfig.preset("350m")
    assert config.extra["prefix"] == "</s>" and config.extra["torch_dtype"] == "float16"
    out = config.to_hf()
    assert {k: out[k] for k in OPT_350M} == OPT_350M  # unknown fields are written back
    (tmp_path / "config.json").write_text(json.dumps(out))
    assert OPTConfig.from_hf(tmp_path) == OPTConfig.from_hf(tmp_path / "config.json") == OPTConfig.from_hf(out)
    # A second round trip changes nothing.
    assert OPTConfig.from_hf(out).to_hf() == out


def test_what_has_no_effect_is_noted_once_for_a_file(tmp_path):
    """A warning lists what `transformers` would do with such fields. Its default values are not listed."""
    content = OPT_350M | {"output_attentions": False, "return_dict": True, "temperature": 1.0, "top_k": 50}
    assert OPTConfig.from_hf(content).extra["top_k"] == 50
    content |= {"output_hidden_states": True, "gradient_checkpointing": True, "top_k": 5, "bad_words_ids": [[3]]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("default")
        for _ in range(2):
            assert OPTConfig.from_hf(tmp_path).to_hf()["output_hidden_states"]
    (warning,) = noted
    for words in ("output_hidden_states=True (pass it to the", "gradient_checkpointing", "top_k=5", "bad_words_ids"):
        assert words in str(warning.message)
    assert str(tmp_path / "config.json") in str(warning.message) and "return_dict" not in str(warning.message)


def test_a_config_can_be_a_static_argument():
    config = OPTConfig.from_hf(OPT_350M)
    assert hash(config) == hash(OPTConfig.from_hf(OPT_350M))
    assert hash(OPTConfig(eos_token_id=[2, 5])) == hash(OPTConfig(eos_token_id=(2, 5)))  # type: ignore[reportArgumentType]
    with pytest.raises(dataclasses.FrozenInstanceError, match="OPTConfig.dropout: write from_pretrained"):
        config.dropout = 0.0  # type: ignore[reportAttributeAccessIssue]


def test_the_number_of_labels_is_that_of_their_names():
    config = OPTConfig.from_hf(OPT_350M | {"id2label": {"0": "bad", "1": "fair", "2": "good"}})
    assert config.num_labels == 3 and config.to_hf()["id2label"]["1"] == "fair"
    fewer = dataclasses.replace(config, num_labels=2).to_hf()
    assert fewer["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"} and fewer["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}
    assert OPTConfig.from_hf(OPTConfig(num_labels=5).to_hf()).num_labels == 5
    with pytest.raises(ValueError, match="num_labels=4 but id2label names 3"):
        OPTConfig.from_hf(OPT_350M | {"num_labels": 4, "id2label": {"0": "a", "1": "b", "2": "c"}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", "50272"),
        ("hidden_size", 768.0),
        ("num_hidden_layers", True),
        ("ffn_dim", -1),
        ("max_position_embeddings", None),
        ("do_layer_norm_before", 1),
        ("_remove_final_layer_norm", "false"),
        ("word_embed_proj_dim", "512"),
        ("dropout", 1.0),
        ("dropout", "0.1"),
        ("attention_dropout", -0.1),
        ("layerdrop", float("nan")),
        ("num_attention_heads", 7),
        ("activation_function", "swiglu"),
        ("init_std", float("inf")),
        ("pad_token_id", -1),
        ("pad_token_id", 1.5),
        ("bos_token_id", 50272),
        ("eos_token_id", [2, 99999]),
        ("eos_token_id", [2, True]),
        ("eos_token_id", "</s>"),
        ("enable_bias", None),
        ("layer_norm_elementwise_affine", 0),
        ("tie_word_embeddings", "yes"),
        ("num_labels", 0),
        ("problem_type", "ranking"),
        ("problem_type", "single_label_classification"),
    ],
)
def test_bad_fields_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        OPTConfig.from_hf(OPT_350M | {"num_labels": 1, field: value})


def test_bad_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "config.json")):
        OPTConfig.from_hf(tmp_path)
    path = tmp_path / "config.json"
    for text, words in [
        ("{", "not valid JSON"),
        ("[]", "list, not a JSON object"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2', not 'opt'"),
        ('{"model_type": "opt", "dropout": 2}', "config.json: OPTConfig: dropout=2 must be a probability"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            OPTConfig.from_hf(path)
