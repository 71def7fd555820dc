"""Pruning without PyTorch; tests/parity/test_compression_parity.py compares it with the papers."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import correlated

from opt_jax.compression.pruning import lowest, magnitude, wanda


def norms_of(inputs):
    return np.linalg.norm(inputs.reshape(-1, inputs.shape[-1]), axis=0)


def test_magnitude_removes_the_smallest_of_the_matrix():
    weight, _ = correlated()
    weight[5] = 1
    sparse = np.asarray(magnitude(weight, 0.3))
    removed = sparse == 0
    assert removed.sum() == int(0.3 * weight.size) + 1  # as the authors' threshold does
    assert np.abs(weight[removed]).max() <= np.abs(weight[~removed]).min()
    np.testing.assert_array_equal(sparse[~removed], weight[~removed])
    assert len(np.unique(removed.sum(1))) > 1  # not the same number in each row


def test_wanda_removes_the_same_number_of_each_row():
    weight, inputs = correlated()
    weight[5] = 1
    norms = norms_of(inputs)
    sparse = np.asarray(wanda(weight, norms, 0.3))
    removed = sparse == 0
    assert (removed.sum(1) == 48).all()
    scores = np.abs(weight) * norms
    for row in range(len(weight)):
        assert scores[row][removed[row]].max() <= scores[row][~removed[row]].min()
    np.testing.assert_array_equal(sparse, wanda(weight, 3 * norms, 0.3))
    assert (sparse != np.asarray(wanda(weight, np.ones_like(norms), 0.3))).any()


def test_two_of_four():
    weight, inputs = correlated()
    weight[5] = 1
    for sparse in (magnitude(weight, (2, 4)), wanda(weight, norms_of(inputs), (2, 4))):
        assert ((np.asarray(sparse) == 0).reshape(len(weight), -1, 4).sum(-1) == 2).all()
    assert ((np.asarray(magnitude(weight, (1, 8))) == 0).reshape(len(weight), -1, 8).sum(-1) == 1).all()


def test_of_equal_weights_the_first_go():
    equal = np.ones((2, 8), np.float32)
    np.testing.assert_array_equal(wanda(equal, equal[0], 0.5), [[0] * 4 + [1] * 4] * 2)
    for sparse in (magnitude(equal, (2, 4)), wanda(equal, equal[0], (2, 4))):
        np.testing.assert_array_equal(sparse, [[0, 0, 1, 1] * 2] * 2)
    assert (np.asarray(magnitude(equal, 0.5)) == 0).all()  # all are at most the threshold, as there
    np.testing.assert_array_equal(lowest(jnp.array([[3.0, 1, 1, 0, 1]]), 3), [[False, True, True, True, False]])
    assert not np.asarray(lowest(jnp.ones((2, 8)), 0)).any()


def test_mistakes():
    weight, inputs = correlated()
    bad = {
        0.0: "sparsity is 0.0; it must be between 0 and 1",
        1.0: "sparsity is 1.0; it must be between 0 and 1",
        (4, 4): "sparsity 4:4 removes 4 of 4 weights",
        (0, 4): "sparsity 0:4 removes 0 of 4 weights",
        (2, 3): "sparsity 2:3: 3 does not divide the 160 inputs",
    }
    for sparsity, words in bad.items():
        with pytest.raises(ValueError, match=words):
            magnitude(weight, sparsity)
        with pytest.raises(ValueError, match=words):
            wanda(weight, norms_of(inputs), sparsity)
