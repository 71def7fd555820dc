"""A model spread over eight (fake) devices generates what it generates on one."""

import contextlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from reference import our_model

from opt_jax import named_parameters
from opt_jax.sharding import make_mesh, param_sharding, use_mesh

pytestmark = [pytest.mark.slow, pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")]

# Eight heads, and sizes that divide by eight, the vocabulary among them.
SHAPE: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_attention_heads=8, word_embed_proj_dim=32, num_hidden_layers=2
)
IDS = np.array([[1, 1, 1, 7, 9], [4, 5, 6, 7, 8], [3, 9, 17, 5, 11], [1, 1, 1, 1, 33]] * 2, np.int32)
KINDS = [
    dict(max_new_tokens=20, eos_token_id=[5, 40]),
    dict(max_new_tokens=12, do_sample=True, seed=3, num_return_sequences=2, top_p=0.9, repetition_penalty=1.2),
]


def spread(model, mesh):
    """The same model on the mesh."""
    copy = nnx.clone(model)
    for path, param in named_parameters(copy).items():
        value = param.get_value()
        param.set_value(jax.device_put(value, param_sharding(path, value.shape, mesh)))
    return copy


@pytest.mark.parametrize("spec", ["fsdp=8", "data=4,tensor=2", "data=2,tensor=4", "tensor=8", "fsdp=2,data=2,tensor=2"])
def test_same_tokens_as_on_one_device(spec):
    model = our_model("opt-125m", **SHAPE)
    mesh = make_mesh(spec, jax.devices()[:8])
    meshed = spread(model, mesh)
    options = KINDS[int("data" in spec)]
    expected = model.generate(IDS, logprobs=0, **options)
    with contextlib.nullcontext() if spec == "fsdp=8" else use_mesh(mesh):  # either way
        out = meshed.generate(IDS, logprobs=0, **options)
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-4)
    assert out.finish_reasons == expected.finish_reasons
    if spec == "tensor=8":
        np.testing.assert_array_equal(meshed.generate(IDS, **options).sequences, expected.sequences)
        np.testing.assert_allclose(meshed.score(IDS), model.score(IDS), atol=1e-4)


def test_refilled_rows_and_prefixes_on_a_mesh():
    model = our_model("opt-125m", **SHAPE)
    mesh = make_mesh("fsdp=2,tensor=4", jax.devices()[:8])
    meshed, rows = spread(model, mesh), [[7, 9], [5] * 14, [4, 40, 6], [3, 9, 17, 5, 11], [33], [8, 30], [21, 2]]
    options: dict[str, Any] = dict(max_new_tokens=12, eos_token_id=[5, 40], batch_size=4)
    with use_mesh(mesh):
        out = meshed.generate(rows, cache=meshed.prefill([[60, 61, 62]]), **options)
    expected = model.generate(rows, cache=model.prefill([[60, 61, 62]]), **options)
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    assert len(set(expected.lengths.tolist())) > 2


def test_heads_that_do_not_divide_are_refused():
    shape: dict[str, Any] = SHAPE | {"num_attention_heads": 4}
    model = our_model("opt-125m", **shape)
    meshed = spread(model, make_mesh("tensor=8", jax.devices()[:8]))
    with pytest.raises(ValueError, match="4 attention heads cannot be split over 8 devices"):
        meshed.generate(IDS)
    with pytest.raises(ValueError, match="4 attention heads"):
        meshed.score(IDS)
