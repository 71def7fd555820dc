"""Products of bfloat16 models on a CPU that has instructions for them."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from opt_jax import OPTConfig, OPTForCausalLM, quantize
from opt_jax.generation import loop
from opt_jax.generation.memory import column_bytes
from opt_jax.generation.request import check_request
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


@pytest.mark.parametrize("tied", [True, False])
def test_a_single_token_is_multiplied_as_two(config, monkeypatch, tied):
    """YNNPACK has no product with one row, for which XLA would convert the weights."""
    monkeypatch.setattr(bfloat16, "has_instructions", lambda: True)
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    model = OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype="bfloat16", param_dtype="bfloat16")
    fast = bfloat16.with_cpu_products(model)
    for length in (1, 20):
        programs = [jax.jit(lambda m, ids: m(ids).logits).lower(m, IDS[:1, :length]) for m in (model, fast)]
        by_matrix = r"dot_general.*\(tensor<((?:\d+x){2,3})bf16>, tensor<\d+x\d+xbf16>\)"
        shapes = [re.findall(by_matrix, program.as_text()) for program in programs]
        tokens = [{math.prod(int(n) for n in shape[:-1].split("x")[:-1]) for shape in each} for each in shapes]
        assert tokens == ([{1}, {2}] if length == 1 else [{20}, {20}]) and len(shapes[1]) == 2 * 6 + 1
        plain, same = (m(IDS[:1, :length]).logits for m in (model, fast))
        np.testing.assert_allclose(plain, same, atol=2e-2)


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_cache_is_float32_on_a_cpu(config, dtype, monkeypatch):
    """To write a token into one of 16 bits, XLA would convert all of it to float32 and back, in each step."""
    model = OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)

    def run(**options):
        programs, advance = [], loop.advance
        with monkeypatch.context() as patch:
            lower = lambda *a, **k: programs.append(advance.lower(*a, **k).compile().as_text()) or advance(*a, **k)  # noqa: E731
            patch.setattr(loop, "advance", lower)
            out = model.generate(IDS, np.ones_like(IDS), max_new_tokens=9, eos_token_id=[], logprobs=4, **options)
        return out, re.findall(r"= \w+\[3,4,\d\d,8\]\S* convert\(", programs[0])

    (out, converted), (same, _) = run(), run(cache_dtype=dtype)
    assert not converted
    np.testing.assert_array_equal(out.sequences, same.sequences)
    np.testing.assert_array_equal(out.logprobs, same.logprobs)
    for asked, stored in ((None, "float32"), (dtype, dtype), ("int8", "int8")):
        prefix = model.prefill(IDS[:1], cache_dtype=asked)
        assert jax.tree.leaves(prefix.cache.k)[0].dtype == stored
        assert check_request(model, IDS, prefix=prefix).column_bytes == column_bytes(config, stored)


@pytest.mark.parametrize("text, expected", [("flags : sse avx512_bf16", True), ("amx_bf16", True), ("avx512f", False)])
def test_what_the_cpu_can(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    for path, value in ((tmp_path / "cpuinfo", expected), (tmp_path / "none", False)):
        monkeypatch.setattr(bfloat16, "_CPU_INFO", path)
        assert bfloat16.has_instructions.__wrapped__() is value
