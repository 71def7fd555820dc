"""AWQ without PyTorch; tests/parity/test_compression_parity.py compares it with the paper."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import correlated

from opt_jax.compression import awq
from opt_jax.compression.grid import Grid, round_to_nearest

GRID = Grid(3, 32)


def layer():
    weight, inputs = correlated()
    inputs *= np.exp(np.random.default_rng(1).normal(size=inputs.shape[-1])).astype(np.float32)  # salient inputs
    return weight, inputs


def change(weight, matrix, inputs, scales: Any = 1.0):
    """The squared change of the outputs."""
    return np.square(inputs / scales @ np.asarray(matrix.dequantize()).T - inputs @ weight.T).mean()


def test_outputs_change_less_than_by_rounding():
    weight, inputs = layer()
    scales = awq.search_scales([weight], [inputs[:3], inputs[3:]], awq.product, GRID)
    plain = change(weight, round_to_nearest(weight, GRID), inputs)
    scaled = change(weight, awq.quantize(weight, scales, None, GRID), inputs, scales)
    clipped = change(weight, awq.quantize(weight, scales, inputs.reshape(-1, inputs.shape[-1]), GRID), inputs, scales)
    assert clipped < scaled < 0.9 * plain


def test_the_ratio_is_the_best_of_all():
    weight, inputs = layer()
    mean = np.abs(inputs).mean((0, 1))
    losses = []
    for step in range(20):
        scales = np.maximum(mean ** (step / 20), 1e-4)
        scales /= np.sqrt(scales.max() * scales.min())
        losses.append((change(weight, round_to_nearest(weight * scales, GRID), inputs, scales), scales))
    best = min(losses, key=lambda pair: pair[0])[1]
    assert 0 < np.argmin([loss for loss, _ in losses]) < 19
    scales = awq.search_scales([weight], [inputs], awq.product, GRID)
    np.testing.assert_allclose(scales, best, rtol=1e-4)
    first = awq.search_scales([weight], [inputs], awq.product, GRID, steps=1)
    np.testing.assert_array_equal(first, np.ones_like(mean))  # the ratio 0


def test_several_matrices_share_scales_and_outputs_count():
    weight, inputs = layer()
    parts = [weight[:40], weight[40:]]
    both = awq.search_scales(parts, [inputs], jax.jit(lambda parts, x: x @ jnp.concatenate(parts).T), GRID)
    np.testing.assert_allclose(both, awq.search_scales([weight], [inputs], awq.product, GRID), rtol=1e-5)
    one = awq.search_scales(parts, [inputs], lambda parts, x: x[..., :1] * parts[0].sum(), GRID)
    assert (np.asarray(one) != np.asarray(both)).any()


def test_scales_pass_through_relu():
    """fc1 divided by scales, fc2 times scales: the same function, because relu(x / s) is relu(x) / s."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in ((64, 16), 64, (16, 64), (5, 16), 64)]
    fc1, bias, fc2, x, scales = (jnp.asarray(value, jnp.float32) for value in values)
    scales = jnp.exp(scales)
    new_fc1, new_bias = awq.fold_into_outputs(fc1, bias, scales)
    new_fc2 = awq.fold_into_inputs(fc2, scales)
    assert new_bias is not None
    expected = jax.nn.relu(x @ fc1.T + bias) @ fc2.T
    np.testing.assert_allclose(jax.nn.relu(x @ new_fc1.T + new_bias) @ new_fc2.T, expected, rtol=1e-4, atol=1e-4)
    assert awq.fold_into_outputs(fc1, None, scales)[1] is None


def test_clip():
    weight, inputs = layer()
    tokens = inputs.reshape(-1, inputs.shape[-1])
    limits = np.asarray(awq.search_clip(weight, tokens, GRID))
    largest = np.abs(weight).reshape(len(weight), -1, 32).max(-1)
    assert limits.shape == largest.shape and (limits <= largest).all() and (limits >= 0.55 * largest * 0.999).all()
    clipped = np.asarray(awq.clip(weight, limits)).reshape(len(weight), -1, 32)
    np.testing.assert_array_equal(np.abs(clipped).max(-1), limits)
    changes: list[dict[str, Any]] = [dict(steps=4), dict(shrink=0.1), dict(tokens=20)]
    for options in changes:
        assert (np.asarray(awq.search_clip(weight, tokens, GRID, **options)) != limits).any()


def test_mistakes():
    weight, inputs = layer()
    with pytest.raises(ValueError, match="no inputs of the matrix were collected"):
        awq.search_scales([weight], [], awq.product, GRID)
    with pytest.raises(ValueError, match="not all are finite"):
        awq.search_scales([weight], [inputs], lambda weights, x: awq.product(weights, x) * jnp.inf, GRID)
