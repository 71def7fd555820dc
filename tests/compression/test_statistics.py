import jax.numpy as jnp
import numpy as np
from support.matrices import correlated

from opt_jax.compression import statistics
from opt_jax.compression.grid import Grid, round_to_nearest


def test_running_statistics_are_those_of_all_sequences_together():
    _, inputs = correlated()
    size = inputs.shape[-1]
    hessian, squares, absmax = jnp.zeros((size, size)), jnp.zeros(size), jnp.zeros(size)
    for before, after in ((0, 1), (1, 6), (6, 8)):
        batch = inputs[before:after]
        hessian = statistics.add_hessian(hessian, before, batch)
        squares = statistics.add_squares(squares, before, batch)
        absmax = statistics.add_absmax(absmax, batch)
    tokens = inputs.reshape(-1, size).astype(np.float64)
    np.testing.assert_allclose(hessian, 2 / 8 * tokens.T @ tokens, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(squares, (tokens**2).sum(0) / 8, rtol=1e-5)
    np.testing.assert_array_equal(absmax, np.abs(tokens).max(0))


def test_half_precision_inputs_are_summed_in_float32():
    inputs = jnp.ones((2, 4096, 4), jnp.bfloat16)
    hessian = statistics.add_hessian(jnp.zeros((4, 4)), 0, inputs)
    assert hessian.dtype == jnp.float32
    np.testing.assert_allclose(hessian, np.full((4, 4), 8192.0), rtol=1e-6)


def test_layer_error_is_that_of_the_outputs():
    weight, inputs = correlated()
    hessian = statistics.add_hessian(jnp.zeros((weight.shape[1],) * 2), 0, inputs)
    matrix = round_to_nearest(weight, Grid(3))
    expected, outputs = (inputs.astype(np.float64) @ x.T for x in (weight, np.asarray(matrix.dequantize())))
    error = ((outputs - expected) ** 2).sum() / (expected**2).sum()
    for compressed in (matrix, matrix.dequantize()):
        np.testing.assert_allclose(statistics.layer_error(weight, compressed, hessian), error, rtol=1e-4)
    assert statistics.layer_error(weight, weight, hessian) == 0
    assert statistics.layer_error(0 * weight, 0 * weight, hessian) == 0
