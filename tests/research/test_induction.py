"""Induction scores, on attention that is known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS, our_model

from opt_jax import OPTForCausalLM, stack_layers
from opt_jax.research.induction import induction_scores, plot, repeated_tokens


def test_tokens_repeat_and_are_not_special():
    config = CONFIGS["opt-125m"]
    ids = repeated_tokens(config, rows=3, length=20)
    assert ids.shape == (3, 41) and (ids[:, 0] == config.bos_token_id).all()
    np.testing.assert_array_equal(ids[:, 1:21], ids[:, 21:])
    assert not np.isin(ids[:, 1:], [1, 2]).any() and len(np.unique(ids[:, 1:])) > 20
    assert (repeated_tokens(config, rows=3, length=20, seed=1) != ids).any()
    without = dataclasses.replace(config, bos_token_id=None, eos_token_id=(5, 6), pad_token_id=None)
    more = repeated_tokens(without, rows=9, length=30)
    assert more.shape == (9, 60) and not np.isin(more, [5, 6]).any()
    with pytest.raises(ValueError, match="length=32: the model has 64 positions"):
        repeated_tokens(config, length=32)


def test_tokens_are_drawn_from_those_that_are_given():
    config = CONFIGS["opt-125m"]
    ids = repeated_tokens(config, rows=3, length=20, tokens=[7, 9, 7, 50])
    assert set(ids[:, 1:].ravel()) == {7, 9, 50} and (ids[:, 0] == config.bos_token_id).all()
    every = np.setdiff1d(np.arange(config.vocab_size), [1, 2])
    np.testing.assert_array_equal(repeated_tokens(config, tokens=every, length=9), repeated_tokens(config, length=9))
    model = our_model("opt-125m")
    few = [np.asarray(induction_scores(model, length=9, tokens=tokens)) for tokens in ([7, 9], [7, 10])]
    assert (few[0] != few[1]).any()
    for tokens in ([], [config.vocab_size], [-1], [0.5]):
        with pytest.raises(ValueError, match="tokens"):
            repeated_tokens(config, length=9, tokens=tokens)


@pytest.mark.parametrize("stacked", [False, True])
def test_scores_are_attention_to_the_token_after(stacked):
    model = our_model("opt-125m")
    model = stack_layers(model) if stacked else model
    ids = repeated_tokens(model.config, rows=2, length=5)
    weights = np.stack(model(ids, output_attentions=True).attentions)
    expected = np.mean([weights[..., query, query - 4] for query in range(6, 11)], axis=(0, 2))
    np.testing.assert_allclose(induction_scores(model, rows=2, length=5), expected, rtol=1e-5)
    assert all(ids[0, query - 5] == ids[0, query] for query in range(6, 11))  # so query - 4 is the token after it


def test_an_induction_head_has_a_score_of_one():
    """The head looks at the position `length` - 1 before its own, by position embeddings that are one-hot."""
    length, config = 4, dataclasses.replace(CONFIGS["galactica"], num_hidden_layers=1, num_attention_heads=1)
    model = our_model("galactica", num_hidden_layers=1, num_attention_heads=1)
    decoder, width = model.model.decoder, config.hidden_size
    decoder.embed_tokens.embedding.set_value(jnp.zeros((config.vocab_size, width)))
    one_hot = np.zeros((config.max_position_embeddings + 2, width), np.float32)
    one_hot[2:11, :9] = np.eye(9)
    decoder.embed_positions.embedding.set_value(jnp.asarray(one_hot))
    attention = decoder.layers[0].self_attn
    attention.q_proj.kernel.set_value(100 * jnp.eye(width, k=-(length - 1)))  # position p asks for p - (length - 1)
    attention.k_proj.kernel.set_value(jnp.eye(width))
    assert induction_scores(model, rows=2, length=length)[0, 0] > 0.999
    attention.q_proj.kernel.set_value(100 * jnp.eye(width, k=-length))  # the same token, not the one after it
    assert induction_scores(model, rows=2, length=length)[0, 0] < 0.001


def test_attention_without_weights_is_refused():
    model = OPTForCausalLM.from_pretrained("tiny", attn_implementation="cudnn")
    with pytest.raises(ValueError, match="needs attn_implementation='xla'"):
        induction_scores(model, length=4)


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    scores = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(plot(scores).images[0].get_array(), scores)
    figure, axes = pyplot.subplots()
    assert plot(scores, axes=axes) is axes
    with pytest.raises(ValueError, match="two axes, not of shape"):
        plot(scores[0])
    pyplot.close("all")
