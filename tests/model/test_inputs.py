"""What a call of a model refuses, and with which message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import batch, f32, i32, our_model

from opt_jax.model.inputs import check_inputs

IDS = batch("opt-350m")["input_ids"][:, :4]  # [3, 4]; vocabulary of 99, 64 positions, embeddings of 16
MODELS = {
    "lm": our_model("opt-350m"),
    "regression": our_model("opt-350m", "OPTForSequenceClassification", num_labels=1),
    "regression of 3": our_model("opt-350m", "OPTForSequenceClassification", num_labels=3, problem_type="regression"),
    "classes": our_model("opt-350m", "OPTForSequenceClassification", num_labels=4),
    "single": our_model(
        "opt-350m", "OPTForSequenceClassification", num_labels=4, problem_type="single_label_classification"
    ),
    "no pad": our_model("opt-350m", "OPTForSequenceClassification", pad_token_id=None),
    "answers": our_model("opt-350m", "OPTForQuestionAnswering"),
}
CACHE = MODELS["lm"].init_cache(3, 6)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (dict(), "exactly one of input_ids and inputs_embeds"),
        (dict(input_ids=IDS, inputs_embeds=np.zeros((3, 4, 16))), "exactly one of input_ids and inputs_embeds"),
        (dict(input_ids=[[5, 6], [7]]), "input_ids: rows have different lengths; pad them"),
        (dict(input_ids=[5, 6]), r"input_ids must be \[batch, tokens\], not of shape \(2,\)"),
        (dict(input_ids=[[5.0, 6.0]]), "input_ids must be integers, not float64"),
        (dict(input_ids=[["a"]]), "input_ids must be numbers, not <U1"),
        (dict(input_ids=[[True]]), "input_ids must be integers, not bool"),
        (dict(input_ids=[[5, 99]]), r"input_ids holds 99, outside \[0, 98\]"),
        (dict(input_ids=jnp.array([[-1, 5]])), r"input_ids holds -1, outside \[0, 98\]"),
        (dict(input_ids=[[2**32 + 5]]), "input_ids holds 4294967301"),
        (dict(input_ids=np.array([[2**32 + 5]], np.uint64)), "input_ids holds 4294967301"),
        (dict(input_ids=IDS, labels=np.uint64(IDS) + 2**32), "labels holds 42949"),
        (dict(input_ids=IDS, labels=IDS > 0), "labels must be integers, not bool"),
        (dict(input_ids=IDS, position_ids=jnp.full((3, 4), 2**32 - 1, jnp.uint32)), "position_ids holds 4294967295"),
        (dict(input_ids=IDS, segment_ids=jnp.full((3, 4), 2**32 - 1, jnp.uint32)), "segment_ids holds 4294967295"),
        (dict(input_ids=IDS, attention_mask=np.where(IDS > 50, 0, -np.inf)), "attention_mask holds -inf: it must be 1"),
        (dict(input_ids=IDS, attention_mask=jnp.full((3, 4), -1.0)), "attention_mask holds -1.0: it must be 1"),
        (dict(input_ids=np.ones((1, 65), int)), "65 tokens are more than max_position_embeddings=64"),
        (dict(input_ids=[[]]), "inputs are empty: batch 1, 0 tokens"),
        (dict(input_ids=np.ones((0, 4), int)), "inputs are empty: batch 0, 4 tokens"),
        (dict(inputs_embeds=np.zeros((3, 4, 24))), r"word_embed_proj_dim=16\], not of shape \(3, 4, 24\)"),
        (dict(inputs_embeds=np.zeros((4, 16))), r"inputs_embeds must be \[batch, tokens, word_embed_proj_dim=16\]"),
        (dict(input_ids=IDS, attention_mask=np.ones((3, 5))), r"attention_mask must be \[batch=3, tokens=4\]"),
        (dict(input_ids=IDS, attention_mask=np.ones(4)), r"not of shape \(4,\)"),
        (dict(input_ids=IDS, attention_mask=np.ones((3, 1, 4, 4))), r"not of shape \(3, 1, 4, 4\)"),
        (dict(input_ids=IDS, attention_mask=[["x"] * 4] * 3), "attention_mask must be numbers"),
        (dict(input_ids=IDS, position_ids=[[0, 1, 2, 3]]), r"position_ids must be \[batch=3, tokens=4\]"),
        (dict(input_ids=IDS, position_ids=np.full((3, 4), 64)), r"position_ids holds 64, outside \[-1, 63\]"),
        (dict(input_ids=IDS, position_ids=np.zeros((3, 4))), "position_ids must be integers"),
        (dict(input_ids=IDS, segment_ids=np.zeros(4, int)), r"segment_ids must be \[batch=3, tokens=4\]"),
        (dict(input_ids=IDS, labels=IDS[:, 1:]), r"labels must be \[batch=3, tokens=4\]"),
        (dict(input_ids=IDS, labels=f32(IDS)), "labels must be integers, not float32"),
        (dict(input_ids=IDS, labels=IDS * 0 + 99), r"labels holds 99, outside \[0, 98\]"),
        (dict(input_ids=IDS, labels=IDS * 0 - 1), r"labels holds -1, outside \[0, 98\]"),
        (dict(input_ids=IDS, labels=IDS, logits_to_keep=1), "leave logits_to_keep at 0"),
        (dict(input_ids=IDS, logits_to_keep=5), "logits_to_keep=5 must be between 0 .all. and .* 4"),
        (dict(input_ids=IDS, logits_to_keep=-1), "logits_to_keep=-1"),
        (dict(input_ids=IDS, logits_to_keep=[1]), "logits_to_keep"),
        (dict(input_ids=IDS, logits_to_keep=np.arange(3)), r"logits_to_keep=an array of shape \(3,\), int64 must"),
        (dict(input_ids=IDS, dropout_key=0), r"dropout_key must be a key such as jax.random.key\(0\), not 0"),
        (dict(input_ids=IDS, cache=CACHE, segment_ids=IDS), "segment_ids cannot be combined with a cache"),
        (dict(input_ids=IDS[:2], cache=CACHE), r"the cache is for .* \(3, 3, 3, 6, 8\), this call needs \(3, 2, 3, 6"),
        (dict(input_ids=np.ones((3, 7), int), cache=CACHE), "the cache has room for 6 more tokens, not 7"),
        (dict(input_ids=IDS, cache=CACHE, attention_mask=np.ones((3, 5))), "covers 5 tokens, but the cache holds 0"),
    ],
)
def test_refused(inputs, words):
    with pytest.raises(ValueError, match=words):
        MODELS["lm"](**inputs)


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        ("regression", dict(labels=f32([[1, 2]] * 3)), r"labels for regression must be of shape \(3, 1\) or \(3,\)"),
        (
            "regression of 3",
            dict(labels=f32([1, 2, 3])),
            r"regression must be of shape \(3, 3\), not \(3,\)",
        ),
        ("classes", dict(labels=f32([1, 2, 3])), r"multi_label_classification must be of shape \(3, 4\), not \(3,\)"),
        ("classes", dict(labels=i32([[1, 0, 0, 0]] * 3)), r"single_label_classification must be of shape \(3,\)"),
        ("classes", dict(labels=i32([0, 1, 4])), r"labels holds 4, outside \[0, 3\]"),
        ("single", dict(labels=f32([0, 1, 2])), "labels for single_label_classification must be integers"),
        ("no pad", dict(), "classification of several rows needs config.pad_token_id"),
        ("answers", dict(start_positions=[0, 1, 2]), "start_positions alone gives no loss"),
        ("answers", dict(start_positions=[0, 1], end_positions=[0, 1, 2]), r"start_positions must be \[batch=3\]"),
        (
            "answers",
            dict(start_positions=jnp.full(3, 2**32 - 1, jnp.uint32), end_positions=[0, 1, 2]),
            "start_positions holds 4294967295",
        ),
        ("single", dict(labels=np.array([0, 1, 2**32 + 2], np.uint64)), "labels holds 4294967298"),
        ("answers", dict(start_positions=[0.5] * 3, end_positions=[0, 1, 2]), "start_positions must be integers"),
    ],
)
def test_heads_refuse(model, inputs, words):
    with pytest.raises(ValueError, match=words):
        MODELS[model](IDS, **inputs)


def test_positions_may_not_run_past_the_table():
    model = MODELS["lm"]
    ids, mask = np.full((1, 60), 5), np.ones((1, 4), int)
    cache = model(ids, cache=model.init_cache(1, 80)).cache
    check_inputs(model, dict(input_ids=ids[:, :4], cache=cache))
    with pytest.raises(ValueError, match="position 65 exceeds max_position_embeddings=64"):
        model(ids[:, :5], cache=cache)
    check_inputs(model, dict(input_ids=ids[:, :5], attention_mask=[[0, 1, 1, 1, 1]], cache=cache))  # pads need none
    check_inputs(model, dict(input_ids=ids[:, :4], attention_mask=np.ones((1, 64)), cache=cache))
    with pytest.raises(ValueError, match="covers 63 tokens, but the cache holds 60 and 4 are new"):
        model(ids[:, :4], attention_mask=np.ones((1, 63)), cache=cache)
    assert check_inputs(model, dict(input_ids=ids[:, :4], attention_mask=mask, cache=cache))["attention_mask"].all()


def test_accepted_at_the_limits():
    model = MODELS["lm"]
    for inputs in (
        dict(input_ids=np.full((1, 64), 98)),
        dict(input_ids=IDS, position_ids=np.where(IDS > 50, 63, -1)),
        dict(input_ids=IDS, labels=np.full_like(IDS, -100)),
        dict(input_ids=IDS, logits_to_keep=4, attention_mask=IDS > 0),
        dict(input_ids=IDS, attention_mask=np.float64(IDS > 0), dropout_key=jax.random.key(0)),
    ):
        checked = check_inputs(model, inputs)
        assert all(isinstance(checked[name], (jax.Array, int)) for name in inputs)
        assert "attention_mask" not in inputs or checked["attention_mask"].dtype == bool


def test_a_mask_is_read_before_it_is_cast():
    """Cast to float32 or int32, these values would be 0."""
    for mask in (np.full((3, 4), 1e-300), np.full((3, 4), 2**32)):
        assert check_inputs(MODELS["lm"], dict(input_ids=IDS, attention_mask=mask))["attention_mask"].all()


def test_wide_integers_of_jax_are_checked_too():
    with jax.enable_x64(True):
        wide = dict(input_ids=jnp.array([[2**32 + 5]]), position_ids=jnp.array([[2**32]]))
        for name in wide:
            with pytest.raises(ValueError, match=f"{name} holds 42949"):
                check_inputs(MODELS["lm"], {"input_ids": [[5]]} | {name: wide[name]})


def test_shapes_are_checked_under_jit_too_and_values_are_not():
    model = MODELS["lm"]
    call = jax.jit(lambda ids, mask: model(ids, attention_mask=mask).logits)
    with pytest.raises(ValueError, match="attention_mask must be"):
        jax.eval_shape(call, IDS, IDS[:, 1:])
    assert jax.eval_shape(call, IDS + 1000, IDS).shape == (3, 4, 99)


def test_ids_under_jit_do_not_wrap():
    """While tracing, values are unknown. An id that is no int32 gives NaN, not the result of another id."""
    call = jax.jit(lambda ids, **inputs: MODELS["lm"](ids, **inputs))
    ids = jnp.array([[5, 2**32 - 90]], jnp.uint32)  # as int32 it is -90, which would index from the end
    assert np.isnan(call(ids).logits).all()
    good = jnp.array([[5, 6]], jnp.uint32)
    assert np.isnan(call(jnp.array([[5, -1]])).logits).all()  # -1 does not index the last id
    assert np.isnan(call(good, position_ids=jnp.array([[0, -3]])).logits).all()  # nor -3 a position from the end
    assert not np.isnan(call(good, position_ids=jnp.array([[0, -1]])).logits).any()
    assert np.isnan(call(good, labels=jnp.array([[5, 2**32 - 100]], jnp.uint32)).loss)  # not the label -100
    assert not np.isnan(call(good, labels=good).loss)
    with jax.enable_x64(True):
        ids = jnp.array([[5, 2**32 + 5]])
        assert ids.dtype == jnp.int64 and np.isnan(call(ids).logits).all()
