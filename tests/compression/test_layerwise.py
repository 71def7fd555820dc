"""Layer by layer is the same as all layers at once: inputs of matrices, in memory, on disk and on a mesh."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS, SMALL, our_model

from opt_jax import named_parameters
from opt_jax.compression import layerwise
from opt_jax.compression.layerwise import MATRICES, NothingCollectedError, Source, Stream, input_points
from opt_jax.parallel.mesh import make_mesh

IDS = np.random.RandomState(0).randint(4, 99, (6, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: the name of a configuration -> (the model, its directory)."""
    models = {}

    def save(name):
        if name not in models:
            models[name] = our_model(name), tmp_path_factory.mktemp("layerwise") / name
            models[name][0].save_pretrained(models[name][1])
        return models[name]

    return save


def captured(model):
    """For each layer: matrix -> its inputs, from a call of the complete model; its outputs show that they are these."""
    before = model.config.do_layer_norm_before
    points = {
        "self_attn.q_proj": ("ln1.hook_normalized" if before else "hook_resid_pre", "attn.hook_q"),
        "self_attn.out_proj": ("attn.hook_z", "hook_attn_out"),
        "fc1": ("ln2.hook_normalized" if before else "ln1.hook_normalized", "mlp.hook_pre"),
        "fc2": ("mlp.hook_post", "hook_mlp_out"),
    }
    wanted = {point for pair in points.values() for point in pair} | {"hook_resid_post"}
    _, values = model.run_with_cache(IDS, names=lambda name: name.partition(".")[2].partition(".")[2] in wanted)
    layers = []

    def get(layer, point):
        return np.asarray(values[f"blocks.{layer}.{point}"]).reshape(*IDS.shape, -1)

    for i, modules in enumerate(model.model.decoder.layers):
        layers.append({matrix: get(i, inputs) for matrix, (inputs, _) in points.items()})
        for matrix, (_, outputs) in points.items():
            module = operator.attrgetter(matrix)(modules)
            product = layers[-1][matrix] @ np.asarray(module.kernel.get_value())
            product += 0 if module.bias is None else np.asarray(module.bias.get_value())
            np.testing.assert_allclose(product, get(i, outputs), rtol=1e-4, atol=1e-5)
    return layers, get(len(layers) - 1, "hook_resid_post")


@pytest.mark.parametrize("name", SMALL)
def test_inputs_are_those_of_the_complete_model(saved, tmp_path, name, monkeypatch):
    monkeypatch.setattr(layerwise, "_TOKENS", 2 * IDS.shape[1])  # batches of two
    model, directory = saved(name)
    source = Source.open(directory, None, None, True)
    points = input_points(source.config)
    assert [*points] == [*MATRICES] and points["self_attn.k_proj"] == points["self_attn.v_proj"]
    stream = Stream(source, IDS, tmp_path / "stream")
    layers, last = captured(model)
    for i, expected in enumerate(layers):
        layer = source.module(i)
        batches = [*stream.inputs(layer, sorted(set(points.values())))]
        assert len(batches) == 3
        for matrix, value in expected.items():
            inputs = np.concatenate([batch[points[matrix]] for batch in batches])
            np.testing.assert_allclose(inputs, value, rtol=1e-5, atol=1e-5)
        stream.advance(layer)
    if not model.config.do_layer_norm_before:
        last = model.model.decoder.layers[2].final_layer_norm(last, "ln2")
    np.testing.assert_allclose(stream.values, last, rtol=1e-5, atol=1e-5)


def test_changed_parameters_are_used(saved, tmp_path):
    model, directory = saved("opt-125m")
    source = Source.open(directory, None, None, True)
    kernel = source.weight(1, "fc2.kernel")
    assert (kernel == named_parameters(model)["model.decoder.layers.1.fc2.kernel"].get_value()).all()
    stream = Stream(source, IDS, tmp_path / "stream")
    before = stream.values.copy()
    stream.advance(source.module(1))
    usual, stream.values = stream.values, before
    stream.advance(source.module(1, {"fc2.kernel": 2 * kernel}))
    bias = source.weight(1, "fc2.bias")
    residual = [*Stream(source, IDS, tmp_path / "b").inputs(source.module(1), ["hook_resid_mid"])][0]["hook_resid_mid"]
    np.testing.assert_allclose(stream.values - residual - bias, 2 * (usual - residual - bias), rtol=1e-3, atol=1e-5)


def test_a_file_is_the_same_as_memory(saved, tmp_path, monkeypatch):
    _, directory = saved("opt-350m")
    values = []
    for limit in (layerwise.IN_MEMORY, 100):
        monkeypatch.setattr(layerwise, "IN_MEMORY", limit)
        source = Source.open(directory, jnp.bfloat16, None, True)
        stream = Stream(source, IDS, tmp_path / f"stream{limit}")
        stream.advance(source.module(0))
        values.append(stream.values)
    assert values[0].dtype == jnp.bfloat16 and isinstance(values[1], np.memmap) and values[1].dtype == values[0].dtype
    assert values[0].tobytes() == values[1].tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stream100"]


def test_a_mesh(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    our_model("untied", vocab_size=100).save_pretrained(tmp_path / "model")
    streams = []
    for place in (None, mesh):
        source = Source.open(tmp_path / "model", None, place, True)
        stream = Stream(source, IDS[:4], tmp_path / "stream")
        points = sorted(set(input_points(source.config).values()))
        batches = [*stream.inputs(source.module(0), points)]
        stream.advance(source.module(0))
        streams.append((stream.values, batches[0]))
    sharding = source.module(0).fc1.kernel.get_value().sharding
    assert sharding.mesh == mesh and not sharding.is_fully_replicated
    np.testing.assert_allclose(streams[1][0], streams[0][0], rtol=1e-5, atol=1e-5)
    for point, value in streams[0][1].items():
        np.testing.assert_allclose(streams[1][1][point], value, rtol=1e-5, atol=1e-5)


def test_one_program_for_all_layers(saved, tmp_path):
    _, directory = saved("galactica")
    source = Source.open(directory, None, None, True)
    stream = Stream(source, IDS, tmp_path / "stream")
    stream.advance(source.module(0))
    run: Any = layerwise.run_layer
    before = run._cache_size()
    for i in (1, 2):
        stream.advance(source.module(i))
    assert run._cache_size() == before


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m"])
def test_statistics_of_nothing_are_refused(name):
    points = input_points(CONFIGS[name])
    good = dict.fromkeys(points.values(), jnp.ones(3))
    layerwise.check_collected(1, points, good)
    for point in set(points.values()):
        matrix = next(matrix for matrix in points if points[matrix] == point)
        for value, words in ((None, f"no inputs were seen at {point}"), (jnp.inf, "not finite"), (0.0, "are zero")):
            bad = {k: v for k, v in good.items() if k != point}
            if value is not None:
                bad[point] = good[point] * value
            with pytest.raises(NothingCollectedError, match=f"layer 1, {matrix}: .*{words}"):
                layerwise.check_collected(1, points, bad)
