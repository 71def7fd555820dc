"""SmoothQuant without PyTorch; tests/parity/test_compression_parity.py compares it with the paper."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS
from support.matrices import correlated

from opt_jax import OPTConfig
from opt_jax.compression import smoothquant


def outliers():
    weight, inputs = correlated()
    inputs[..., 40] *= 100
    return weight, inputs.reshape(-1, inputs.shape[-1])


def w8a8(weight, inputs):
    integers, scales = smoothquant.quantize_activations(inputs)
    assert integers.dtype == np.int8 and np.abs(np.asarray(integers, np.int32)).max() == 127
    return np.asarray(integers, np.float32) * scales @ np.asarray(smoothquant.quantize_weight(weight).dequantize()).T


def test_smoothed_products_are_the_same_and_round_less():
    weight, inputs = outliers()
    scales = smoothquant.smoothing_scales(np.abs(inputs).max(0), [weight[:30], weight[30:]])
    smooth_weight, smooth_inputs = smoothquant.fold_into_inputs(weight, scales), inputs / scales
    expected = inputs @ weight.T
    np.testing.assert_allclose(smooth_inputs @ smooth_weight.T, expected, rtol=1e-3, atol=1e-3)
    before, after = (np.linalg.norm(w8a8(*x) - expected) for x in ((weight, inputs), (smooth_weight, smooth_inputs)))
    assert after < 0.5 * before


def test_alpha_moves_the_range_from_activations_to_weights():
    weight, inputs = outliers()
    absmax = np.abs(inputs).max(0)
    alive = absmax > 0
    none, all_of_it = (smoothquant.smoothing_scales(absmax, [weight], alpha) for alpha in (0.0, 1.0))
    np.testing.assert_allclose(np.abs(weight * none).max(0), 1, rtol=1e-5)
    np.testing.assert_allclose((absmax / all_of_it)[alive], 1, rtol=1e-5)


def test_layer_norm_takes_the_scales():
    rng = np.random.default_rng(0)
    scale, bias, x = rng.normal(size=(3, 160)).astype(np.float32)
    scales = jnp.exp(rng.normal(size=160).astype(np.float32))
    new_scale, new_bias = smoothquant.fold_into_norm(scale, bias, scales)
    np.testing.assert_allclose((x * new_scale + new_bias) * scales, x * scale + bias, rtol=1e-5, atol=1e-6)


def test_weights_have_int8_and_a_scale_for_each_output():
    weight, _ = correlated()
    matrix = smoothquant.quantize_weight(weight)
    assert matrix.bits == 8 and matrix.scales.shape == (len(weight), 1) and (np.asarray(matrix.zeros) == 128).all()
    assert np.asarray(matrix.integers).min() == 1 and np.asarray(matrix.integers).max() == 255
    assert (np.abs(matrix.dequantize() - weight) <= matrix.scales * 0.501).all()


def test_norms_that_take_no_scales_are_refused():
    smoothquant.check_norms(CONFIGS["opt-125m"])
    with pytest.raises(ValueError, match="do_layer_norm_before=False"):
        smoothquant.check_norms(CONFIGS["opt-350m"])
    with pytest.raises(ValueError, match="layer_norm_elementwise_affine=False"):
        smoothquant.check_norms(OPTConfig(layer_norm_elementwise_affine=False))
