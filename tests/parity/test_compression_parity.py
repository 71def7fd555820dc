"""The methods of `opt_jax.compression` against their papers' algorithms, written again in PyTorch.

Same matrix, same calibration inputs. In float64, integers and masks are equal. In float32, one weight that rounds the
other way changes the corrections of all after it: 99.9 % are equal, and the layer errors.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from limits import within
from support.matrices import DEAD, correlated

from opt_jax.compression import awq, gptq, grid, pruning, smoothquant, sparsegpt, statistics
from opt_jax.compression.grid import Grid
from opt_jax.model.packed import QuantizedMatrix

pytestmark = pytest.mark.slow
torch.set_num_threads(1)

K = 160  # columns
GRIDS = [
    Grid(8),
    Grid(4),
    Grid(3),
    Grid(3, symmetric=True),
    Grid(4, 32),
    Grid(3, 80, symmetric=True),
    Grid(4, 80, symmetric=True),
]
PRECISIONS = [pytest.param(np.float64, id="float64"), pytest.param(np.float32, id="float32")]


def layer(dtype, **sizes):
    """(weight, inputs). So many rows in float32 that a single flip is less than 0.1 %."""
    return correlated(dtype, **dict(rows=128 if dtype == np.float64 else 768, columns=K) | sizes)


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


def lowest_of_each(scores, n, m):
    """The n lowest of each m in a row; of equal ones those before."""
    order = torch.argsort(scores.reshape(len(scores), -1, m), dim=-1, stable=True)[..., :n]
    return torch.zeros(len(scores), scores.shape[1] // m, m, dtype=torch.bool).scatter_(2, order, True).flatten(1)


def at_most_threshold(scores, share):
    return scores <= scores.flatten().sort()[0][int(scores.numel() * share)]


def magnitude_of_paper(weight, sparsity):
    if isinstance(sparsity, tuple):
        return weight.masked_fill(lowest_of_each(weight.abs(), *sparsity), 0)
    return weight.masked_fill(at_most_threshold(weight.abs(), sparsity), 0)


def wanda_of_paper(weight, inputs, sparsity):
    """Equation 1: |W| * ||x||, compared in each row."""
    scores = weight.abs() * torch.from_numpy(inputs).reshape(-1, inputs.shape[-1]).norm(dim=0)
    if isinstance(sparsity, tuple):
        return weight.masked_fill(lowest_of_each(scores, *sparsity), 0)
    order = torch.argsort(scores, dim=1, stable=True)[:, : int(scores.shape[1] * sparsity)]
    return weight.scatter(1, order, 0)


def sparsegpt_of_paper(weight, hessian, sparsity, grid=None, damping=0.01, block_size=128):
    """Algorithm 1, and section 3.5, which rounds what stays: (weights, integers)."""
    columns = weight.shape[1]
    weight, hessian = weight.clone(), hessian.clone()
    scale, zero = min_max(weight, grid or Grid(4))
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    u = upper_cholesky_of_inverse(hessian, damping)
    integers = torch.zeros_like(weight)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        work, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        d = u.diagonal()[start:end]
        removed = torch.zeros_like(work, dtype=torch.bool)
        if not isinstance(sparsity, tuple):
            removed = at_most_threshold(work**2 / d**2, sparsity)
        for i in range(end - start):
            if isinstance(sparsity, tuple) and i % sparsity[1] == 0:
                part = slice(i, i + sparsity[1])
                removed[:, part] = lowest_of_each(work[:, part] ** 2 / d[part] ** 2, *sparsity)
            new = work[:, i].masked_fill(removed[:, i], 0)
            if grid:
                if grid.group_size and (start + i) % grid.group_size == 0:
                    scale, zero = min_max(weight[:, start + i : start + i + grid.group_size], grid)
                integers[:, start + i] = nearest(new, scale, zero, grid.bits)
                new = (integers[:, start + i] - zero) * scale
            errors[:, i] = (work[:, i] - new) / d[i]
            work[:, i + 1 :] -= torch.outer(errors[:, i], u[start + i, start + i + 1 : end])
            work[:, i] = new
        weight[:, start:end] = work
        weight[:, end:] -= errors @ u[start:end, end:]
    return weight, integers


def smoothing_of_paper(inputs, weights, alpha):
    """Equation 4."""
    absmax = torch.from_numpy(inputs).abs().amax((0, 1))
    return absmax**alpha / torch.cat(weights).abs().amax(0).clamp(min=1e-5) ** (1 - alpha)


def int8_of_paper(x):
    """(integers, scale), symmetric, one scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return torch.round(x / scale), scale


def rounded(weight, grid):
    """The weights after rounding to nearest."""
    size = grid.group_size or weight.shape[1]
    parts = [(part, *(x[:, None] for x in min_max(part, grid))) for part in weight.split(size, 1)]
    return torch.cat([(nearest(part, s, z, grid.bits) - z) * s for part, s, z in parts], 1)


