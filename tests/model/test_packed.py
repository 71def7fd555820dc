"""Packed matrices and models of them against the matrices that they hold, and dequantised models."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from jax.sharding import PartitionSpec as P
from reference import our_model
from support.decode_loop import HEADS, arguments, make_model
from support.hlo import Program
from support.packed_products import CASES
from support.small_models import on_mesh

from opt_jax import dequantize, named_parameters, quantize, stack_layers
from opt_jax.generation import loop
from opt_jax.model import packing
from opt_jax.model.lora import LoRA
from opt_jax.model.packed import PackedLinear, QuantizedMatrix
from opt_jax.model.packed_models import pack_model, packed_layers
from opt_jax.model.packing import pack, period, unpack
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.research.attribution import attribute

ALL_BITS = range(2, 9)
IDS = np.array([[1, 1, 1, 7, 9], [4, 5, 6, 7, 8], [3, 9, 17, 5, 11]], np.int32)


def random_matrix(
    outputs: int,
    inputs: int,
    bits: int,
    group_size: int | None = None,
    act_order: bool = False,
    symmetric: bool = False,
) -> QuantizedMatrix:
    """A matrix of uniform integers. group_size None: one group."""
    random = np.random.RandomState(outputs + inputs + bits)
    groups = np.arange(inputs) // (group_size or inputs)
    count = groups[-1] + 1
    zeros = np.full((outputs, count), 2 ** (bits - 1)) if symmetric else random.randint(0, 2**bits, (outputs, count))
    return QuantizedMatrix(
        jnp.asarray(random.randint(0, 2**bits, (outputs, inputs)), jnp.uint8),
        jnp.asarray(random.uniform(0.5, 1, (outputs, count)) / 2**bits / inputs**0.5, jnp.float32),
        jnp.asarray(zeros, jnp.float32),
        jnp.asarray(random.permutation(groups) if act_order else groups, jnp.int32),
        bits,
    )


def random_matrices(model, bits: int = 4, **options) -> dict[str, QuantizedMatrix]:
    kernels = {
        path: param.get_value()
        for path, param in named_parameters(model).items()
        if ".layers." in path and path.endswith(".kernel")
    }
    return {path: random_matrix(kernel.shape[1], kernel.shape[0], bits, **options) for path, kernel in kernels.items()}


SHAPES: dict[str, dict[str, Any]] = {
    "one group": dict(outputs=5, inputs=64),
    "groups": dict(outputs=7, inputs=96, group_size=32),
    "symmetric": dict(outputs=7, inputs=96, group_size=32, symmetric=True),
    "act-order": dict(outputs=3, inputs=128, group_size=64, act_order=True),
    "a smaller last group": dict(outputs=4, inputs=80, group_size=32),
    "groups that end within a word": dict(outputs=4, inputs=60, group_size=20, act_order=True, symmetric=True),
    "inputs that fill no word": dict(outputs=3, inputs=13),
}


@pytest.mark.parametrize("bits", ALL_BITS)
def test_packed_integers_are_a_stream_of_bits(bits):
    """The layout of GPTQ's files: bit i * bits + b of a column's words is bit b of its integer i."""
    integers = np.random.RandomState(bits).randint(0, 2**bits, (2 * period(bits), 3)).astype(np.uint8)
    words = np.asarray(pack(jnp.asarray(integers), bits))
    assert words.dtype == np.uint32 and words.shape == (len(integers) * bits // 32, 3)
    stream = np.unpackbits(words.T.copy().view(np.uint8), axis=1, bitorder="little")
    expected = (integers.T[:, :, None] >> np.arange(bits)) & 1
    np.testing.assert_array_equal(stream, expected.reshape(3, -1))
    np.testing.assert_array_equal(unpack(jnp.asarray(words), bits), integers)


@pytest.mark.combinations
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_layer_has_the_matrix_bit_by_bit_and_its_products(bits, shape):
    matrix = random_matrix(bits=bits, **SHAPES[shape])
    packed = PackedLinear.from_matrix(matrix)
    back = packed.matrix()
    for a, b in zip(jax.tree.leaves(matrix), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert (packed.zeros is None) == SHAPES[shape].get("symmetric", False)
    x = np.random.RandomState(0).standard_normal((2, 3, matrix.shape[1]))
    exact = x @ np.asarray(matrix.dequantize(), np.float64).T
    out = np.asarray(packed(jnp.asarray(x, jnp.float32)))
    assert np.abs(out - exact).max() < 1e-5 * np.abs(exact).max()


ONE_GROUP, GROUPS = dict(symmetric=True), dict(group_size=96)
PRODUCTS = {"cpu": packing._on_cpu, "tpu": packing._on_tpu, "gpu": packing._on_gpu}


@pytest.mark.combinations
@pytest.mark.parametrize("options", [ONE_GROUP, GROUPS], ids=["one group", "groups"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 13])
@pytest.mark.parametrize("platform", PRODUCTS)
def test_the_products_of_all_platforms(platform, rows, bits, options):
    """Few rows and many, each computed as on that platform. 1,056 outputs are enough for several threads."""
    matrix = random_matrix(1056, 192, bits, **options)
    packed = PackedLinear.from_matrix(matrix)
    zeros = None if packed.zeros is None else packed.zeros.get_value()
    x = np.random.RandomState(0).uniform(-0.5, 1, (rows, 192)).astype(np.float32)
    out = jax.jit(PRODUCTS[platform], static_argnums=4)(
        x, packed.qweight.get_value(), packed.scales.get_value(), zeros, bits
    )
    exact = x @ np.asarray(matrix.dequantize(), np.float64).T
    assert out.dtype == jnp.float32
    assert np.abs(np.asarray(out) - exact).max() < 1e-5 * np.abs(exact).max()


def test_rounded_inputs_give_products_of_integers():
    """W8A8 as SmoothQuant has it: int8 by token, int8 by output."""
    matrix = random_matrix(24, 64, 8, symmetric=True)
    packed = PackedLinear.from_matrix(matrix, activation_bits=8)
    x = np.random.RandomState(0).standard_normal((1, 3, 64)).astype(np.float32)
    x[0, 1] = 0
    step = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    rounded = np.round(np.divide(x, step, out=np.zeros_like(x), where=step > 0)).astype(int)
    integers = np.asarray(matrix.integers, int) - 128
    exact = (rounded @ integers.T) * (step * np.asarray(matrix.scales)[:, 0])
    np.testing.assert_allclose(packed(jnp.asarray(x)), exact, rtol=1e-5, atol=1e-7)
    assert np.abs(exact - x @ np.asarray(matrix.dequantize()).T).max() > 1e-3  # it does round
    arrays = packed.qweight.get_value(), packed.scales.get_value(), None, 8
    for rows in (1, 3, 20):
        tokens = jnp.asarray(np.tile(rounded[0, :1], (rows, 1)), jnp.int8)
        expected = np.tile(rounded[0, :1] @ integers.T * np.asarray(matrix.scales)[:, 0], (rows, 1))
        for name, each in PRODUCTS.items():
            np.testing.assert_allclose(each(tokens, *arrays), expected, rtol=2e-6, atol=1e-6, err_msg=name)


# Models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    """A packed model and its dequantised one."""
    model = our_model("opt-350m", num_hidden_layers=2)
    packed = pack_model(model, random_matrices(model, group_size=8))
    return packed, dequantize(packed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt-125m", "opt-350m"])
def test_a_packed_model_is_its_dequantised_one(name):
    model = our_model(name, num_hidden_layers=1)
    matrices = random_matrices(model, 3)
    before = jax.tree.leaves(model)
    packed = pack_model(model, matrices)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(model), strict=True))
    assert packed_layers(packed).keys() == matrices.keys() and not packed_layers(model)
    plain = dequantize(packed)
    assert named_parameters(plain).keys() == named_parameters(model).keys()
    for path, matrix in matrices.items():
        np.testing.assert_array_equal(named_parameters(plain)[path].get_value().T, matrix.dequantize())
    np.testing.assert_allclose(packed(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-5)


USES: dict[str, dict[str, Any]] = {
    "greedy": dict(logprobs=0),
    "one row": dict(logprobs=0),
    "beams": dict(num_beams=3),
    "int8 cache": dict(cache_dtype="int8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_it_generates_the_tokens_of_the_dequantised_model(models, use):
    if use == "int8 cache":
        pytest.importorskip("qwix", reason='pip install -e ".[int8]"')
    packed, plain = models
    ids = IDS[:1] if use == "one row" else IDS
    out, expected = (model.generate(ids, max_new_tokens=5, eos_token_id=[], **USES[use]) for model in models)
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    if out.logprobs is not None:
        np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)
        np.testing.assert_allclose(packed.score(out.sequences), plain.score(out.sequences), atol=1e-5)


@pytest.mark.slow
def test_it_has_the_activations_of_the_dequantised_model(models):
    """`hook_result` too, which needs the product of each head's output alone."""
    names = ["blocks.*.attn.hook_result", "blocks.*.mlp.hook_post"]
    (out, kept), (expected, exact) = (model.run_with_cache(IDS, names=names) for model in models)
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-5)
    for name, value in exact.items():
        np.testing.assert_allclose(kept[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_it_computes_in_bfloat16():
    model = our_model("opt-125m", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, num_hidden_layers=1)
    packed = pack_model(model, random_matrices(model, group_size=8))
    assert all(layer.dtype == jnp.bfloat16 for layer in packed_layers(packed).values())
    out, plain = packed(IDS, output_hidden_states=True), dequantize(packed)
    assert named_parameters(plain)["model.decoder.layers.0.fc1.kernel"].get_value().dtype == jnp.bfloat16
    assert out.hidden_states[0].dtype == jnp.bfloat16
    difference = np.asarray(out.logits - plain(IDS).logits)
    assert (
        0 < np.abs(difference).max() < 0.02 * np.abs(np.asarray(out.logits)).max()
    )  # the kernels are not rounded here


def test_it_is_printed_counted_and_resized(models):
    packed, plain = models
    model = our_model("opt-350m", num_hidden_layers=2)
    assert packed.num_parameters() == plain.num_parameters() == model.num_parameters()
    embeddings = model.num_parameters() - model.num_parameters(exclude_embeddings=True)
    assert packed.num_parameters(exclude_embeddings=True) == model.num_parameters() - embeddings
    width, ffn = model.config.hidden_size, model.config.ffn_dim
    assert f"fc1: PackedLinear(4 bits[{width},{ffn}] in groups of 8, zeros uint8[" in str(packed)
    resized = dequantize(packed)
    resized.resize_token_embeddings(70)
    copy = pack_model(model, random_matrices(model, group_size=8))
    copy.resize_token_embeddings(70)
    np.testing.assert_allclose(copy(IDS).logits, resized(IDS).logits, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_is_refused():
    matrix = random_matrix(8, 16, 4, 8)

    def refused(match: str, activation_bits: int | None = None, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            PackedLinear.from_matrix(QuantizedMatrix(**{**vars(matrix), **changes}), activation_bits=activation_bits)

    refused("bits=9: packed matrices have 2 to 8", bits=9)
    refused("zeros of a packed matrix are integers from 0 to 255", zeros=matrix.zeros + 0.5)
    refused("groups of a packed matrix are 0 to 1", groups=matrix.groups + 1)
    refused("activation_bits=4: use 8, or None", activation_bits=4)
    refused("activation_bits=8 needs a matrix of 8 bits, symmetric, with one group", activation_bits=8)

    model = our_model("opt-125m", num_hidden_layers=1)
    path = "model.decoder.layers.0.fc1.kernel"
    for wrong in ("model.decoder.layers.7.fc1.kernel", "model.decoder.embed_tokens.embedding", "fc1"):
        with pytest.raises(
            ValueError, match=rf"'{wrong}' is no kernel .* paths are such as 'model\.decoder\.layers\.0"
        ):
            pack_model(model, {wrong: matrix})
    with pytest.raises(ValueError, match=rf"{path}: the matrix is \(8, 16\), but the kernel's transpose \("):
        pack_model(model, {path: matrix})
    with pytest.raises(ValueError, match=r"use opt_jax.unstack_layers\(model\) first"):
        pack_model(stack_layers(model), {path: matrix})


def test_what_needs_float_kernels_says_so():
    model = our_model("opt-125m", num_hidden_layers=1)
    packed = pack_model(model, random_matrices(model))
    dequantize_first = r"packed matrices: use opt_jax\.dequantize\(model\) first"
    embeds = jnp.ones((1, 4, model.config.embed_dim))
    with pytest.raises(ValueError, match=r"no gradients: use opt_jax\.dequantize\(model\)"):
        jax.grad(lambda x: packed.forward(inputs_embeds=x).logits.sum())(embeds)
    for use in (
        lambda: stack_layers(packed),
        lambda: quantize(packed),
        lambda: LoRA(rank=2, alpha=2).adapt(packed),
        lambda: attribute(packed, IDS, tokens=5),
    ):
        with pytest.raises(ValueError, match=dequantize_first):
            use()
    rounding = pack_model(model, random_matrices(model, 8, symmetric=True), activation_bits=8)
    assert rounding(IDS).logits.shape == (3, 5, model.config.vocab_size)
    with pytest.raises(ValueError, match=r"hook_result is no sum of heads where out_proj rounds its inputs"):
        rounding.run_with_cache(IDS, names=["blocks.0.attn.hook_result"])


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("options", [dict(group_size=16), dict(group_size=8, act_order=True)], ids=["groups", "uneven"])
def test_the_same_on_a_mesh(options):
    """Groups that divide over `tensor` are split. Five groups of act-order do not, and are left whole."""
    config: dict[str, Any] = dict(
        vocab_size=96, hidden_size=32, num_attention_heads=8, word_embed_proj_dim=32, num_hidden_layers=1
    )
    config["ffn_dim"] = 40 if options.get("act_order") else 64
    model = our_model("opt-125m", **config)
    matrices = random_matrices(model, **options)
    mesh = make_mesh("data=2,fsdp=2,tensor=2", jax.devices()[:8])
    alone, meshed = pack_model(model, matrices), pack_model(on_mesh(model, mesh), matrices)
    fc2 = packed_layers(meshed)["model.decoder.layers.0.fc2.kernel"]
    spec = P(None if options.get("act_order") else "tensor", "fsdp")
    assert fc2.qweight.get_value().sharding.spec == fc2.scales.get_value().sharding.spec == spec
    ids = np.tile(IDS, (4, 1))[:8]
    expected: Any = alone.generate(ids, max_new_tokens=4, logprobs=0)
    with use_mesh(mesh):
        out: Any = meshed.generate(ids, max_new_tokens=4, logprobs=0)
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)


# Compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3])
def test_a_decode_step_on_a_cpu_writes_no_floats_of_a_matrix(bits):
    """Neither does it copy the packed words, or the cache."""
    plain = make_model()
    model = pack_model(plain, random_matrices(plain, bits, group_size=128))
    least = min(layer.qweight.get_value().nbytes for layer in packed_layers(model).values())
    for rows, kernels in ((1, 0), (4, 12)):
        args, kwargs = arguments("loop.advance", model, rows=rows)
        program = Program.compiled(loop.advance.lower(*args, **kwargs))
        shape = args[1].cache.k[0].shape
        assert shape[-3] == HEADS
        (decode,) = (each for each in program.loops() if any(a.endswith(f"{shape[-1]}]") for a, _ in each.arrays))
        large = program.large_results(decode.called["body"], least)
        # Four rows write the floats of 128 inputs at a time.
        assert [i.arrays[0][0].startswith("f32[128,") for i in large] == [True] * kernels


TPU, CUDA = Path(sys.prefix) / "libtpu", Path(sys.prefix) / "cuda"
COMPILERS = {"tpu": TPU, "cuda": CUDA}


@pytest.mark.slow
@pytest.mark.parametrize("platform", COMPILERS)
def test_products_on_accelerators_write_no_floats_of_a_matrix(platform, tmp_path):
    """fc1 of the 6.7B, compiled for a TPU v5e and for an H200."""
    place = COMPILERS[platform]
    if not place.is_dir():
        pytest.skip(f"no compiler in {place}: see CONTRIBUTING")
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join(map(str, [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests/parity", place])),
        JAX_PLATFORMS="cpu",
        JAX_DISABLE_MOST_OPTIMIZATIONS="0",
        XLA_FLAGS="",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    command = [sys.executable, "-m", "support.packed_products", platform, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for rows, bits in CASES[platform]:
        program = Program((tmp_path / f"{rows}-{bits}.hlo").read_text())
        packed = 4096 * 16384 * bits // 8
        assert not program.large_results(program.entry, packed // 2), (rows, bits)
    program = Program((tmp_path / "64-4.hlo").read_text())  # many rows do
    assert program.large_results(program.entry, 4096 * 16384 * 2)
