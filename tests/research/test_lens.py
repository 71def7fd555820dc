"""Logit lens and tuned lens, without PyTorch; tests/parity/test_research_parity.py compares them with it."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import CONFIGS, batch, our_model

from opt_jax import stack_layers
from opt_jax.research.lens import (
    TunedLens,
    load_tuned_lens,
    logit_lens,
    plot,
    save_tuned_lens,
    train_tuned_lens,
)


def inputs(name) -> dict[str, Any]:
    return {key: value for key, value in batch(name, "left").items() if key != "labels"}


def random_lens(config, size=0.1):
    zero = TunedLens.identity(config)
    keys = jax.random.split(jax.random.key(0))
    draw = lambda key, like: size * jax.random.normal(key, like.shape, jnp.float32)  # noqa: E731
    return TunedLens(draw(keys[0], zero.kernel), draw(keys[1], zero.bias))


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "untied"])
def test_the_last_state_gives_the_models_logits(name):
    model = our_model(name)
    out = logit_lens(model, **inputs(name))
    logits = np.asarray(model(**inputs(name)).logits)
    assert out.shape == (model.config.num_hidden_layers + 1, *logits.shape) and out.dtype == "float32"
    np.testing.assert_allclose(out[-1], logits, rtol=1e-5, atol=1e-5)
    assert np.abs(out[0] - out[-1]).max() > 0.1
    np.testing.assert_array_equal(logit_lens(model, **inputs(name), lens=TunedLens.identity(model.config)), out)
    np.testing.assert_allclose(logit_lens(stack_layers(model), **inputs(name)), out, rtol=1e-4, atol=1e-5)


def test_a_lens_changes_all_states_but_the_last():
    model = our_model("opt-125m")
    lens, plain = random_lens(model.config), logit_lens(model, **inputs("opt-125m"))
    tuned = logit_lens(model, **inputs("opt-125m"), lens=lens)
    assert (np.abs(tuned - plain).max(axis=(1, 2, 3)) > 0.01).tolist() == [True, True, True, False]


def test_reduce_keeps_what_it_returns():
    model = our_model("opt-125m")
    best = logit_lens(model, **inputs("opt-125m"), reduce=lambda logits: logits.argmax(-1))
    np.testing.assert_array_equal(best, logit_lens(model, **inputs("opt-125m")).argmax(-1))


def test_training_lowers_each_layers_loss_and_nothing_else():
    model = our_model("opt-350m")
    before = jax.tree.map(np.asarray, model)
    lens, losses = train_tuned_lens(model, [inputs("opt-350m")] * 15, optimizer=optax.adam(1e-2))
    assert losses.shape == (15, 3) and (losses[-1] < 0.7 * losses[0]).all()
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, model))
    # The first loss is that of the logit lens, over real tokens.
    logits = jax.nn.log_softmax(logit_lens(model, **inputs("opt-350m")))
    divergence = (jnp.exp(logits[-1:]) * (logits[-1:] - logits[:-1])).sum(-1)
    expected = np.asarray(divergence)[:, inputs("opt-350m")["attention_mask"] > 0].mean(axis=1)
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4)
    _, more = train_tuned_lens(model, [inputs("opt-350m")], lens=lens)
    assert (more[0] < losses[-1]).all()


def test_ids_alone_are_a_batch():
    model = our_model("opt-125m")
    ids = batch("opt-125m")["input_ids"]
    np.testing.assert_allclose(
        train_tuned_lens(model, [ids])[1], train_tuned_lens(model, [dict(input_ids=ids)])[1], rtol=1e-6
    )


def test_a_saved_lens_is_loaded(tmp_path):
    model = our_model("opt-125m")
    lens = random_lens(model.config)
    save_tuned_lens(lens, tmp_path / "lens", model)
    loaded = load_tuned_lens(tmp_path / "lens", model)
    np.testing.assert_array_equal(loaded.kernel, lens.kernel)
    np.testing.assert_array_equal(loaded.bias, lens.bias)
    assert sorted(path.name for path in (tmp_path / "lens").iterdir()) == ["config.json", "params.safetensors"]


def test_a_lens_without_bias_is_loaded(tmp_path):
    from safetensors.numpy import save_file

    model = our_model("opt-125m")
    save_file({f"{i}.weight": np.eye(24, dtype=np.float16) for i in range(3)}, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(d_model=24, num_hidden_layers=3, bias=False)))
    lens = load_tuned_lens(tmp_path, model)
    assert lens.kernel.dtype == lens.bias.dtype == "float32" and not lens.bias.any() and lens.kernel.sum() == 3 * 24


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(lens_type="affine"), "lens_type is 'affine'"),
        (dict(d_model=99), "d_model 99; this model has 24"),
        (dict(num_hidden_layers=None), "num_hidden_layers None"),
        (dict(bias=False), "must be weight for each of 3 layers"),
    ],
)
def test_other_lenses_are_refused(tmp_path, change, words):
    model = our_model("opt-125m")
    save_tuned_lens(random_lens(model.config), tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        load_tuned_lens(tmp_path, model)


def test_mistakes_are_named(tmp_path):
    model = our_model("opt-125m")
    with pytest.raises(ValueError, match="LM head of an OPTForCausalLM; this is an OPTModel"):
        logit_lens(model.base_model, **inputs("opt-125m"))
    with pytest.raises(ValueError, match=r"kernels \(2, 24, 24\).*needs \(3, 24, 24\)"):
        logit_lens(model, **inputs("opt-125m"), lens=TunedLens(jnp.zeros((2, 24, 24)), jnp.zeros((2, 24))))
    with pytest.raises(ValueError, match="batches is empty"):
        train_tuned_lens(model, [])
    save_tuned_lens(random_lens(model.config), tmp_path, model)
    (tmp_path / "params.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"params\.pt"):
        load_tuned_lens(tmp_path, model)


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    logits = np.zeros((2, 3, CONFIGS["opt-125m"].vocab_size))
    logits[1, 2, 7] = 100
    axes = plot(logits, decode=lambda i: f"${i}\n\x03", tokens=[4, 5, 6])
    assert [label.get_text() for label in axes.get_xticklabels()] == [r"\$4\n\x03", r"\$5\n\x03", r"\$6\n\x03"]
    assert axes.texts[-1].get_text() == r"\$7\n\x03" and len(axes.texts) == 6
    np.testing.assert_allclose(axes.images[0].get_array(), [[1 / 99] * 3, [1 / 99, 1 / 99, 1]])
    pyplot.close("all")
