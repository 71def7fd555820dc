"""Packed matrices and models of them against the matrices that they hold, and dequantised models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import our_model

from opt_jax import dequantize, named_parameters, quantize, stack_layers
from opt_jax.model.packed import PackedLinear, QuantizedMatrix, pack, period, unpack
from opt_jax.model.packed_models import pack_model, packed_layers

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
    return {path: random_matrix(*kernel.shape[::-1], bits, **options) for path, kernel in kernels.items()}


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


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m"])
def test_a_packed_model_is_its_dequantised_one(name):
    model = our_model(name)
    matrices = random_matrices(model, group_size=8)
    before = jax.tree.leaves(model)
    packed = pack_model(model, matrices)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(model), strict=True))
    assert packed_layers(packed).keys() == matrices.keys() and not packed_layers(model)
    plain = dequantize(packed)
    assert named_parameters(plain).keys() == named_parameters(model).keys()
    for path, matrix in matrices.items():
        np.testing.assert_array_equal(named_parameters(plain)[path].get_value().T, matrix.dequantize())
    np.testing.assert_allclose(packed(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(
        packed.generate(IDS, max_new_tokens=5).sequences, plain.generate(IDS, max_new_tokens=5).sequences
    )


def test_what_takes_floats_refuses_packed_matrices():
    model = our_model("opt-125m")
    packed = pack_model(model, random_matrices(model))
    for function, what in ((stack_layers, "a stack of layers"), (quantize, "quantize")):
        with pytest.raises(ValueError, match=rf"{what} takes matrices of floats.*use opt_jax.dequantize\(model\)"):
            function(packed)
