"""int8 weights and the int8 cache against float32: number of arrays, bytes and errors, in all uses of a model."""

import re
import subprocess
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from flax import nnx
from jax.sharding import PartitionSpec as P
from reference import batch, our_model
from support.small_models import first_layers, on_mesh

from opt_jax import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    OPTForCausalLM,
    named_parameters,
    pipeline,
    quantize,
    stack_layers,
)
from opt_jax.generation import engines, loop
from opt_jax.generation.request import check_request
from opt_jax.model import int8
from opt_jax.model.cache import init_cache
from opt_jax.model.int8 import Int8Array
from opt_jax.model.quantization import Int8Embed, Int8Linear, count_int8
from opt_jax.parallel.mesh import make_mesh, use_mesh

pytestmark = pytest.mark.slow

pytest.importorskip("qwix", reason='pip install -e ".[int8]"')

IDS = np.array([[1, 1, 1, 7, 9], [4, 5, 6, 7, 8], [3, 9, 17, 5, 11]], np.int32)
# Number of int8 arrays: six for each layer, the embedding, and what the variant adds.
COUNTS = {"opt-125m": 3 * 6 + 1, "opt-350m": 3 * 6 + 1 + 2, "galactica": 3 * 6 + 1, "untied": 3 * 6 + 1 + 2 + 1}


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def relative(x, y) -> float:
    return float(np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y)))


# Arrays -------------------------------------------------------------------------------------------------------


def test_an_array_is_within_half_a_step():
    x = np.random.RandomState(0).standard_normal((3, 5, 64)).astype(np.float32) * [[[1e-3]], [[1]], [[1e3]]]
    x[1, 2] = 0
    array = int8.quantize(jnp.asarray(x, jnp.float32))
    assert array.values.dtype == jnp.int8 and array.scale.shape == (3, 5, 1) and array.shape == x.shape
    step = np.abs(x).max(-1, keepdims=True) / 127.5
    assert (np.abs(array.dequantize() - x) <= 0.5001 * step).all()
    assert ((np.abs(np.asarray(array.values, int)).max(-1) >= 127) == (step[..., 0] > 0)).all()
    assert not np.asarray(array.dequantize())[1, 2].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_products_are_those_of_the_rounded_weights(tokens, dtype):
    """Activations keep 15 bits, so products agree with those of the rounded weights, even beside an outlier."""
    random = np.random.RandomState(tokens)
    x = random.standard_normal((2, tokens, 96)).astype(np.float32)
    x[0, 0, 5] = 100
    x = jnp.asarray(x, dtype)
    weight = int8.quantize(jnp.asarray(random.standard_normal((40, 96)), jnp.float32))
    exact = np.einsum("btd,fd->btf", np.asarray(x, np.float64), np.asarray(weight.values, np.float64))
    for product in (int8.einsum, int8._in_digits, int8._as_float):
        out = product("btd,fd->btf", x, weight.values)
        assert out.dtype == jnp.float32 and out.shape == (2, tokens, 40)
        # Each term is off by at most absmax / 65278 times the largest value, 128. Errors add up as a random walk.
        bound = np.abs(np.asarray(x, np.float64)).max(-1, keepdims=True) / 65278 * 128 * 96**0.5
        assert (np.abs(out - exact) < bound).all(), product


def test_products_have_no_gradient():
    with pytest.raises(ValueError, match="no gradients: train the model that was quantized"):
        jax.grad(lambda x: int8.einsum("btd,fd->btf", x, jnp.ones((2, 3), jnp.int8)).sum())(jnp.ones((1, 1, 3)))
    model = quantize(our_model("opt-125m"))
    embeds = jnp.ones((1, 4, model.config.embed_dim))
    with pytest.raises(ValueError, match="no gradients"):
        jax.grad(lambda x: model.forward(inputs_embeds=x).logits.sum())(embeds)


# Weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_all_matrices_become_int8_and_the_rest_stays(name):
    model = our_model(name)
    before = jax.tree.leaves(model)
    quantized = quantize(model)
    assert isinstance(quantized, OPTForCausalLM) and count_int8(quantized) == COUNTS[name]
    assert count_int8(model) == 0 and all(a is b for a, b in zip(before, jax.tree.leaves(model), strict=True))
    leaves = jax.tree.leaves(quantized)
    in_int8 = sum(leaf.size for leaf in leaves if leaf.dtype == jnp.int8)
    scales = [leaf for leaf in leaves if leaf.ndim == 2 and leaf.shape[1] == 1]
    assert len(scales) == COUNTS[name] and all(scale.dtype == jnp.float32 for scale in scales)
    assert nbytes(quantized) == nbytes(model) - 3 * in_int8 + nbytes(scales)
    left = [leaf for leaf in leaves if leaf.dtype == jnp.float32 and leaf.ndim == 2 and leaf.shape[1] > 1]
    assert [leaf.shape for leaf in left] == [model.model.decoder.embed_positions.embedding.get_value().shape]


