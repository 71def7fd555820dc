"""Sparse autoencoders: SAELens' formulas and files in PyTorch, the same training in PyTorch, and hooks."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import our_model
from safetensors.torch import load_file, save_file

from opt_jax.research.sae import SAE, Reconstruct, load_sae, save_sae, train_sae

POINT = "blocks.1.hook_resid_post"
IDS = np.random.RandomState(1).randint(4, 99, (2, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m")


def an_sae(size=24, features=50, **fields):
    draw = np.random.RandomState(0)
    shapes = dict(W_enc=(size, features), b_enc=features, W_dec=(features, size), b_dec=size)
    arrays: dict[str, Any] = {k: jnp.asarray(draw.standard_normal(shape), jnp.float32) for k, shape in shapes.items()}
    return SAE(**arrays, **fields)


def torch_forward(state, x, centred=True, factor: Any = 1.0):
    """SAELens 6, StandardSAE.encode and decode: (features, reconstruction)."""
    x = torch.tensor(np.asarray(x))
    features = torch.relu((x - state["b_dec"] * centred) @ state["W_enc"] + state["b_enc"])
    return features, (features * factor) @ state["W_dec"] + state["b_dec"]


@pytest.mark.parametrize("centred", [True, False])
def test_files_and_values_are_those_of_saelens(tmp_path, centred):
    sae = an_sae(hook_name=POINT, centred=centred)
    save_sae(sae, tmp_path / "sae", model_name="facebook/opt-125m")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config == dict(
        d_in=24,
        d_sae=50,
        dtype="float32",
        device="cpu",
        apply_b_dec_to_input=centred,
        normalize_activations="none",
        reshape_activations="none",
        metadata=dict(model_name="facebook/opt-125m", hook_name=POINT, sae_lens_version="6.0.0"),
        architecture="standard",
    )
    state = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert {name: tuple(value.shape) for name, value in state.items()} == dict(
        W_enc=(24, 50), b_enc=(50,), W_dec=(50, 24), b_dec=(24,)
    )
    x = np.random.RandomState(2).standard_normal((3, 4, 24)).astype(np.float32)
    features, reconstruction = torch_forward(state, x, centred)
    np.testing.assert_allclose(sae.encode(jnp.asarray(x)), features, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(sae.encode(jnp.asarray(x))), reconstruction, rtol=1e-5, atol=1e-4)
    loaded = load_sae(tmp_path / "sae")
    assert jax.tree.structure(loaded) == jax.tree.structure(sae)
    assert all(
        (np.asarray(a) == np.asarray(b)).all() for a, b in zip(*map(jax.tree.leaves, (sae, loaded)), strict=True)
    )


def write(directory, config, **more):
    directory.mkdir()
    (directory / "cfg.json").write_text(json.dumps(config))
    state = dict(W_enc=torch.ones(4, 6), b_enc=torch.zeros(6), W_dec=torch.ones(6, 4), b_dec=torch.zeros(4))
    state = {name: value for name, value in (state | more).items() if value is not None}
    save_file(state, directory / "sae_weights.safetensors")
    return directory


def test_files_from_before_saelens_6_are_read(tmp_path):
    old = dict(hook_point=POINT, d_in=4, d_sae=6, activation_fn_str="relu", normalize_activations=False)
    sae = load_sae(write(tmp_path / "a", old, scaling_factor=torch.ones(6)))
    assert sae.hook_name == POINT and sae.centred and sae.W_enc.shape == (4, 6)
    middle = dict(architecture="standard", hook_name="x", activation_fn="relu", apply_b_dec_to_input=False)
    sae = load_sae(write(tmp_path / "b", middle, W_enc=torch.ones(4, 6, dtype=torch.bfloat16)))
    assert sae.hook_name == "x" and not sae.centred and sae.W_enc.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("words", "config", "more"),
    [
        ("architecture='topk', but only 'standard'", dict(architecture="topk", k=3), {}),
        ("activation_fn='tanh-relu'", dict(activation_fn="tanh-relu"), {}),
        ("normalize_activations='layer_norm'", dict(normalize_activations="layer_norm"), {}),
        ("'threshold' is no part", {}, dict(threshold=torch.ones(6))),
        ("'scaling_factor' is no part", {}, dict(scaling_factor=torch.full((6,), 2.0))),
        ("do not belong together", {}, dict(b_enc=torch.zeros(5))),
        ("do not belong together", {}, dict(b_dec=None)),
    ],
)
def test_what_is_refused(tmp_path, words, config, more):
    with pytest.raises(ValueError, match=words):
        load_sae(write(tmp_path / "a", config, **more))


def test_the_hook_puts_the_reconstruction_in_the_place_of_the_activation(model):
    sae = an_sae(hook_name=POINT)
    state = {name: torch.tensor(np.asarray(getattr(sae, name))) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    factor = np.ones(50, np.float32)
    factor[:7] = 0
    _, plain = model.run_with_cache(IDS, names=POINT)
    x = np.array(plain[POINT])
    for hook, expected in {
        Reconstruct: torch_forward(state, x)[1],
        lambda sae: Reconstruct(sae, factor=factor): torch_forward(state, x, factor=torch.tensor(factor))[1],
        lambda sae: Reconstruct(sae, keep_error=True): torch.tensor(x),
        lambda sae: Reconstruct(sae, factor=factor, keep_error=True): torch.tensor(x)
        + torch_forward(state, x, factor=torch.tensor(factor))[1]
        - torch_forward(state, x)[1],
    }.items():
        _, kept = model.run_with_cache(IDS, names=POINT, hooks={POINT: hook(sae)})
        np.testing.assert_allclose(kept[POINT], expected, rtol=1e-5, atol=1e-4)
    _, kept = model.run_with_cache(IDS, names=POINT, hooks={POINT: Reconstruct(sae, positions=[1])})
    x[:, 1] = torch_forward(state, x)[1][:, 1]
    np.testing.assert_allclose(kept[POINT], x, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"takes \[..., 8\]"):
        model.run_with_hooks(IDS, hooks={POINT: Reconstruct(an_sae(8, 9))})


def test_all_heads_together(model, tmp_path):
    name = "blocks.1.attn.hook_z"
    save_sae(an_sae(hook_name=name), tmp_path / "z")
    assert json.loads((tmp_path / "z" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    sae = load_sae(tmp_path / "z")
    _, plain = model.run_with_cache(IDS, names=name)
    _, kept = model.run_with_cache(IDS, names=name, hooks={name: Reconstruct(sae)})
    expected = sae.decode(sae.encode(plain[name].reshape(2, 5, 24))).reshape(2, 5, 3, 8)
    np.testing.assert_allclose(kept[name], expected, rtol=1e-5, atol=1e-4)


def torch_training(x, features, l1, steps, batch_size, learning_rate):
    """The same training with torch.optim.Adam: the four arrays and the losses."""
    draw = np.random.default_rng(0)
    sample = x[np.sort(draw.integers(len(x), size=8192))]
    scale = sample.shape[1] ** 0.5 / np.linalg.norm(sample, axis=1).mean()
    w = draw.standard_normal((features, x.shape[1]), np.float32)
    w = torch.tensor(0.1 * w / np.linalg.norm(w, axis=1, keepdims=True))
    state = dict(W_enc=w.T.clone(), b_enc=torch.zeros(features), W_dec=w, b_dec=torch.tensor(sample.mean(0) * scale))
    for value in state.values():
        value.requires_grad_()
    optimizer, losses = torch.optim.Adam(state.values(), lr=learning_rate), []
    for step in range(steps):
        batch = torch.tensor(x[np.sort(draw.integers(len(x), size=batch_size))] * np.float32(scale))
        acts, reconstruction = torch_forward(state, batch)
        errors = ((reconstruction - batch) ** 2).sum(-1).mean()
        strength = l1 * min(1.0, (step + 1) / (steps // 5))
        loss = errors + strength * (acts * state["W_dec"].norm(dim=1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        last = steps // 5
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - max(0, step - (steps - last)) / last)
        optimizer.step()
        losses.append(loss.item())
    arrays = {name: value.detach().numpy() for name, value in state.items()}
    arrays |= dict(W_enc=arrays["W_enc"] * scale, W_dec=arrays["W_dec"] / scale, b_dec=arrays["b_dec"] / scale)
    return arrays, losses


def test_training_is_that_of_pytorch():
    x = (np.random.RandomState(0).standard_normal((500, 6)) * 3 + 1).astype(np.float32)
    options: dict[str, Any] = dict(l1=2.0, steps=20, batch_size=32, learning_rate=1e-3)
    calls = []
    sae, measures = train_sae(x, 10, **options, hook_name=POINT, progress=lambda *done: calls.append(done))
    arrays, losses = torch_training(x, 10, **options)
    np.testing.assert_allclose(measures["loss"], losses, rtol=1e-4)
    for name, value in arrays.items():
        np.testing.assert_allclose(getattr(sae, name), value, rtol=1e-3, atol=1e-4 * abs(value).max(), err_msg=name)
    assert sae.hook_name == POINT and len(calls) == 20 and calls[-1][0] == 20
    assert calls[-1][1]["loss"] == pytest.approx(measures["loss"][-1])
    again, _ = train_sae(x.reshape(500, 2, 3), 10, **options)
    assert np.asarray(again.W_dec).tobytes() == np.asarray(sae.W_dec).tobytes()
    other, _ = train_sae(x, 10, **options, seed=1)
    assert (np.asarray(other.W_dec) != np.asarray(sae.W_dec)).all()


def test_it_finds_the_directions_of_which_activations_are_sums():
    draw = np.random.RandomState(0)
    true = draw.standard_normal((12, 16))
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    x = ((draw.random_sample((6000, 12)) < 0.1) * (1 + draw.random_sample((6000, 12))) @ true).astype(np.float32)
    sae, measures = train_sae(x, 24, l1=1.0, steps=1200, batch_size=256, learning_rate=5e-3)
    learned = np.asarray(sae.W_dec) / np.linalg.norm(sae.W_dec, axis=1, keepdims=True)
    assert (true @ learned.T).max(axis=1).min() > 0.95
    assert measures["unexplained"][-1] < 0.1 and measures["active"][-1] < 3
    with pytest.raises(ValueError, match="not finite"):
        train_sae(x * np.nan, 4, steps=1, batch_size=2)
    with pytest.raises(ValueError, match="x must be"):
        train_sae(x[0], 4)
