"""Comparisons with a limit. All of them go through `within`, so that those that live near their limit can be seen:

  PARITY_RATIOS=/tmp/ratios pytest tests/parity; sort -gr /tmp/ratios | head -40

A limit that is nearly reached here is passed on a machine whose kernels round differently. Then the principle of the
limit is to be mended (for what is zero in theory it needs the size of what adds up to it), not its size.
"""

import os

import numpy as np

RATIOS = os.environ.get("PARITY_RATIOS")
TOLERANCE = 1e-4
ROUNDING = 32 * 2**-24  # of a sum, beside its summands: 2**-24 in one operation, and dozens lead to them
RELU_ROUNDING = 4e-6  # of a ReLU's input: five times the usual in the real size


def within(error, limit, what="") -> None:
    """`error`, a number or an array, is at most `limit` everywhere."""
    error, limit = np.broadcast_arrays(np.asarray(error, np.float64), np.asarray(limit, np.float64))
    ratios = np.where(error == 0, 0, error / np.maximum(limit, np.finfo(np.float64).tiny))
    if RATIOS and ratios.size:
        with open(RATIOS, "a") as file:
            file.write(f"{ratios.max():.3g}\t{os.environ.get('PYTEST_CURRENT_TEST', '')}\t{what}\n")
    worst = np.unravel_index(np.argmax(ratios), ratios.shape) if ratios.size else ()
    assert (error <= limit).all(), f"{what}: {error[worst]:.3g} away, {limit[worst]:.3g} allowed, at {worst}"


def gradient_limit(gradient, summands: float) -> float:
    """How far from `gradient`, of the oracle in float64, one of float32 may be. `summands` are `oracle.summands`."""
    return TOLERANCE * np.linalg.norm(gradient) + ROUNDING * summands


def assert_close(got, expected, atol=0.0, rtol=0.0, what="") -> None:
    """Arrays of the same shape; as `np.testing.assert_allclose`, but recorded."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, what
    assert np.isfinite(expected).all(), what
    within(np.abs(got - expected), atol + rtol * np.abs(expected), what)