def test_the_embedded_model_shrinks():
    model = AutoModelForCausalLM.from_pretrained("tiny")
    assert nbytes(model) / nbytes(quantize(model)) > 3.5  # the positions, which stay float32, are 3 % of it


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in COUNTS if name != "galactica"), ("opt-125m", "bfloat16")]
)
def test_logits_are_those_of_a_float_model_with_rounded_weights(name, dtype):
    """This tests each layout: scales by output, transposes, and the table as head and as embedding."""
    inputs = dict(input_ids=batch(name, "left")["input_ids"], attention_mask=batch(name, "left")["attention_mask"])
    original = our_model(name, dtype=dtype, num_hidden_layers=2)
    quantized, model = quantize(original), nnx.clone(original)
    originals = dict(nnx.iter_graph(model))
    for path, node in nnx.iter_graph(quantized):
        if isinstance(node, (Int8Linear, Int8Embed)):
            matrix = np.asarray(Int8Array(node.weight.get_value(), node.scale.get_value()).dequantize())
            if linear := isinstance(node, Int8Linear):
                matrix = matrix.T
            module: Any = originals[path]
            param = module.kernel if linear else module.embedding
            exact = np.asarray(param.get_value())
            step = np.abs(exact).max(0 if linear else 1, keepdims=True) / 127.5
            assert (np.abs(matrix - exact) <= 0.5001 * step).all()
            param.set_value(jnp.asarray(matrix))
    out, expected = quantized(**inputs).logits, model(**inputs).logits
    assert out.dtype == jnp.float32
    # bfloat16 rounds the weights' products with 8 bits, in one way here and in another there
    assert relative(out, expected) < (3e-4 if dtype == "float32" else 3e-2)
    # A step of 1 / 127 of the largest of 24 normal weights, about 2.2: 0.5 % of the standard deviation, in each of
    # the products that follow each other.
    exact = original(**inputs).logits
    assert 1e-3 < relative(out, exact) < 0.05


def test_a_matrix_that_is_left_out_is_noticed():
    class Wrapped(nnx.Module):
        def __init__(self, inner):
            self.inner = inner.kernel

    model = our_model("opt-125m")
    model.model.decoder.layers[1].fc1 = Wrapped(model.model.decoder.layers[1].fc1)
    with pytest.raises(RuntimeError, match="18 matrices became int8, not the 19"):
        quantize(model)


def test_what_cannot_be_quantized_is_refused():
    model = quantize(our_model("opt-125m"))
    with pytest.raises(ValueError, match="int8 weights already"):
        quantize(model)
    with pytest.raises(ValueError, match="takes an OPTForCausalLM, not an OPTModel"):
        quantize(our_model("opt-125m", "OPTModel"))  # type: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"use opt_jax.unstack_layers\(model\) first"):
        quantize(stack_layers(our_model("opt-125m")))


