"""The architecture of metaseq checkpoints: read from their settings, in each form that these have, and checked."""

from dataclasses import replace

import pytest
from support.hf_files import hf_weights
from support.metaseq_files import Foreign, contents, namespace, omega, settings, write
from test_metaseq import CONFIG, assert_same, given, load

from convert import metaseq

VALUES = settings(CONFIG)
PLACES = {
    "dict": {"cfg": {"model": VALUES}},
    "namespace-in-dict": {"cfg": {"model": namespace(VALUES)}},
    "omegaconf": {"cfg": omega({"model": VALUES, "task": {"data": "x"}})},
    "namespace-of-namespaces": {"cfg": namespace({"model": namespace(VALUES)})},
    "args": {"args": namespace(VALUES)},
    "args-beside-empty-cfg": {"cfg": {"model": None}, "args": namespace(VALUES)},
    "enum": {"cfg": {"model": VALUES | dict(activation_fn=Foreign("metaseq.dataclass.constants Choices", ("relu",)))}},
    "interpolation": {
        "cfg": omega(
            {
                "model": VALUES | dict(max_target_positions="${task.max_target_positions}"),
                "task": {"max_target_positions": 16},
            }
        )
    },
    "unset-interpolation": {
        "cfg": {"model": namespace(VALUES | dict(max_target_positions="${task.x}", tokens_per_sample=16))}
    },
    "none": {"cfg": {"model": VALUES | dict(max_target_positions=Foreign("enum X", (None,)), tokens_per_sample=16)}},
}


@pytest.mark.parametrize("place", PLACES)
def test_settings_are_found(tmp_path, place):
    files = write(tmp_path, contents(hf_weights(CONFIG), parts=3, shards=2, flat=True, **PLACES[place]))
    opened = metaseq.open_checkpoint(files, config=None)
    assert replace(opened.config, extra={}) == replace(given(), extra={})
    assert_same(load(opened), hf_weights(CONFIG))


def test_dropout_is_that_of_the_given_config(tmp_path):
    cfg = {"model": settings(CONFIG, dropout=0.0)}
    files = write(tmp_path, contents(hf_weights(CONFIG), cfg=cfg))
    assert metaseq.open_checkpoint(files, config=None).config.dropout == 0.0
    assert metaseq.open_checkpoint(files, config=given()).config.dropout == 0.1


def test_normalisation_is_what_the_tensors_say(tmp_path):
    post = CONFIG | {"do_layer_norm_before": False}
    cfg = {"model": settings(CONFIG)}  # says decoder_normalize_before
    files = write(tmp_path / "post", contents(hf_weights(post), cfg=cfg))
    assert_same(load(metaseq.open_checkpoint(files, config=given(post))), hf_weights(post))
    files = write(tmp_path / "pre", contents(hf_weights(CONFIG), cfg=cfg))
    with pytest.raises(ValueError, match="decoder.final_layer_norm.weight is left over"):
        metaseq.open_checkpoint(files, config=given(post))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_gelu_is_what_the_given_config_says(tmp_path, activation):
    cfg = {"model": settings(CONFIG, activation_fn="gelu")}
    files = write(tmp_path, contents(hf_weights(CONFIG), cfg=cfg))
    config = given(CONFIG | {"activation_function": activation})
    assert metaseq.open_checkpoint(files, config=config).config.activation_function == activation


BAD_SETTINGS = {
    "layers": ({"decoder_layers": 3}, True, "decoder_layers=3 .* num_hidden_layers is 2"),
    "heads": ({"decoder_attention_heads": 4}, True, "decoder_attention_heads=4 .* num_attention_heads is 2"),
    "positions": ({"max_target_positions": 17}, True, "max_target_positions=17 .* max_position_embeddings is 16"),
    "post-norm": ({"decoder_normalize_before": False}, True, "decoder_normalize_before=False .* do_layer_norm_before"),
    "bias": ({"disable_bias": True}, True, "disable_bias=True .* enable_bias is True"),
    "activation": ({"activation_fn": "tanh"}, True, "activation_fn='tanh' .* activation_function is 'relu'"),
    "gelu-for-relu": ({"activation_fn": "gelu"}, True, "activation_fn='gelu' .* activation_function is 'relu'"),
    "tanh-form": (
        {"activation_fn": "gelu_accurate"},
        True,
        "activation_fn='gelu_accurate' .* activation_function is 'relu'",
    ),
    "gelu": ({"activation_fn": "gelu"}, False, "activation_fn='gelu' means the exact form in some .* --config"),
    "unknown-activation": ({"activation_fn": "swiglu"}, False, "activation_fn='swiglu' .* not supported"),
    "scaled-embedding": ({"no_scale_embedding": False}, False, "no_scale_embedding=False .* not supported"),
    "alibi": ({"alibi": True}, True, "alibi=True .* not supported"),
    "sinusoidal": ({"decoder_learned_pos": False}, False, "decoder_learned_pos=False .* not supported"),
    "output-dim": ({"decoder_output_dim": 12}, False, "decoder_output_dim=12 .* differs from decoder_input_dim=18"),
    "no-heads": ({"decoder_attention_heads": None}, False, "decoder_attention_heads is not .* --model"),
    "type": (
        {"decoder_attention_heads": "2"},
        False,
        "decoder_attention_heads in its settings is of type str, not int",
    ),
    "absurd": ({"decoder_layers": 10**9}, False, "decoder_layers in its settings is out of range"),
    "negative": ({"decoder_ffn_embed_dim": -51}, False, "decoder_ffn_embed_dim in its settings is out of range"),
    "bad-heads": (
        {"decoder_attention_heads": 5},
        False,
        "OPTConfig: hidden_size=18 is not divisible by num",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(tmp_path, case):
    changes, with_config, message = BAD_SETTINGS[case]
    cfg = {"model": namespace(settings(CONFIG, **changes))}
    files = write(tmp_path, contents(hf_weights(CONFIG), cfg=cfg))
    with pytest.raises(ValueError, match=f"reshard.pt: {message}"):
        metaseq.open_checkpoint(files, config=given() if with_config else None)


def test_no_settings_and_no_config(tmp_path):
    files = write(tmp_path, contents(hf_weights(CONFIG), extra_state={"cfg": 1}))
    with pytest.raises(ValueError, match=r"reshard.pt holds no settings of its model: give .* --model .* or --config"):
        metaseq.open_checkpoint(files, config=None)
