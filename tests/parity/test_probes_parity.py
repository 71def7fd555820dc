"""Linear probes: the optimum is PyTorch's in float64, parts and the control task are what the papers say."""

import sys
from typing import Any

import numpy as np
import pytest
import torch

from opt_jax.research.probes import control_labels, plot, train_probe


def examples(count=300, size=7, classes=3, seed=0):
    draw = np.random.RandomState(seed)
    x = draw.standard_normal((count, size)) * np.logspace(-1, 1, size) + 3  # far from mean 0 and variance 1
    scores = (x - 3) / np.logspace(-1, 1, size) @ draw.standard_normal((size, classes))
    return x.astype(np.float32), (scores + draw.standard_normal(scores.shape)).argmax(axis=1)


def torch_probe(x, y, l2):
    """The optimum of the same loss in float64: weights and bias for x as it is."""
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y)
    mean, spread = x.mean(0), x.std(0, correction=0)
    weights = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(weights.shape[1], dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = dict(
        max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    optimizer = torch.optim.LBFGS([weights, bias], **options)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy((x - mean) / spread @ weights + bias, y)
        value = value + l2 / 2 * (weights**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    folded = (weights / spread[:, None]).detach()
    return folded.numpy(), (bias - mean @ folded).detach().numpy()


@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_the_optimum_is_that_of_pytorch(l2):
    x, y = examples()
    probe = train_probe(x, y, l2=l2)
    weights, bias = torch_probe(x[~probe.held_out], y[~probe.held_out], l2)
    bias = bias - bias.mean()  # the same for all classes changes nothing
    np.testing.assert_allclose(probe.weights, weights, rtol=1e-3, atol=1e-3 * abs(weights).max())
    np.testing.assert_allclose(probe.bias - probe.bias.mean(), bias, rtol=1e-3, atol=1e-3 * abs(bias).max())
    assert probe.gradient_norm < 1e-5
    held_out = probe.held_out
    assert probe.accuracy == pytest.approx((probe.predict(x[held_out]) == y[held_out]).mean())
    assert probe.train_accuracy == pytest.approx((probe.predict(x[~held_out]) == y[~held_out]).mean())
    assert probe.accuracy != probe.train_accuracy


def test_labels_of_any_kind_and_the_most_frequent_one():
    x, y = examples(classes=2)
    names = np.array(["noun", "verb"])[y]
    probe = train_probe(x, names)
    assert probe.classes.tolist() == ["noun", "verb"] and set(probe.predict(x)) == {"noun", "verb"}
    assert probe.accuracy > 0.8 > probe.majority > 0.4
    values, counts = np.unique(names[~probe.held_out], return_counts=True)
    assert probe.majority == pytest.approx((names[probe.held_out] == values[counts.argmax()]).mean())
    assert probe.predict(x.reshape(30, 10, 7)).shape == (30, 10)


def test_the_same_arguments_give_the_same_bits_and_the_seed_other_parts():
    x, y = examples()
    one, two, other = train_probe(x, y), train_probe(x, y), train_probe(x, y, seed=1)
    assert one.weights.tobytes() == two.weights.tobytes() and (one.held_out == two.held_out).all()
    assert (one.held_out != other.held_out).any()
    assert one.held_out.sum() == 60 and train_probe(x, y, held_out=0.5).held_out.sum() == 150


def test_groups_are_held_out_together():
    x, y = examples()
    rows = np.arange(300) // 6
    held_out = train_probe(x, y, groups=rows).held_out.reshape(50, 6)
    assert (held_out.all(axis=1) | ~held_out.any(axis=1)).all() and held_out.sum() == 60


def test_control_labels_belong_to_types_and_have_the_frequencies_of_labels():
    types = np.random.RandomState(0).randint(0, 2000, 9000)
    labels = np.array([5, 5, 5, 7] * 2250)
    control = control_labels(types, labels)
    assert all(len(set(control[types == kind])) == 1 for kind in np.unique(types)[:100])
    assert 0.7 < (control[np.unique(types, return_index=True)[1]] == 5).mean() < 0.8
    assert (control == control_labels(types, labels)).all() and (control != control_labels(types, labels, 1)).any()


def test_a_probe_that_learns_types_by_heart_is_not_selective():
    """One-hot activations: any label of a type can be learned, so the control task is as easy as the real one."""
    types = np.arange(400) % 20
    by_heart = train_probe(np.eye(20)[types], types % 2, types=types)
    assert by_heart.accuracy == by_heart.control_accuracy == 1 and by_heart.selectivity == 0
    x = np.random.RandomState(0).standard_normal((400, 5))
    linear = train_probe(x, x[:, 0] > 0, types=types)
    assert linear.accuracy > 0.9 and linear.selectivity is not None and linear.selectivity > 0.2
    assert train_probe(x, x[:, 0] > 0).selectivity is None


def test_constant_activations_are_no_division_by_zero():
    x, y = examples()
    x[:, 2] = 4
    probe = train_probe(x, y)
    assert np.isfinite(probe.weights).all() and (probe.weights[2] == 0).all()


@pytest.mark.parametrize(
    ("words", "arguments"),
    {
        "x must be": dict(x=np.zeros((4, 3, 2))),
        "types must be": dict(types=np.arange(3)),
        "groups must be": dict(groups=np.arange(3)),
        "1 classes": dict(labels=np.zeros(300)),
        "leaves a part empty": dict(groups=np.zeros(300)),
        "labels are fractions": dict(labels=np.linspace(0, 1, 300)),
        "not finite": dict(x=np.full((300, 7), np.nan)),
    }.items(),
)
def test_what_is_refused(words, arguments):
    x, y = examples()
    with pytest.raises(ValueError, match=words):
        train_probe(**dict(x=x, labels=y) | arguments)


def test_plot(monkeypatch):
    import matplotlib.pyplot as plt

    x, y = examples()
    probes = {f"blocks.{i}.hook_resid_post": train_probe(x, y, types=y, l2=10.0**-i) for i in range(3)}
    axes = plot(probes)
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [3, 3, 3]
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), [probe.accuracy for probe in probes.values()])
    assert plot(probes, axes=axes) is axes
    plt.close(axes.figure)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot(probes)