def test_without_qwix_one_line_says_what_to_install():
    """In a process without qwix, all else works. With qwix, `import opt_jax` does not load it."""
    code = """
import sys
import opt_jax, opt_jax.model.quantization
assert "qwix" not in sys.modules
sys.modules["qwix"] = None
from opt_jax import OPTConfig, OPTForCausalLM, quantize
from flax import nnx
from jax.sharding import PartitionSpec as P
shape = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, word_embed_proj_dim=8)
model = OPTForCausalLM(OPTConfig(**shape), rngs=nnx.Rngs(0))
model.generate([[5, 6]], max_new_tokens=2)
for use in (lambda: quantize(model), lambda: model.generate([[5, 6]], max_new_tokens=2, cache_dtype="int8")):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert re.fullmatch(r"(int8 needs the package qwix \(.*\): pip install qwix\n){2}", run.stdout), run.stdout


# Generation ---------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "greedy": dict(max_new_tokens=6, logprobs=0),
    "sampling": dict(max_new_tokens=6, do_sample=True, top_p=0.9, seed=[1, 2, 3], num_return_sequences=2, logprobs=1),
    "beams": dict(max_new_tokens=6, num_beams=3, num_return_sequences=2),
}


@pytest.fixture(scope="module")
def models():
    model = our_model("opt-350m", num_hidden_layers=1)
    return {"float32": model, "int8": quantize(model)}


@pytest.mark.parametrize(("kind", "weights"), [("greedy", "float32"), ("sampling", "int8"), ("beams", "int8")])
def test_generation_with_an_int8_cache_follows_the_plain_model(models, kind, weights):
    """The log-probabilities that generation records are those of `score`, but for the rounding of the cache."""
    model = models[weights]
    out: Any = model.generate(IDS, cache_dtype="int8", eos_token_id=[], **KINDS[kind])
    rows = 3 * KINDS[kind].get("num_return_sequences", 1)
    assert out.sequences.shape == (rows, 11)
    logprobs = model.score(out.sequences)[:, -6:]
    if kind == "beams":
        np.testing.assert_allclose(out.sequences_scores, logprobs.mean(1), atol=0.02)
    else:
        error = np.abs(out.logprobs - logprobs)
        assert 0 < error.max() < 0.1
        np.testing.assert_allclose(error[:, 0], 0, atol=3e-4)  # prefill attends to keys that are not rounded yet
        again = model.generate(IDS, cache_dtype="int8", eos_token_id=[], **KINDS[kind])
        np.testing.assert_array_equal(out.sequences, again.sequences)


def test_int8_weights_generate_what_they_score(models):
    """Only the weights are rounded, so generation and `score` agree."""
    model = models["int8"]
    out: Any = model.generate(IDS, eos_token_id=[], **KINDS["greedy"])
    np.testing.assert_allclose(out.logprobs, model.score(out.sequences)[:, -6:], atol=2e-3)


def test_a_pipeline_of_the_embedded_model():
    model, tokenizer = quantize(first_layers(2)), AutoTokenizer.from_pretrained("tiny")
    options: dict[str, Any] = dict(max_new_tokens=8, cache_dtype="int8", do_sample=False)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("def main():", **options)[0]["generated_text"]
    assert text == tokenizer.decode(model.generate(**tokenizer("def main():"), **options)[0], skip_special_tokens=True)
    assert len(text) > len("def main():") + 8  # it is text, not noise


# The cache ----------------------------------------------------------------------------------------------------


def test_the_int8_cache_holds_rounded_keys_and_values():
    """In two calls, of which the second one reads what the first one has written."""
    model, ids = our_model("opt-125m", num_hidden_layers=1), batch("opt-125m")["input_ids"]
    floats, ints = (model.init_cache(3, 12, dtype=dtype) for dtype in (None, "int8"))
    assert isinstance(ints.k[0], Int8Array) and ints.max_length == 12 and ints.batch_size == 3
    head_dim = model.config.head_dim
    assert nbytes(ints.k + ints.v) * 4 == nbytes(floats.k + floats.v) * (head_dim + 4) / head_dim
    assert all(leaf.shape[0] == 3 and leaf.shape[2] == 12 for leaf in jax.tree.leaves(ints.k + ints.v))
    for chunk in (slice(0, 4), slice(4, 8)):
        expected, out = (model(ids[:, chunk], cache=cache) for cache in (floats, ints))
        floats, ints = expected.cache, out.cache
        assert jax.tree.structure(out.cache) == jax.tree.structure(ints)
        error = relative(out.logits, expected.logits)
        assert error < 1e-6 if chunk.start == 0 else 1e-4 < error < 0.03
    k, exact = ints.k[0], np.asarray(floats.k[0])  # keys of the first layer do not depend on the cache
    assert k.values.dtype == jnp.int8 and k.values.shape == exact.shape and k.scale.shape == (*exact.shape[:3], 1)
    assert (np.abs(k.dequantize() - exact) <= 0.5001 * np.abs(exact).max(-1, keepdims=True) / 127.5).all()
    assert not np.asarray(k.values)[:, :, 8:].any()


def test_branches_of_an_int8_cache():
    """Two branches that are selected and swapped give what rows with their own caches give."""
    model, ids = our_model("opt-125m", num_hidden_layers=1), batch("opt-125m")["input_ids"][:2]
    cache = model(ids[:, :6], cache=model.init_cache(2, 16, "int8")).cache.branch(2)
    tokens = np.array([[5, 6], [7, 8]], np.int32)

    @jax.jit
    def step(cache, tokens):
        positions = jnp.broadcast_to(cache.next_position[:, None], tokens.shape)
        return model.forward(tokens, position_ids=positions, cache=cache)

    cache = step(cache, tokens).cache.select(jnp.array([[1, 0], [1, 1]]))
    out = step(cache, jnp.array([[9, 10], [11, 12]])).logits
    for row, parents in ((0, (6, 5)), (1, (8, 8))):
        for branch, parent in enumerate(parents):
            alone = model.init_cache(1, 16, "int8")
            alone = model(ids[row : row + 1, :6], cache=alone).cache
            alone = model(np.array([[parent]]), cache=alone).cache
            last = model(np.array([[[[9, 10], [11, 12]][row][branch]]]), cache=alone).logits
            np.testing.assert_allclose(out[row, branch], last[0, 0], atol=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_a_cache_of_another_float(dtype):
    model = our_model("opt-125m", num_hidden_layers=1)
    exact: Any = model.generate(IDS, max_new_tokens=6, logprobs=0, eos_token_id=[])
    out: Any = model.generate(IDS, max_new_tokens=6, logprobs=0, eos_token_id=[], cache_dtype=dtype)
    difference = np.abs(exact.logprobs - out.logprobs)
    assert 0 < difference[:, :2].max() < 0.05


def test_other_cache_dtypes_are_refused():
    model = our_model("opt-125m")
    for value in ("int4", "float64", jnp.int8, 8):
        with pytest.raises(ValueError, match="cache_dtype=.* must be one of int8, float16, bfloat16, float32"):
            model.generate(IDS, cache_dtype=value)
    with pytest.raises(ValueError, match="a cache of int32 is not supported"):
        init_cache(1, 1, 1, 1, 1, jnp.int32)
    assert GenerationConfig(cache_dtype="int8").to_dict() == {"cache_dtype": "int8"}


# Compiled -----------------------------------------------------------------------------------------------------


def test_the_loop_reads_int8_and_writes_no_float_copy_of_it():
    """The compiled loop has no float32 copy of weights or cache, and updates the cache in place."""
    config: dict[str, Any] = dict(
        vocab_size=208,
        hidden_size=48,
        ffn_dim=176,
        num_attention_heads=3,
        word_embed_proj_dim=48,
        max_position_embeddings=128,
        num_hidden_layers=1,
    )
    model = quantize(our_model("opt-125m", **config))
    request = check_request(model, IDS, options=dict(max_new_tokens=90, cache_dtype="int8"))
    slots, _ = engines.PlainEngine(loop.FlatModel.of(model), request).begin(np.arange(3))
    state = slots.state
    arguments = model, state, slots.options, np.int32(9), np.int32(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a donated buffer that cannot be used
        program = loop.advance.lower(*arguments, do_sample=False).compile()
    text = program.as_text() or ""
    shapes = {leaf.shape for leaf in jax.tree.leaves((model, state.cache)) if leaf.dtype == jnp.int8}
    assert (208, 48) in shapes and (3, 3, 128, 16) in shapes and len(shapes) == 5
    for shape in shapes:
        sizes = {",".join(map(str, s)) for s in (shape, shape[::-1], (9, *shape[2:]))}
        assert not any(re.search(rf"= (f32|s32)\[{size}\]", text) for size in sizes), shape
    results = re.findall(r"= s8\[3,3,128,16\]\S* ([\w-]+)\(", text)
    assert results and not {"copy", "select", "gather", "concatenate"} & set(results), results
    memory = program.memory_analysis()
    assert memory and memory.alias_size_in_bytes >= nbytes(state.cache)


# On a mesh ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("spec", ["data=2,fsdp=2,tensor=2"])
def test_the_same_on_a_mesh(spec):
    config: dict[str, Any] = dict(
        vocab_size=96, hidden_size=32, num_attention_heads=8, word_embed_proj_dim=32, num_hidden_layers=1
    )
    model = our_model("opt-125m", **config)
    mesh = make_mesh(spec, jax.devices()[:8])
    meshed = on_mesh(model, mesh)
    alone, small = quantize(model), quantize(meshed)
    layers: Any = small.model.decoder.layers
    fc1: Any = layers[0].fc1
    kernel: Any = named_parameters(meshed)["model.decoder.layers.0.fc1.kernel"].get_value()
    assert fc1.weight.get_value().sharding.spec == P(*reversed(kernel.sharding.spec))
    assert fc1.scale.get_value().sharding.spec[0] == kernel.sharding.spec[1]
    ids = np.tile(IDS, (4, 1))[:8]
    for dtype, tolerance in ((None, 1e-3), ("int8", 0.02)):  # a key may be rounded the other way
        options: dict[str, Any] = dict(max_new_tokens=6, logprobs=0, cache_dtype=dtype)
        expected: Any = alone.generate(ids, **options)
        with use_mesh(mesh):
            out: Any = small.generate(ids, **options)
        np.testing.assert_array_equal(out.sequences, expected.sequences)
        np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=tolerance)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_heads_that_do_not_divide_are_refused():
    model = our_model(
        "opt-125m", vocab_size=96, hidden_size=32, num_attention_heads=4, word_embed_proj_dim=32, num_hidden_layers=1
    )
    model = on_mesh(model, make_mesh("tensor=8", jax.devices()[:8]))
    with pytest.raises(ValueError, match="4 attention heads cannot be split over 8 devices"):
        quantize(model).generate(IDS)
