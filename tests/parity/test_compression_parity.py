"""The methods of `opt_jax.compression` against their papers' algorithms, written again in PyTorch.

Same matrix, same calibration inputs. In float64, integers and masks are equal. In float32, one weight that rounds the
other way changes the corrections of all after it: 99.9 % are equal, and the layer errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from opt_jax.compression import gptq, grid, statistics
from opt_jax.compression.grid import Grid

pytestmark = pytest.mark.slow

N, K = 384, 192
DEAD = (3, 70, 71)
GRIDS = [
    Grid(8),
    Grid(4),
    Grid(3),
    Grid(3, symmetric=True),
    Grid(4, 32),
    Grid(3, 64, symmetric=True),
    Grid(4, 96, symmetric=True),
]
PRECISIONS = [pytest.param(np.float64, id="float64"), pytest.param(np.float32, id="float32")]


def layer(dtype, seed=0, rows=N, columns=K, tokens=40):
    """(weight, inputs [B, T, K]): correlated inputs of different sizes; some are always 0, and a row of weights is."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) * np.exp(rng.normal(size=(columns, 1)))
    inputs = rng.normal(size=(8, tokens, columns)) + rng.normal(size=(8, tokens, columns // 4)) @ mixing[: columns // 4]
    inputs[..., list(DEAD)] = 0
    weight = rng.normal(size=(rows, columns)) * np.exp(0.5 * rng.normal(size=(rows, 1)))
    weight[5] = 0
    return weight.astype(dtype), inputs.astype(dtype)


# The papers' algorithms ---------------------------------------------------------------------------------


def hessian_of(inputs):
    """H = 2 / n * sum of x x^T (GPTQ, section 3.1), over n sequences."""
    x = torch.from_numpy(inputs).reshape(-1, inputs.shape[-1])
    return 2 / len(inputs) * x.T @ x


def min_max(weight, grid):
    """(scale, zero) for each row: 0 is on the grid; a row of zeros has the range -1 to 1."""
    low = weight.amin(1).clamp(max=0)
    high = weight.amax(1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    low[empty], high[empty] = -1, 1
    scale = (high - low) / (2**grid.bits - 1)
    return scale, torch.full_like(scale, 2 ** (grid.bits - 1)) if grid.symmetric else torch.round(-low / scale)


def nearest(weight, scale, zero, bits):
    return torch.clamp(torch.round(weight / scale) + zero, 0, 2**bits - 1)


def rtn(weight, grid):
    size = grid.group_size or weight.shape[1]
    parts = [(part, *min_max(part, grid)) for part in weight.split(size, 1)]
    return torch.cat([nearest(part, s[:, None], z[:, None], grid.bits) for part, s, z in parts], 1)


def upper_cholesky_of_inverse(hessian, damping):
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def gptq_of_paper(weight, hessian, grid, act_order=False, static_groups=False, damping=0.01, block_size=128):
    """Algorithm 1, with groups and act-order: (integers, dequantized weights, groups), inputs in their own order."""
    columns = weight.shape[1]
    size = grid.group_size or columns
    scale, zero = min_max(weight, grid)
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    static = [min_max(part, grid) for part in weight.split(size, 1)]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    weight, hessian = weight[:, order], hessian[order][:, order]
    u = upper_cholesky_of_inverse(hessian, damping)
    integers, dense = torch.zeros_like(weight), torch.zeros_like(weight)
    groups = torch.zeros(columns, dtype=torch.int64)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        work, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        for j in range(start, end):
            groups[j] = order[j] // size if static_groups else j // size
            if static_groups:
                scale, zero = static[groups[j]]
            elif grid.group_size and j % size == 0:
                scale, zero = min_max(weight[:, j : j + size], grid)
            integers[:, j] = nearest(work[:, j - start], scale, zero, grid.bits)
            dense[:, j] = (integers[:, j] - zero) * scale
            errors[:, j - start] = (work[:, j - start] - dense[:, j]) / u[j, j]
            work[:, j - start :] -= torch.outer(errors[:, j - start], u[j, j:end])
        weight[:, end:] -= errors @ u[start:end, end:]
    back = torch.argsort(order)
    return integers[:, back], dense[:, back], groups[back]


def relative_error(weight, dense, hessian):
    change = weight - dense
    return float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())


# The comparisons ----------------------------------------------------------------------------------------


def compare(ours, theirs, dtype):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    share = (ours == theirs).mean()
    assert share == 1 if dtype == np.float64 else share >= 0.999, share


def run(dtype, function, *arrays, **options):
    """The function's results, computed in this precision, as NumPy arrays."""
    with jax.enable_x64(dtype == np.float64):
        return jax.tree.map(np.asarray, function(*map(jnp.asarray, arrays), **options))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("points", GRIDS, ids=str)
def test_round_to_nearest(points, dtype):
    weight, _ = layer(dtype)
    ours = run(dtype, lambda w: grid.round_to_nearest(w, points), weight)
    theirs = rtn(torch.from_numpy(weight), points)
    np.testing.assert_array_equal(ours.integers, theirs)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_hessian(dtype):
    _, inputs = layer(dtype)

    def ours(inputs):
        hessian = jnp.zeros((K, K), inputs.dtype)
        for sequences, size in ((0, 3), (3, 1), (4, 4)):
            hessian = statistics.add_hessian(hessian, sequences, inputs[sequences : sequences + size])
        return hessian

    np.testing.assert_allclose(run(dtype, ours, inputs), hessian_of(inputs), rtol=1e-4, atol=1e-3)


ACT_ORDER, STATIC = dict(act_order=True), dict(act_order=True, static_groups=True)
GPTQ = [
    (Grid(8), {}),
    (Grid(4), ACT_ORDER),
    (Grid(3), dict(block_size=40, damping=0.1)),
    (Grid(3, symmetric=True), ACT_ORDER),
    (Grid(4, 32), {}),
    (Grid(3, 32), ACT_ORDER),
    (Grid(4, 32), STATIC),
    (Grid(3, 64, symmetric=True), {}),
    (Grid(4, 96, symmetric=True), ACT_ORDER | dict(block_size=40)),
]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("points, options", GPTQ, ids=str)
def test_gptq(points, options, dtype):
    weight, inputs = layer(dtype)
    hessian = hessian_of(inputs)
    integers, dense, groups = gptq_of_paper(torch.from_numpy(weight), hessian, points, **options)
    ours, error = run(dtype, lambda w, h: gptq.gptq(w, h, points, **options), weight, hessian)
    compare(ours.integers, integers, dtype)
    np.testing.assert_array_equal(ours.groups, groups)
    np.testing.assert_allclose(error, relative_error(torch.from_numpy(weight), dense, hessian), rtol=1e-3)
