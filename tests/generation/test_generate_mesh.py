"""A model on eight (fake) devices generates what it generates on one."""

import contextlib
from typing import Any

import jax
import numpy as np
import pytest
from reference import our_model
from support.small_models import on_mesh

from opt_jax.parallel.mesh import make_mesh, use_mesh

pytestmark = [pytest.mark.slow, pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")]

# Eight heads, and sizes that divide by eight, the vocabulary among them.
SHAPE: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_attention_heads=8, word_embed_proj_dim=32, num_hidden_layers=1
)
IDS = np.array([[1, 1, 1, 7, 9], [4, 5, 6, 7, 8], [3, 9, 17, 5, 11], [1, 1, 1, 1, 33]] * 2, np.int32)
KINDS = {
    "greedy": dict(max_new_tokens=20, eos_token_id=[5, 40]),
    "sampling": dict(
        max_new_tokens=20,
        eos_token_id=[5],
        do_sample=True,
        seed=3,
        num_return_sequences=2,
        top_p=0.9,
        repetition_penalty=1.2,
    ),
}


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m", **SHAPE)


@pytest.fixture(scope="module")
def expected(model):
    """What the model generates on one device."""
    return {kind: model.generate(IDS, logprobs=0, **options) for kind, options in KINDS.items()}


@pytest.mark.parametrize(
    ("spec", "kind"),
    [("fsdp=8", "greedy"), ("data=4,tensor=2", "sampling"), ("fsdp=2,data=2,tensor=2", "sampling")],
)
def test_same_tokens_as_on_one_device(model, expected, spec, kind):
    mesh = make_mesh(spec, jax.devices()[:8])
    meshed = on_mesh(model, mesh)
    with contextlib.nullcontext() if spec == "fsdp=8" else use_mesh(mesh):  # with and without use_mesh
        out: Any = meshed.generate(IDS, logprobs=0, **KINDS[kind])
    np.testing.assert_array_equal(out.sequences, expected[kind].sequences)
    np.testing.assert_allclose(out.logprobs, expected[kind].logprobs, atol=1e-4)
    assert out.finish_reasons == expected[kind].finish_reasons


def test_tensors_alone_are_split(model, expected):
    """Without log-probabilities too, which would need the logits of all tokens on each device."""
    mesh = make_mesh("tensor=8", jax.devices()[:8])
    meshed = on_mesh(model, mesh)
    with use_mesh(mesh):
        out = meshed.generate(IDS, **KINDS["greedy"])
        np.testing.assert_array_equal(out.sequences, expected["greedy"].sequences)
        np.testing.assert_allclose(meshed.score(IDS), model.score(IDS), atol=1e-4)


def test_refilled_rows_and_prefixes_on_a_mesh(model):
    mesh = make_mesh("fsdp=2,tensor=4", jax.devices()[:8])
    meshed, rows = on_mesh(model, mesh), [[7, 9], [5] * 14, [4, 40, 6], [3, 9, 17, 5, 11], [33], [8, 30], [21, 2]]
    options: dict[str, Any] = dict(max_new_tokens=12, eos_token_id=list(range(40, 60)), batch_size=4, do_sample=True)
    with use_mesh(mesh):
        out = meshed.generate(rows, cache=meshed.prefill([[60, 61, 62]]), **options)
    expected = model.generate(rows, cache=model.prefill([[60, 61, 62]]), **options)
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    assert len(set(expected.lengths.tolist())) > 2


def test_heads_that_do_not_divide_are_refused():
    shape: dict[str, Any] = SHAPE | {"num_attention_heads": 4}
    model = our_model("opt-125m", **shape)
    meshed = on_mesh(model, make_mesh("tensor=8", jax.devices()[:8]))
    with pytest.raises(ValueError, match="4 attention heads cannot be split over 8 devices"):
        meshed.generate(IDS)
    with pytest.raises(ValueError, match="4 attention heads"):
        meshed.score(IDS)
