"""SparseGPT without PyTorch; tests/parity/test_compression_parity.py compares it with the paper's algorithm."""

import numpy as np
import pytest
from support.matrices import DEAD, correlated, first_layer
from test_gptq import hessian_of

from opt_jax.compression.grid import Grid, round_to_nearest
from opt_jax.compression.pruning import magnitude
from opt_jax.compression.sparsegpt import sparsegpt
from opt_jax.compression.statistics import layer_error
from opt_jax.model.packed import QuantizedMatrix


@pytest.mark.parametrize("point", ["ln1.hook_normalized", "attn.hook_z", "ln2.hook_normalized", "mlp.hook_post"])
def test_outputs_of_a_trained_layer_change_less_than_by_magnitude(point):
    weight, inputs = first_layer()[point]
    hessian = hessian_of(inputs)
    for sparsity in (0.5, (2, 4)):
        sparse, error = sparsegpt(weight, hessian, sparsity)
        magnitude_error = float(layer_error(weight, magnitude(weight, sparsity), hessian))
        assert error == float(layer_error(weight, sparse, hessian)) < 0.9 * magnitude_error
        assert 0.5 <= (np.asarray(sparse) == 0).mean() < 0.51
    joint, error = sparsegpt(weight, hessian, 0.5, Grid(4))
    rounded = round_to_nearest(magnitude(weight, 0.5), Grid(4))
    assert isinstance(joint, QuantizedMatrix) and error < 0.9 * float(layer_error(weight, rounded, hessian))
    assert (np.asarray(joint.dequantize()) == 0).mean() >= 0.5


def test_two_of_each_four_are_zero():
    weight, inputs = correlated()
    for grid in (None, Grid(3, 32)):
        sparse, _ = sparsegpt(weight, hessian_of(inputs), (2, 4), grid)
        dense = np.asarray(sparse.dequantize() if isinstance(sparse, QuantizedMatrix) else sparse)
        zeros = (dense.reshape(len(dense), -1, 4) == 0).sum(-1)
        assert (zeros >= 2).all() and (grid is not None or (zeros[0] == 2).mean() > 0.9)
        assert (dense[:, list(DEAD)] == 0).all()


def test_options_have_an_effect():
    weight, inputs = correlated()
    options = [{}, dict(damping=0.1), dict(block_size=32)]
    results = [np.asarray(sparsegpt(weight, hessian_of(inputs), 0.5, **each)[0]).tobytes() for each in options]
    assert len(set(results)) == len(options)


def test_mistakes():
    weight, inputs = correlated()
    hessian = hessian_of(inputs)
    with pytest.raises(ValueError, match="sparsity is 1.0; it must be between 0 and 1"):
        sparsegpt(weight, hessian, 1.0)
    with pytest.raises(ValueError, match="sparsity 2:4: 4 does not divide block_size 30"):
        sparsegpt(weight, hessian, (2, 4), block_size=30)
    with pytest.raises(ValueError, match="no inputs of the matrix were collected"):
        sparsegpt(weight, 0 * hessian, 0.5)
