"""Neuron statistics equal counts with NumPy over all activations of each text alone."""

import numpy as np
import pytest
from flax import nnx
from reference import our_model

from opt_jax import named_parameters
from opt_jax.research.neurons import neuron_statistics, plot


@pytest.fixture(scope="module")
def model():
    """Neuron 3 of layer 1 is dead, neuron 5 always fires."""
    model = nnx.clone(our_model("opt-125m"))
    param = named_parameters(model)["model.decoder.layers.1.fc1.bias"]
    param.set_value(param.get_value().at[3].set(-1e3).at[5].set(1e3))
    return model


def corpus(batches=4):
    draw = np.random.RandomState(0)
    ids = draw.randint(4, 99, (batches, 2, 6)).astype(np.int32)
    masks = np.ones(ids.shape, bool)
    masks[0, 1, :3] = masks[1, 0, 4:] = masks[2, 1, 5:] = False  # the first on the left
    return list(zip(ids, masks, strict=True))


def every_text(model, batches, layer):
    """(ids, activations [T, F]) of each text without pads."""
    name = f"blocks.{layer}.mlp.hook_post"
    for ids, mask in batches:
        for row, real in zip(ids, mask, strict=True):
            yield row[real], np.asarray(model.run_with_cache(row[real][None], names=name)[1][name][0])


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_counts_and_top_texts(model, threshold):
    calls = []
    stats = neuron_statistics(
        model,
        corpus(),
        layers=[1, 2],
        top=3,
        positions=4,
        threshold=threshold,
        progress=lambda *done: calls.append(done),
    )
    assert stats.layers == (1, 2) and stats.tokens == 42 and calls[-1] == (4, 42)
    for layer in (1, 2):
        texts = list(every_text(model, corpus(), layer))
        acts = np.concatenate([a for _, a in texts])
        border = threshold or 0
        np.testing.assert_array_equal(stats.fired[layer - 1], (acts > border).sum(axis=0))
        np.testing.assert_allclose(stats.rate[layer - 1], (acts > border).mean(axis=0))
        for place in range(4):
            at = np.array([a[place] for _, a in texts if len(a) > place])
            assert stats.tokens_at[place] == len(at) and (place == 0 or len(at) >= 7)
            np.testing.assert_array_equal(stats.fired_at[layer - 1, :, place], (at > border).sum(axis=0))
        for neuron in range(40):
            peaks = sorted(((a[:, neuron].max(), row) for row, (_, a) in enumerate(texts)), key=lambda peak: -peak[0])
            peaks = [peak for peak in peaks if peak[0] > border][:3]
            rows = stats.rows[layer - 1, neuron]
            assert rows.tolist() == [row for _, row in peaks] + [-1] * (3 - len(peaks))
            np.testing.assert_allclose(stats.top[layer - 1, neuron][: len(peaks)], [v for v, _ in peaks], rtol=1e-5)
            for k, row in enumerate(rows):
                ids, a = texts[row]
                place = a[:, neuron].argmax() if row >= 0 else -1
                assert stats.positions[layer - 1, neuron, k] == place
                assert stats.token_ids[layer - 1, neuron, k] == (ids[place] if row >= 0 else -1)


def test_a_dead_neuron_and_one_that_always_fires(model):
    stats = neuron_statistics(model, corpus(), top=2)
    assert stats.dead[1, 3] and stats.rate[1, 3] == 0 and not stats.dead[1, 5] and stats.rate[1, 5] == 1
    assert stats.rows[1, 3].tolist() == [-1, -1] and (stats.top[1, 3] == -np.inf).all()
    assert stats.fired.shape == (3, 40) and stats.fired_at.shape == (3, 40, 0)


def test_batches_of_other_sizes_give_the_same(model):
    ids, masks = (np.concatenate(part) for part in zip(*corpus(), strict=True))
    one, other = neuron_statistics(model, corpus(), positions=9), neuron_statistics(model, [(ids, masks)], positions=9)
    for name in ("fired", "rows", "positions", "token_ids", "fired_at", "tokens_at"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert np.isnan(one.rate_at[0, 0, 6:]).all() and (one.rate_at[1, 5, :6] == 1).all()


def test_what_is_refused(model):
    gelu = our_model("galactica")
    with pytest.raises(ValueError, match="gelu has no border"):
        neuron_statistics(gelu, corpus())
    assert 0 < neuron_statistics(gelu, corpus(), threshold=0.1).rate.mean() < 1
    for words, arguments in {
        "layers=": dict(layers=[3]),
        "top=0": dict(top=0),
        "no tokens": dict(batches=[]),
    }.items():
        with pytest.raises(ValueError, match=words):
            neuron_statistics(model, **dict(batches=corpus()) | arguments)


def test_plot(model):
    import matplotlib.pyplot as plt

    axes = plot(neuron_statistics(model, corpus()))
    assert [round(bar.get_height() * 40) for bar in axes.patches][1] >= 1
    plt.close(axes.figure)