def awq_scales_of_paper(weights, inputs, outputs, grid):
    """Equations 4 and 5: of 20 ratios, the one with the smallest squared error of the outputs."""
    mean = inputs.abs().flatten(0, 1).mean(0)
    best, least = None, torch.inf
    for ratio in range(20):
        scales = (mean ** (ratio / 20)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        new = outputs([rounded(weight * scales, grid) / scales for weight in weights], inputs)
        loss = (new - outputs(weights, inputs)).square().mean()
        if loss < least:
            best, least = scales, loss
    return best


def awq_limits_of_paper(weight, inputs, grid):
    """Section 5.1, "weight clipping": 10 limits from 1 to 0.55 of the largest weight, for each group."""
    size = grid.group_size or weight.shape[1]
    inputs = inputs[:: len(inputs) // 512]
    limits = []
    for part, x in zip(weight.split(size, 1), inputs.split(size, 1), strict=True):
        largest = part.abs().amax(1)
        best, least = largest.clone(), torch.full_like(largest, torch.inf)
        for step in range(10):
            limit = largest * (1 - step / 20)
            clipped = torch.minimum(torch.maximum(part, -limit[:, None]), limit[:, None])
            error = (x @ rounded(clipped, dataclasses.replace(grid, group_size=None)).T - x @ part.T).square().mean(0)
            best, least = torch.where(error < least, limit, best), torch.minimum(error, least)
        limits.append(best)
    return torch.stack(limits, 1)


def relative_error(weight, dense, hessian):
    change = weight - dense
    return float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())


# The comparisons ----------------------------------------------------------------------------------------


def compare(ours, theirs, dtype):
    """All are equal in float64, and 99.9 % in float32."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    within((ours != theirs).mean(), 0 if dtype == np.float64 else 1e-3)


def close(ours, theirs, tolerance):
    """The relative difference is at most the tolerance."""
    theirs = np.asarray(theirs)
    within(np.abs(ours - theirs), tolerance * np.abs(theirs))


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
    compare(ours.integers, theirs, np.float64)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_hessian(dtype):
    _, inputs = layer(dtype)

    def ours(inputs):
        hessian = jnp.zeros((K, K), inputs.dtype)
        for sequences, size in ((0, 3), (3, 1), (4, 4)):
            hessian = statistics.add_hessian(hessian, sequences, inputs[sequences : sequences + size])
        return hessian

    theirs = np.asarray(hessian_of(inputs))
    sizes = np.sqrt(theirs.diagonal())
    within(np.abs(run(dtype, ours, inputs) - theirs), 1e-5 * np.outer(sizes, sizes))


ACT_ORDER, STATIC = dict(act_order=True), dict(act_order=True, static_groups=True)
# The outermost weight of a symmetric group lies between two integers, and the last bit decides, unless errors have been
# subtracted from it since the group was fitted. So groups that are fitted to corrected weights are not symmetric here.
GPTQ = [
    (Grid(8), {}),
    (Grid(4), ACT_ORDER),
    (Grid(3), dict(block_size=40, damping=0.1)),
    (Grid(3, symmetric=True), ACT_ORDER),
    (Grid(4, 32), {}),
    (Grid(3, 32), ACT_ORDER),
    (Grid(4, 32), STATIC),
    (Grid(3, 80, symmetric=True), {}),
    (Grid(4, 32, symmetric=True), ACT_ORDER | dict(block_size=K)),
    (Grid(4, 80), ACT_ORDER | dict(block_size=40)),
]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("points, options", GPTQ, ids=str)
def test_gptq(points, options, dtype):
    weight, inputs = layer(dtype)
    hessian = hessian_of(inputs)
    integers, dense, groups = gptq_of_paper(torch.from_numpy(weight), hessian, points, **options)
    ours, error = run(dtype, lambda w, h: gptq.gptq(w, h, points, **options), weight, hessian)
    compare(ours.integers, integers, dtype)
    compare(ours.groups, groups, np.float64)
    close(error, relative_error(torch.from_numpy(weight), dense, hessian), 1e-3)


SPARSITIES = [0.5, (2, 4)]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("sparsity", [*SPARSITIES, 0.3], ids=str)
def test_magnitude_and_wanda(sparsity, dtype):
    weight, inputs = layer(dtype)
    theirs = magnitude_of_paper(torch.from_numpy(weight), sparsity)
    compare(run(dtype, lambda w: pruning.magnitude(w, sparsity), weight), theirs, np.float64)

    def ours(weight, inputs):
        squares = statistics.add_squares(jnp.zeros(K, inputs.dtype), 0, inputs[:3])
        squares = statistics.add_squares(squares, 3, inputs[3:])
        return pruning.wanda(weight, jnp.sqrt(squares), sparsity)

    theirs = wanda_of_paper(torch.from_numpy(weight), inputs, sparsity)
    compare(run(dtype, ours, weight, inputs), theirs, dtype)


SPARSEGPT = [
    (0.5, None, {}),
    (0.3, None, dict(block_size=40, damping=0.1)),
    ((2, 4), None, {}),
    (0.5, Grid(4), {}),
    ((2, 4), Grid(3, symmetric=True), {}),
    (0.5, Grid(4, 32), {}),
]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("sparsity, points, options", SPARSEGPT, ids=str)
def test_sparsegpt(sparsity, points, options, dtype):
    weight, inputs = layer(dtype)
    hessian = hessian_of(inputs)
    theirs, integers = sparsegpt_of_paper(torch.from_numpy(weight), hessian, sparsity, points, **options)
    ours, error = run(dtype, lambda w, h: sparsegpt.sparsegpt(w, h, sparsity, points, **options), weight, hessian)
    if points:
        assert isinstance(ours, QuantizedMatrix)
        compare(ours.integers, integers, dtype)
        ours = np.asarray(ours.dequantize())
    compare(ours == 0, theirs == 0, dtype)
    if dtype == np.float64 and not points:
        within(np.abs(ours - np.asarray(theirs)), 1e-9)
    close(error, relative_error(torch.from_numpy(weight), theirs, hessian), 1e-3)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_smoothquant(alpha, dtype):
    weight, inputs = layer(dtype)
    weights = np.array_split(weight, 3)

    def ours(inputs, *weights):
        absmax = statistics.add_absmax(jnp.zeros(K, inputs.dtype), inputs[:3])
        scales = smoothquant.smoothing_scales(statistics.add_absmax(absmax, inputs[3:]), weights, alpha)
        smooth = smoothquant.fold_into_inputs(jnp.concatenate(weights), scales)
        return (
            scales,
            smoothquant.quantize_weight(smooth),
            smoothquant.quantize_activations(inputs / scales[None, None]),
        )

    scales, matrix, (activations, steps) = run(dtype, ours, inputs, *weights)
    theirs = smoothing_of_paper(inputs, list(map(torch.from_numpy, weights)), alpha)
    live = np.delete(np.arange(K), DEAD)
    close(scales[live], theirs[live], 1e-5)
    assert (scales[list(DEAD)] == np.asarray(1e-5, dtype)).all()  # as `smooth.py` limits them
    scales = torch.from_numpy(scales.copy())
    integers, scale = int8_of_paper(torch.from_numpy(weight) * scales)
    compare(matrix.integers, integers + 128, dtype)
    close(matrix.scales[:, 0], scale[:, 0], 1e-5)
    integers, scale = int8_of_paper(torch.from_numpy(inputs) / scales)
    compare(activations, integers, dtype)
    close(steps, scale, 1e-5)


def attention_scores(weights, inputs, softmax):
    """A function of two matrices that is not linear in them, for jax and for torch."""
    q, k = (inputs @ weight.T / 30 for weight in weights)
    return softmax(q @ k.mT, -1) @ inputs


AWQ = [Grid(3), Grid(4, 32)]  # llm-awq has no symmetric grids; the outermost weights there lie between two integers


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("points", AWQ, ids=str)
def test_awq_scales(points, dtype):
    weight, inputs = layer(dtype)

    def ours(weight, inputs):
        batches = [inputs[:3], inputs[3:]]
        alone = awq.search_scales([weight], batches, awq.product, points)
        attention = jax.jit(lambda weights, inputs: attention_scores(weights, inputs, jax.nn.softmax))
        return alone, awq.search_scales(jnp.split(weight, 2), batches, attention, points)

    alone, together = run(dtype, ours, weight, inputs)
    weight, inputs = torch.from_numpy(weight), torch.from_numpy(inputs)
    theirs = awq_scales_of_paper([weight], inputs, lambda weights, inputs: inputs @ weights[0].T, points)
    close(alone, theirs, 1e-5)

    def attention(weights, inputs):
        return attention_scores(weights, inputs, torch.softmax)

    theirs = awq_scales_of_paper(list(weight.chunk(2)), inputs, attention, points)
    close(together, theirs, 1e-5)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("points", [*AWQ, Grid(3, 80, symmetric=True)], ids=str)
def test_awq_clip(points, dtype):
    weight, inputs = layer(dtype, rows=64, tokens=150)
    tokens = inputs.reshape(-1, K)
    scales = np.random.default_rng(1).uniform(0.5, 2, K).astype(dtype)
    limits = run(dtype, lambda w, x: awq.search_clip(w, x, points), weight, tokens)
    theirs = awq_limits_of_paper(torch.from_numpy(weight), torch.from_numpy(tokens), points)
    assert len(theirs.unique()) > 40 and (theirs.shape[1] == 1 or theirs.unique(dim=1).shape[1] > 1)
    compare(np.isclose(limits, theirs, rtol=1e-6), np.ones(theirs.shape, bool), dtype)
    ours = run(dtype, lambda w, s, x: awq.quantize(w, s, x, points), weight, scales, tokens)
    scaled = torch.from_numpy(weight * scales)
    limits = awq_limits_of_paper(scaled, torch.from_numpy(tokens / scales), points)
    limits = limits.repeat_interleave(K // limits.shape[1], 1)
    compare(ours.integers, rtn(torch.minimum(torch.maximum(scaled, -limits), limits), points), dtype)
