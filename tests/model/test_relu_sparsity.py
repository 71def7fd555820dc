"""Models that skip the zeros that ReLU makes: the same numbers, from fewer rows of fc2."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import batch, our_model
from support import decode_loop
from support.hlo import Program
from support.small_models import first_layers, on_mesh

from opt_jax import Add, AutoTokenizer, OPTForCausalLM, quantize, stack_layers, use_relu_sparsity
from opt_jax.generation import loop
from opt_jax.model.relu_sparsity import MAX_TOKENS, UNROLL, SkipZeros
from opt_jax.parallel.mesh import make_mesh

F, D, CAPACITY = 100, 24, 0.4
DIMENSIONS = (((2,), (0,)), ((), ()))


@jax.jit
def product(x, kernel):
    return SkipZeros(lambda x, kernel, _, **kwargs: jnp.matmul(x, kernel, **kwargs), CAPACITY)(x, kernel, DIMENSIONS)


def inputs(shape: tuple[int, int], live: int, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """x [B, T, F] that is zero for all but `live` neurons, the kernel, and which neurons are live.

    All are small integers, so that sums are exact in any order. Each live neuron is zero for most tokens.
    """
    rng = np.random.default_rng(0)
    neurons = np.array([F - 1, *rng.permutation(F - 1)])[:live]
    x = np.zeros((*shape, F))
    x.reshape(-1, F)[rng.integers(0, shape[0] * shape[1], live), neurons] = rng.choice([-3, -1, 1, 2, 5], live)
    return jnp.asarray(x, dtype), jnp.asarray(rng.integers(-4, 5, (F, D)), dtype), np.isin(np.arange(F), neurons)


# The product ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("live", [0, 1, UNROLL, UNROLL + 1, 39, 40, 41, F])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (MAX_TOKENS, 1), (2, 3)])
@pytest.mark.combinations
def test_the_product_is_exact(shape, live, dtype):
    x, kernel, _ = inputs(shape, live, jnp.dtype(dtype))
    out = product(x, kernel)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, np.asarray(x, np.float32) @ np.asarray(kernel, np.float32))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (MAX_TOKENS, 1), (2, 3)])
def test_rows_without_a_live_neuron_are_not_read(shape):
    """Not a number in these rows does no harm, unless the layer reads all rows."""
    for live, tokens, skips in ((0, 0, True), (40, 0, True), (41, 0, False), (40, MAX_TOKENS, False)):
        x, kernel, is_live = inputs((shape[0], shape[1] + tokens), live)
        broken = jnp.where(is_live[:, None], kernel, jnp.nan)
        out = product(x, broken)
        assert np.isfinite(out).all() == skips, (live, tokens)
        if skips:
            np.testing.assert_array_equal(out, x @ kernel)


def test_not_a_number_is_live():
    x, kernel, _ = inputs((2, 1), 5)
    out = product(x.at[0, 0, int(jnp.argmin(jnp.abs(x).max((0, 1))))].set(jnp.nan), kernel)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_the_product_has_the_gradients_of_all_rows():
    x, kernel, _ = inputs((2, 1), 5)
    out, pull = jax.vjp(product, x, kernel)
    expected, dense_pull = jax.vjp(jnp.matmul, x, kernel)
    assert np.abs(expected).max() > 0
    for a, b in zip(pull(out), dense_pull(out), strict=True):
        np.testing.assert_array_equal(a, b)


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model = first_layers(3)
    return model, use_relu_sparsity(model)


def test_the_embedded_model_generates_the_same(tiny):
    model, sparse = tiny
    assert all(a is b for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(sparse), strict=True))
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    prompts = tokenizer(["def main():", "import numpy as"], padding=True)
    options: dict[str, Any] = dict(max_new_tokens=12, eos_token_id=[], logprobs=0)
    expected, out = (m.generate(**prompts, **options) for m in (model, sparse))
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_allclose(sparse.score(out.sequences), model.score(out.sequences), atol=1e-5)


@pytest.mark.parametrize("name", ["opt-350m"])  # post-norm, with projections
def test_the_logits_are_those_of_the_dense_model(name):
    model = our_model(name)
    ids = batch(name)["input_ids"][:, :2]
    for sparse in (use_relu_sparsity(model), use_relu_sparsity(model, capacity=0.01)):
        np.testing.assert_allclose(sparse(ids).logits, model(ids).logits, atol=1e-5)


def test_what_a_hook_makes_of_the_neurons_counts(tiny):
    """A neuron that a hook lifts from zero is live, and one may be negative then."""
    model, sparse = tiny
    change = jnp.zeros(model.config.ffn_dim).at[::9].set(-2.0)
    ids = np.array([[5, 6, 7]])
    expected, out = (
        m.run_with_hooks(ids, hooks={"blocks.1.mlp.hook_post": Add(change)}).logits for m in (model, sparse)
    )
    assert np.abs(expected - model(ids).logits).max() > 0.1
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_what_cannot_skip_zeros_is_refused(tiny):
    model = our_model("opt-125m", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"needs activation_function='relu': 'gelu' gives no zeros"):
        use_relu_sparsity(our_model("galactica", num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"use opt_jax.unstack_layers\(model\) first"):
        use_relu_sparsity(stack_layers(nnx.clone(model)))
    for capacity in (0, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"capacity=.*: must be above 0 and at most 1"):
            use_relu_sparsity(model, capacity)
    with pytest.raises(ValueError, match="skips zeros already"):
        use_relu_sparsity(tiny[1])
    with pytest.raises(ValueError, match="cannot skip zeros: quantize the model that use_relu_sparsity was given"):
        quantize(tiny[1])
    packed = nnx.clone(model)
    packed.model.decoder.layers[0].fc2 = nnx.data(None)
    with pytest.raises(ValueError, match="that is not quantized, and fc2 is NoneType"):
        use_relu_sparsity(packed)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_model_on_a_mesh_is_refused():
    model = on_mesh(our_model("opt-125m", num_hidden_layers=1, vocab_size=96), make_mesh("tensor=2", jax.devices()[:2]))
    with pytest.raises(ValueError, match="takes a model on one device: load it without mesh"):
        use_relu_sparsity(model)


# Compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_reads_single_rows_and_copies_nothing(dtype):
    """Each kernel of fc2 is read by one conditional: there by a product, or by a loop that takes 8 rows a turn."""
    config = decode_loop.CONFIG
    model = OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    args, kwargs = decode_loop.arguments("loop.advance", use_relu_sparsity(model, 0.25), rows=1)
    program = Program.compiled(loop.advance.lower(*args, **kwargs))
    kernel = f"f32[{config.ffn_dim},{config.hidden_size}]"  # a CPU casts to float32, before the loop
    steps = next(w for w in program.loops() if sum(array == kernel for array, _ in w.arrays) > 1)
    size = 4 * config.hidden_size**2
    assert not program.large_results(steps.called["body"], size), "each step copies a weight or a cache"

    readers = {k: v for k, v in program.readers(steps.called["body"], size).items() if kernel in k}
    assert len(readers) == config.num_hidden_layers and not any(readers.values()), "only conditionals take the kernels"
    conditionals = [i for i in program.computations[steps.called["body"]].values() if i.op == "conditional"]
    assert len(conditionals) == config.num_hidden_layers
    for conditional in conditionals:
        dense, sparse = sorted(conditional.called.values(), key=lambda name: len(program.loops(name)))
        assert any(program.multiplies(i) for i in program.written_out(dense)) and not program.loops(dense)
        (rows,) = (w for w in program.loops(sparse) if kernel in dict(w.arrays))
        assert not any(program.multiplies(i) for i in program.written_out(sparse))
        assert (f"s32[{config.ffn_dim // 4}]", config.ffn_dim) in rows.arrays  # the numbers of as many rows
        (readers,) = program.readers(rows.called["body"], size).values()
        (fusion,) = (program.computations[i.called["calls"]] for i in readers)
        kernels = {name for name, i in fusion.items() if i.op == "parameter" and kernel in i.shape}
        taken = [(i.op, i.arrays[0][0]) for i in fusion.values() if kernels.intersection(i.operands)]
        assert taken == [("dynamic-slice", f"f32[1,{config.hidden_size}]")] * UNROLL
