"""A grid of patches equals one patched run for each cell."""

from typing import Any

import jax
import numpy as np
import pytest
from reference import batch, our_model

from opt_jax import Add, Replace, Scale, stack_layers
from opt_jax.research import patching
from opt_jax.research.patching import Patching, causal_trace, patch, plot


def metric(logits):
    return logits[:, -1, 7].mean() - logits[:, -1, 8].mean()


def runs(name="opt-125m", padding="right"):
    clean = batch(name, padding, rows=2, length=6)
    corrupted = clean["input_ids"].copy()
    corrupted[:, 2] = [50, 51]
    return clean["input_ids"], corrupted, clean["attention_mask"]


@pytest.mark.parametrize("name, point", [("opt-125m", "hook_resid_pre"), ("opt-350m", "hook_mlp_out")])
def test_each_cell_is_a_patched_run(name, point):
    """The first model has separate layers, the second one stacked ones."""
    model = our_model(name) if name == "opt-125m" else stack_layers(our_model(name))
    clean, corrupted, mask = runs(name)
    result = patch(model, clean, corrupted, metric, mask, point=point, batch_size=4)
    _, acts = model.run_with_cache(clean, mask, names=f"blocks.*.{point}")
    assert result.patched.shape == (3, 6) and np.ptp(result.patched) > 0.01
    np.testing.assert_allclose(result.clean, metric(model(clean, mask).logits), rtol=1e-5)
    np.testing.assert_allclose(result.corrupted, metric(model(corrupted, mask).logits), rtol=1e-5)
    run = jax.jit(lambda edit: model.forward(corrupted, mask, hooks={f"blocks.*.{point}": edit}))
    for layer, position in ((0, 2), (1, 5), (2, 3)):
        edit = Replace(acts[f"blocks.{layer}.{point}"], positions=position, layers=layer)
        expected = metric(run(edit).logits)
        np.testing.assert_allclose(result.patched[layer, position], expected, rtol=1e-4, atol=1e-5)
    if point == "hook_resid_pre":
        np.testing.assert_allclose(result.restored[0, 2], 1, rtol=1e-3)  # the only difference between the runs
        np.testing.assert_allclose(result.restored[:, :2], 0, atol=1e-3)


def test_a_grid_of_chosen_layers_positions_and_heads():
    model = stack_layers(our_model("opt-125m"))
    clean, corrupted, mask = runs()
    grid: dict[str, Any] = dict(point="attn.hook_z", layers=[2, -3], positions=[4, -1, 2], heads=[1, 2])
    result = patch(model, clean, corrupted, metric, mask, **grid)
    assert result.patched.shape == (2, 3, 2) and (result.layers, result.positions) == ((2, 0), (4, -1, 2))
    _, acts = model.run_with_cache(clean, mask, names="blocks.*.attn.hook_z")
    run = jax.jit(lambda edit: model.forward(corrupted, mask, hooks={"blocks.*.attn.hook_z": edit}))
    for index, layer, position, head in (((0, 0, 1), 2, 4, 2), ((1, 1, 0), 0, -1, 1), ((0, 1, 1), 2, -1, 2)):
        edit = Replace(acts[f"blocks.{layer}.attn.hook_z"], positions=position, heads=head, layers=layer)
        expected = metric(run(edit).logits)
        np.testing.assert_allclose(result.patched[index], expected, rtol=1e-4, atol=1e-5)
    del grid["heads"]
    all_heads = patch(model, clean, corrupted, metric, mask, **grid)
    assert all_heads.patched.shape == (2, 3) and np.abs(all_heads.patched - result.patched.sum(2)).max() > 1e-3


def test_one_program_and_a_metric_with_axes(compiled):
    model = our_model("opt-125m", num_hidden_layers=2)
    clean, corrupted, _ = runs()
    each_row = lambda logits: logits[:, -1, 7]  # noqa: E731
    result = patch(model, clean, corrupted, each_row, layers=[0], positions=[1, 2, 3], batch_size=2)
    assert result.patched.shape == (1, 3, 2) and result.clean.shape == (2,)
    del compiled[:]
    again = patch(model, clean, corrupted, each_row, layers=[1], positions=[4, 5, 0], batch_size=2)
    assert compiled == []
    assert np.abs(again.patched - result.patched).max() > 1e-4


def test_batch_size_bounds_memory(monkeypatch):
    model, (clean, corrupted, mask) = stack_layers(our_model("opt-125m")), runs()
    compiled, plain = [], patching._patched

    def look(*args):
        memory: Any = plain.lower(*args).compile().memory_analysis()
        compiled.append(memory.temp_size_in_bytes)
        return plain(*args)

    monkeypatch.setattr(patching, "_patched", look)
    for size in (2, 18):
        patch(model, clean, corrupted, metric, mask, batch_size=size)
    assert 4 * compiled[0] < compiled[1]


def test_a_window_replaces_its_layers():
    model = stack_layers(our_model("opt-125m"))
    clean, corrupted, mask = runs()
    result = patch(model, clean, corrupted, metric, mask, point="hook_mlp_out", window=2)
    _, acts = model.run_with_cache(clean, mask, names="blocks.*.hook_mlp_out")
    for layer, layers in ((0, [0]), (2, [1, 2])):
        names = [f"blocks.{i}.hook_mlp_out" for i in layers]
        edits = {name: Replace(acts[name], positions=2) for name in names}
        expected = metric(model.run_with_hooks(corrupted, mask, hooks=edits).logits)
        np.testing.assert_allclose(result.patched[layer, 2], expected, rtol=1e-4, atol=1e-5)


