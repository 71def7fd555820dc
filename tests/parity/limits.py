"""Comparisons with a limit. All go through `within`, which records how much of its limit each one uses:

  PARITY_RATIOS=/tmp/ratios pytest tests/parity; sort -gr /tmp/ratios | head -40

An error near its limit may exceed it on a machine whose kernels round differently. Then correct what the limit is
derived from, not its size. (The limit of a value that is zero in theory must grow with the summands of that value.)
"""

import os

import numpy as np

RATIOS = os.environ.get("PARITY_RATIOS")
TOLERANCE = 1e-4
ROUNDING = 32 * 2**-24  # error of a sum, relative to its summands: 2**-24 for each of dozens of operations
RELU_ROUNDING = 4e-6  # error of a ReLU's input: five times the usual one at the real size


def within(error, limit, what="") -> None:
    """Assert that `error`, a number or an array, is at most `limit` everywhere."""
    error, limit = np.broadcast_arrays(np.asarray(error, np.float64), np.asarray(limit, np.float64))
    ratios = np.where(error == 0, 0, error / np.maximum(limit, np.finfo(np.float64).tiny))
    if RATIOS and ratios.size:
        with open(RATIOS, "a") as file:
            file.write(f"{ratios.max():.3g}\t{os.environ.get('PYTEST_CURRENT_TEST', '')}\t{what}\n")
    worst = np.unravel_index(np.argmax(ratios), ratios.shape) if ratios.size else ()
    assert (error <= limit).all(), f"{what}: {error[worst]:.3g} away, {limit[worst]:.3g} allowed, at {worst}"


def gradient_limit(gradient, summands: float) -> float:
    """The norm of the error that a float32 gradient may have.

    Args:
      gradient: of the oracle, in float64.
      summands: of this gradient, from `oracle.summands`.
    """
    return TOLERANCE * np.linalg.norm(gradient) + ROUNDING * summands


def assert_close(got, expected, atol=0.0, rtol=0.0, what="") -> None:
    """`np.testing.assert_allclose` for arrays of one shape, by way of `within`."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, what
    assert np.isfinite(expected).all(), what
    within(np.abs(got - expected), atol + rtol * np.abs(expected), what)
