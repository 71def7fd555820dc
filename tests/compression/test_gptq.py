"""GPTQ without PyTorch; tests/parity/test_compression_parity.py compares it with the paper's algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import DEAD, correlated, first_layer

from opt_jax.compression.gptq import gptq, inverse_factor
from opt_jax.compression.grid import Grid, round_to_nearest
from opt_jax.compression.statistics import add_hessian, layer_error


def hessian_of(inputs):
    return add_hessian(jnp.zeros((inputs.shape[-1],) * 2), 0, inputs)


@pytest.mark.parametrize("point", ["ln1.hook_normalized", "attn.hook_z", "ln2.hook_normalized", "mlp.hook_post"])
def test_outputs_of_a_trained_layer_change_less_than_by_rounding(point):
    weight, inputs = first_layer()[point]
    hessian = hessian_of(inputs)
    for grid in (Grid(4), Grid(3), Grid(3, 32)):
        rounded = float(layer_error(weight, round_to_nearest(weight, grid), hessian))
        matrix, error = gptq(weight, hessian, grid)
        assert error == float(layer_error(weight, matrix, hessian)) < 0.9 * rounded


def test_more_bits_are_better_and_options_have_an_effect():
    weight, inputs = correlated()
    hessian = hessian_of(inputs)
    errors = [gptq(weight, hessian, Grid(bits, 32))[1] for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    grid = Grid(3, 32)
    options = [{}, dict(act_order=True), dict(static_groups=True), dict(act_order=True, static_groups=True)]
    options += [dict(damping=0.1), dict(block_size=32)]
    results = [np.asarray(gptq(weight, hessian, grid, **each)[0].integers).tobytes() for each in options]
    assert len(set(results)) == len(options)


def test_groups_of_act_order():
    """Consecutive in the order of the diagonal; with static groups, neighbours."""
    weight, inputs = correlated()
    hessian = hessian_of(inputs)
    matrix, _ = gptq(weight, hessian, Grid(4, 32), act_order=True)
    diagonal = np.asarray(jnp.diagonal(hessian))
    order = np.argsort(-np.where(diagonal == 0, 1, diagonal), kind="stable")
    np.testing.assert_array_equal(np.asarray(matrix.groups)[order], np.arange(160) // 32)
    matrix, _ = gptq(weight, hessian, Grid(4, 32), act_order=True, static_groups=True)
    np.testing.assert_array_equal(matrix.groups, np.arange(160) // 32)


def test_weights_of_dead_inputs_become_zero():
    weight, inputs = correlated()
    for options in ({}, dict(act_order=True)):
        matrix, _ = gptq(weight, hessian_of(inputs), Grid(4, 32), **options)
        assert (np.asarray(matrix.dequantize())[:, list(DEAD)] == 0).all()


def test_factor():
    _, inputs = correlated()
    hessian = hessian_of(inputs)
    factor = np.asarray(inverse_factor(hessian, 0.01), np.float64)
    damped = np.asarray(hessian) + 0.01 * np.diagonal(hessian).mean() * np.eye(len(hessian))
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(len(hessian)), atol=1e-3)
    assert (np.tril(factor, -1) == 0).all()


def test_one_program_without_a_step_for_each_column():
    """The size of the program does not depend on that of the matrix."""
    from opt_jax.compression.gptq import _gptq

    def lines(columns):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, columns), (columns, columns))]
        options = dict(act_order=True, static_groups=False, damping=0.01, block_size=32)
        return len(_gptq.lower(*shapes, Grid(4, 32), **options).as_text().splitlines())

    assert lines(64) == lines(640)


def test_mistakes():
    weight, inputs = correlated()
    hessian = hessian_of(inputs)
    with pytest.raises(ValueError, match="the Hessian has the trace 0.0: no inputs of the matrix were collected"):
        gptq(weight, 0 * hessian, Grid(4))
    with pytest.raises(ValueError, match="the trace nan"):
        gptq(weight, hessian * jnp.nan, Grid(4))
    with pytest.raises(ValueError, match="not positive definite; use more calibration tokens, or a larger damping"):
        gptq(weight, hessian - jnp.diag(jnp.diagonal(hessian)) / 2, Grid(4))
    with pytest.raises(ValueError, match="group_size 48 does not divide the 160 inputs"):
        gptq(weight, hessian, Grid(4, 48))
