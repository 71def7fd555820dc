"""Products of bfloat16 models on a CPU that has instructions for them."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from opt_jax import OPTConfig, OPTForCausalLM, quantize
from opt_jax.generation import loop
from opt_jax.model import bfloat16

IDS = np.random.RandomState(0).randint(4, 60, (3, 20))


@pytest.fixture
def config():
    return OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )


def products(monkeypatch, model, instructions):
    """The dtypes of the products of matrices in the prefill, and the result of `generate`."""
    monkeypatch.setattr(bfloat16, "has_instructions", lambda: instructions)
    programs, begin = [], loop.begin
    with monkeypatch.context() as patch:
        patch.setattr(loop, "begin", lambda *a, **k: programs.append(begin.lower(*a, **k).as_text()) or begin(*a, **k))
        out = model.generate(IDS, np.ones_like(IDS), max_new_tokens=9, eos_token_id=[], logprobs=4)
    product = r"dot_general.*\(tensor<72x\d+xbf16>, tensor<\d+x\d+xbf16>\) -> tensor<72x\d+x(\w+)>"
    return re.findall(product, programs[0]), out


@pytest.mark.slow
def test_the_products_are_float32_where_the_cpu_can(config, monkeypatch, compiled):
    model = OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype="bfloat16", param_dtype="bfloat16")
    before = jax.tree.structure(model)
    plain, out = products(monkeypatch, model, False)
    fast, same = products(monkeypatch, model, True)
    assert plain == ["bf16"] * 12 and fast == ["f32"] * 12
    np.testing.assert_array_equal(same.sequences, out.sequences)
    assert same.logprobs is not None and out.logprobs is not None
    np.testing.assert_allclose(same.logprobs, out.logprobs, atol=2e-2)
    assert jax.tree.structure(model) == before  # the caller's model stays as it is
    del compiled[:]
    products(monkeypatch, model, True)
    assert "jit(begin)" not in compiled


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_models_stay_as_they_are(config, dtype, monkeypatch):
    monkeypatch.setattr(bfloat16, "has_instructions", lambda: True)
    model = OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype)
    assert bfloat16.with_cpu_products(model) is model


def test_integer_matrices_stay_as_they_are(config, monkeypatch):
    monkeypatch.setattr(bfloat16, "has_instructions", lambda: True)
    model = quantize(OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
    modules = [module for _, module in nnx.iter_graph(bfloat16.with_cpu_products(model))]
    assert not any(isinstance(getattr(module, "dot_general", None), bfloat16.Rounded) for module in modules)
    model.generate(IDS, max_new_tokens=3)


@pytest.mark.parametrize("text, expected", [("flags : sse avx512_bf16", True), ("amx_bf16", True), ("avx512f", False)])
def test_what_the_cpu_can(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    for path, value in ((tmp_path / "cpuinfo", expected), (tmp_path / "none", False)):
        monkeypatch.setattr(bfloat16, "_CPU_INFO", path)
        assert bfloat16.has_instructions.__wrapped__() is value
