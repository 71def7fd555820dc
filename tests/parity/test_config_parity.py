"""OPTConfig against `transformers.OPTConfig`: the same defaults, and either reads what the other writes."""

import dataclasses
import json

import pytest
from conftest import exhaustive
from oracle import hf_config, torch, transformers
from reference import CONFIGS, SMALL
from support.small_models import count

from opt_jax import OPTConfig
from opt_jax.config import _SIZES

FIELDS = [field.name for field in dataclasses.fields(OPTConfig) if field.name != "extra"]
UNUSUAL = OPTConfig(
    vocab_size=200,
    hidden_size=48,
    num_hidden_layers=2,
    ffn_dim=20,
    max_position_embeddings=30,
    do_layer_norm_before=False,
    _remove_final_layer_norm=True,
    word_embed_proj_dim=24,
    dropout=0.2,
    attention_dropout=0.3,
    num_attention_heads=3,
    activation_function="gelu",
    layerdrop=0.4,
    init_std=0.5,
    pad_token_id=5,
    bos_token_id=6,
    eos_token_id=(7, 8),
    enable_bias=False,
    layer_norm_elementwise_affine=False,
    tie_word_embeddings=False,
    num_labels=6,
    problem_type="regression",
)
CONFIG_CASES = {"defaults": OPTConfig(), "unusual": UNUSUAL, **{name: CONFIGS[name] for name in SMALL}}


def fields(config) -> dict:
    got = {name: getattr(config, name) for name in FIELDS}
    return got | dict(eos_token_id=list(got["eos_token_id"])) if isinstance(got["eos_token_id"], tuple) else got


def test_the_same_fields_and_defaults():
    assert fields(OPTConfig()) == fields(transformers.OPTConfig())
    usual = fields(OPTConfig())
    same = [name for name in FIELDS if getattr(UNUSUAL, name) == usual[name]]
    assert not same  # so the round trips below test every field


@pytest.mark.parametrize("name", CONFIG_CASES)
def test_transformers_reads_ours(name, tmp_path):
    config = CONFIG_CASES[name]
    assert fields(transformers.OPTConfig(**config.to_hf())) == fields(config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read) is transformers.OPTConfig and fields(read) == fields(config)


@pytest.mark.parametrize("name", CONFIG_CASES)
def test_ours_reads_transformers(name, tmp_path):
    config = CONFIG_CASES[name]
    theirs = hf_config(config)
    theirs.architectures, theirs.something_of_mine = ["OPTForCausalLM"], {"a": [1]}
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, theirs.to_dict(), theirs.to_diff_dict()):
        read = OPTConfig.from_hf(source)
        assert fields(read) == fields(config)
        assert read.extra["architectures"] == ["OPTForCausalLM"] and read.extra["something_of_mine"] == {"a": [1]}
        again = transformers.OPTConfig(**read.to_hf())
        assert fields(again) == fields(config) and again.something_of_mine == {"a": [1]}


def test_label_names_survive():
    theirs = transformers.OPTConfig(id2label={0: "bad", 1: "fair", 2: "good"})
    read = OPTConfig.from_hf(json.loads(theirs.to_json_string()))
    assert read.num_labels == 3
    assert transformers.OPTConfig(**read.to_hf()).id2label == {0: "bad", 1: "fair", 2: "good"}


@pytest.mark.parametrize("size", [size if size in ("125m", "350m", "66b") else exhaustive(size) for size in _SIZES])
def test_full_size_models_have_as_many_parameters(size):
    """`small_models.count`, which tests/model/test_model.py uses, counts as `transformers` does."""
    config = OPTConfig.preset(size)
    for cls in ("OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"):
        with torch.device("meta"):
            model = getattr(transformers, cls)(hf_config(config))
        assert sum(p.numel() for p in model.parameters()) == count(config, cls)
