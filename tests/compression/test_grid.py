import numpy as np
import pytest
from support.matrices import correlated

from opt_jax.compression.grid import Grid, round_to_nearest


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32, 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_go_to_the_nearest_point(bits, group_size, symmetric):
    weight, _ = correlated()
    matrix = round_to_nearest(weight, Grid(bits, group_size, symmetric))
    size = group_size or weight.shape[1]
    assert matrix.scales.shape == matrix.zeros.shape == (len(weight), weight.shape[1] // size)
    np.testing.assert_array_equal(matrix.groups, np.arange(weight.shape[1]) // size)
    steps = np.asarray(matrix.scales[:, matrix.groups])
    # The range of an asymmetric grid is moved by up to half a step so that 0 lies on it; with symmetric ones, the upper
    # end is half a step below the largest weight.
    assert (np.abs(matrix.dequantize() - weight) <= steps * (1 + 1e-5)).all()
    assert (np.abs(matrix.dequantize() - weight) <= steps * (0.5 + 1e-5)).mean() > 0.98 or size == 1
    integers = np.asarray(matrix.integers)
    assert integers.min() == 0 and integers.max() == 2**bits - 1 and matrix.bits == bits


def test_zeros_stay_zeros():
    weight, _ = correlated()
    weight = np.where(np.random.default_rng(0).random(weight.shape) < 0.5, 0, weight)
    for grid in (Grid(3), Grid(4, 32), Grid(3, 32, symmetric=True)):
        matrix = round_to_nearest(weight, grid)
        assert (np.asarray(matrix.dequantize())[weight == 0] == 0).all()
        assert (np.asarray(matrix.zeros) == np.round(matrix.zeros)).all()
        if grid.symmetric:
            assert (np.asarray(matrix.zeros) == 2 ** (grid.bits - 1)).all()


def test_rows_of_one_sign_and_of_zeros():
    """0 is on the grid, a row of zeros has steps that are not 0, and a symmetric grid does not clip positive rows."""
    weight = np.array([[1.0, 2.0, 15.0], [-1, -2, -15], [0, 0, 0]], np.float32)
    matrix = round_to_nearest(weight, Grid(4))
    np.testing.assert_array_equal(matrix.dequantize(), weight)
    np.testing.assert_array_equal(matrix.zeros[:2, 0], [0, 15])
    assert np.isclose(matrix.scales[2, 0], 2 / 15)
    symmetric = round_to_nearest(weight, Grid(4, symmetric=True))
    np.testing.assert_allclose(symmetric.scales[:, 0], [2, 2, 2 / 15])
    np.testing.assert_array_equal(symmetric.dequantize()[0], [0, 2, 14])


def test_mistakes():
    weight, _ = correlated()
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"bits is {bits}; it must be 2 to 8"):
            Grid(bits)
    with pytest.raises(ValueError, match="group_size is 0; it must be positive, or None"):
        Grid(4, 0)
    with pytest.raises(ValueError, match="group_size 48 does not divide the 160 inputs"):
        round_to_nearest(weight, Grid(4, 48))