def test_hooks_act_in_corrupted_runs_alone():
    model = our_model("opt-125m", num_hidden_layers=2)
    clean, corrupted, mask = runs()
    vector = np.linspace(-1, 1, model.config.hidden_size, dtype=np.float32)
    edits = {"blocks.*.hook_resid_pre": Add(vector, positions=[1])}  # at the patched point too, which then wins
    plain = patch(model, clean, corrupted, metric, mask)
    result = patch(model, clean, corrupted, metric, mask, hooks=edits)
    assert result.clean == plain.clean
    np.testing.assert_allclose(
        result.corrupted, metric(model.run_with_hooks(corrupted, mask, hooks=edits).logits), rtol=1e-5
    )
    assert abs(result.corrupted - plain.corrupted) > 1e-3 and np.abs(result.patched - plain.patched).max() > 1e-3
    _, acts = model.run_with_cache(clean, mask, names="blocks.*.hook_resid_pre")
    cell = Replace(acts["blocks.1.hook_resid_pre"], positions=1, layers=1)
    both = {"blocks.*.hook_resid_pre": (*edits.values(), cell)}
    expected = metric(model.run_with_hooks(corrupted, mask, hooks=both).logits)
    np.testing.assert_allclose(result.patched[1, 1], expected, rtol=1e-4, atol=1e-5)


def test_causal_trace():
    model = stack_layers(our_model("opt-125m", num_hidden_layers=2))
    ids = runs(padding="none")[0][:1]
    result = causal_trace(model, ids, [1, 2], metric, samples=3, batch_size=5)
    assert result.patched.shape == (2, 6) and abs(result.clean - result.corrupted) > 0.01
    np.testing.assert_allclose(result.clean, metric(model(ids).logits), rtol=1e-5)
    np.testing.assert_allclose(result.restored[1, -1], 1, rtol=1e-3)  # the last state of the token whose logits count
    np.testing.assert_allclose(result.restored[:, 0], 0, atol=1e-3)  # no noise before the subject
    for change in (dict(noise=1.0), dict(seed=1), dict(subject=[1, 3]), dict(point="hook_mlp_out")):
        options: dict[str, Any] = dict(subject=[1, 2], metric=metric, samples=3, batch_size=5) | change
        assert np.abs(causal_trace(model, ids, **options).patched - result.patched).max() > 1e-3, change


def test_causal_trace_with_a_mask_and_hooks():
    model = our_model("opt-125m", num_hidden_layers=2)
    ids = runs(padding="none")[0][:1]
    padded, mask = np.pad(ids, ((0, 0), (2, 0)), constant_values=1), np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
    same: dict[str, Any] = dict(metric=metric, samples=1, positions=[2, 5])
    result = causal_trace(model, ids, [1, 2], **same)
    edits = {"hook_embed": Scale(2.0)}
    doubled = causal_trace(model, ids, [1, 2], **same, hooks=edits)
    without_noise = metric(model.run_with_hooks(ids, hooks=edits).logits)
    assert abs(doubled.corrupted - without_noise) > 0.01
    masked = causal_trace(model, padded, [1, 2], **same, attention_mask=mask)
    np.testing.assert_allclose(masked.clean, result.clean, rtol=1e-5)
    assert np.abs(masked.corrupted - masked.clean) > 0.01


def test_mistakes_are_named():
    model = our_model("opt-125m")
    clean, corrupted, _ = runs()
    mistakes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("'hook_embed' must be the name of a point in layers", dict(point="hook_embed")),
        ("'blocks.0.hook_resid_pre' must be .* without its layer", dict(point="blocks.0.hook_resid_pre")),
        ("layers must be numbers from -3 to 2", dict(layers=[3])),
        ("positions must be numbers from -6 to 5", dict(positions=[])),
        ("hook_resid_pre has no heads", dict(heads=[0])),
        ("window=0", dict(window=0)),
        ("batch_size=0", dict(batch_size=0)),
    )
    for words, options in mistakes:
        with pytest.raises(ValueError, match=words):
            patch(model, clean, corrupted, metric, **options)
    with pytest.raises(ValueError, match=r"clean run is \(2, 6\) and the corrupted one \(2, 5\)"):
        patch(model, clean, corrupted[:, :5], metric)
    with pytest.raises(ValueError, match="clean must be an array, not a dict: pass its input_ids"):
        patch(model, dict(input_ids=clean), corrupted, metric)
    with pytest.raises(ValueError, match="patching compares logits, which an OPTModel lacks"):
        patch(model.model, clean, corrupted, metric)
    with pytest.raises(ValueError, match=r"one text, ids \[1, T\], not \(2, 6\)"):
        causal_trace(model, clean, [1], metric)
    with pytest.raises(ValueError, match="subject must be numbers from -6 to 5"):
        causal_trace(model, clean[:1], [6], metric)


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    patched = np.random.default_rng(0).standard_normal((2, 6, 3))
    axes = plot(Patching(np.ones(()), np.zeros(()), patched, (1, 2), tuple(range(6))), labels=list("abcdef"))
    np.testing.assert_allclose(axes.images[0].get_array(), patched.mean(axis=2), rtol=1e-6)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == list("abcdef")
    pyplot.close("all")
