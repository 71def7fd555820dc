"""Lenses equal PyTorch's: the logits of each state, the training of translators, and the published file format."""

import json
from typing import Any

import numpy as np
import optax
import pytest
from limits import TOLERANCE, assert_close, within
from oracle import make_exact_pair, run, torch
from reference import batch

from opt_jax import stack_layers
from opt_jax.research.lens import load_tuned_lens, logit_lens, train_tuned_lens


def inputs(name, padding, seed=0) -> dict[str, Any]:
    return {key: value for key, value in batch(name, padding, seed=seed).items() if key != "labels"}


def unembed(hf, x):
    decoder = hf.model.decoder
    x = x if decoder.final_layer_norm is None else decoder.final_layer_norm(x)
    return hf.lm_head(x if decoder.project_out is None else decoder.project_out(x))


def states_of(hf, given):
    """The states that enter each layer, and the logits; not differentiated."""
    with torch.no_grad():
        out = run(hf, given, output_hidden_states=True)
    return out.hidden_states[:-1], out.logits


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "galactica", "untied"])
def test_logit_lens(name, padding):
    hf, model = make_exact_pair(name)
    given = inputs(name, padding)
    states, logits = states_of(hf, given)
    with torch.no_grad():
        expected = torch.stack([*(unembed(hf, x) for x in states), logits]).numpy()
    real = given["attention_mask"] > 0
    for ours in (model, stack_layers(model)):
        got = np.asarray(logit_lens(ours, **given))
        assert_close(got[:, real], expected[:, real], atol=1e-5 * np.abs(expected).max(), what=name)


def trained_in_torch(hf, batches, rate):
    """Translators as in Belrose et al. 2023, and the loss of each step and layer."""
    width, depth = hf.config.hidden_size, hf.config.num_hidden_layers
    translators = torch.nn.ModuleList([torch.nn.Linear(width, width).double() for _ in range(depth)])
    for parameter in translators.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer, losses = torch.optim.Adam(translators.parameters(), lr=rate), []
    for given in batches:
        states, logits = states_of(hf, given)
        real = torch.from_numpy(given["attention_mask"]) > 0
        target = logits.log_softmax(-1)[real]
        guesses = [unembed(hf, x + move(x)).log_softmax(-1)[real] for x, move in zip(states, translators, strict=True)]
        each = [torch.nn.functional.kl_div(g, target, log_target=True, reduction="batchmean") for g in guesses]
        optimizer.zero_grad()
        torch.stack(each).sum().backward()
        optimizer.step()
        losses.append([loss.item() for loss in each])
    return translators, np.array(losses)


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "untied"])
def test_training_of_a_lens(name, tmp_path):
    hf, model = make_exact_pair(name)
    batches = [inputs(name, padding, seed) for seed, padding in enumerate(["left", "right", "none", "left", "right"])]
    translators, expected = trained_in_torch(hf, batches, rate=1e-2)
    lens, losses = train_tuned_lens(model, batches, optimizer=optax.adam(1e-2))
    assert_close(losses, expected, rtol=TOLERANCE, what="losses")
    assert (expected[-1] < 0.9 * expected[0]).all()
    for i, translator in enumerate(translators):
        for kind, got, tensor in (
            ("kernel", lens.kernel[i], translator.weight.T),
            ("bias", lens.bias[i], translator.bias),
        ):
            wanted = tensor.detach().numpy()
            error = np.linalg.norm(np.asarray(got) - wanted)
            within(error, TOLERANCE * np.linalg.norm(wanted), f"{kind} {i}")

    # The files as the package tuned-lens writes them.
    torch.save(translators.float().state_dict(), tmp_path / "params.pt")
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    config = dict(base_model_name_or_path="facebook/opt-125m", d_model=width, num_hidden_layers=depth, bias=True)
    config |= dict(base_model_revision=None, unembed_hash="c0ffee", lens_type="linear_tuned_lens")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_tuned_lens(tmp_path, model)
    for i, translator in enumerate(translators):
        np.testing.assert_array_equal(loaded.kernel[i], translator.weight.detach().numpy().T)
        np.testing.assert_array_equal(loaded.bias[i], translator.bias.detach().numpy())
    given = inputs(name, "none")
    states, _ = states_of(hf, given)
    with torch.no_grad():
        moved = [unembed(hf, x + t.double()(x)) for x, t in zip(states, translators, strict=True)]
    wanted = torch.stack(moved).numpy()
    got = np.asarray(logit_lens(model, **given, lens=loaded))[:-1]
    assert_close(got, wanted, atol=1e-5 * np.abs(wanted).max(), what="logits of the loaded lens")
