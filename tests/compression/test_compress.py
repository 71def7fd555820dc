"""`compress`: what each layer is calibrated with, what is written, what is refused; killed and resumed."""

import json
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, exhaustive
from reference import SMALL, our_model

from opt_jax import OPTForCausalLM, OPTTokenizer, named_parameters
from opt_jax.checkpoints.orbax import open_stored
from opt_jax.compression import _compress, compress, layers, layerwise
from opt_jax.compression.awq import product
from opt_jax.compression.calibration import read_calibration
from opt_jax.compression.gptq import gptq
from opt_jax.compression.grid import Grid, round_to_nearest
from opt_jax.compression.layers import collect, float_parameters
from opt_jax.compression.layerwise import MATRICES, NothingCollectedError, Source, Stream, input_points
from opt_jax.compression.pruning import magnitude, wanda
from opt_jax.compression.recipe import OPTIONS, Recipe, make_recipe
from opt_jax.compression.sparsegpt import sparsegpt
from opt_jax.compression.statistics import add_hessian, layer_error
from opt_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow
IDS = np.random.RandomState(0).randint(4, 99, (12, 32)).astype(np.int32)
FORMS: dict[str, dict[str, Any]] = {
    "rtn": dict(bits=4, group_size=8),
    "gptq": dict(calibration=IDS, bits=3, group_size=8, act_order=True),
    "awq": dict(calibration=IDS, bits=4, group_size=8),
    "smoothquant": dict(calibration=IDS),
    "magnitude": dict(sparsity=0.5),
    "wanda": dict(calibration=IDS, sparsity="2:4"),
    "sparsegpt": dict(calibration=IDS, sparsity=0.5, bits=4),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: the name of a configuration -> the directory of a model in bfloat16."""
    directories = {}

    def save(name):
        if name not in directories:
            directories[name] = tmp_path_factory.mktemp("compress") / name
            our_model(name, param_dtype=jnp.bfloat16).save_pretrained(directories[name])
        return directories[name]

    return save


def content(directory):
    """All that a call writes, but for the names of Orbax's files."""
    arrays = {path: array.load().tobytes() for path, array in open_stored(directory / "params").items()}
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    return arrays | files


def local_arrays(directory, layer):
    """The parameters of a layer in the directory, by their path inside of it."""
    prefix = f"model.decoder.layers.{layer}."
    stored = open_stored(directory / "params")
    return {path.removeprefix(prefix): array.load() for path, array in stored.items() if path.startswith(prefix)}


def float_model(directory, original, recipe, depth=None):
    """The model with the first `depth` layers as in the directory, and the others as they were."""
    source, model = Source.open(original, None, None, True), OPTForCausalLM.from_pretrained(original)
    parameters = named_parameters(model)
    for layer in range(model.config.num_hidden_layers if depth is None else depth):
        for path, value in float_parameters(recipe, source, local_arrays(directory, layer)).items():
            parameters[f"model.decoder.layers.{layer}.{path}"].set_value(jnp.asarray(value, jnp.float32))
    return model


# What it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["gptq", "sparsegpt", "wanda"])
@pytest.mark.combinations
def test_a_layer_is_calibrated_behind_compressed_ones(saved, tmp_path, name, method):
    """Each layer is what the method gives for inputs that a complete model with the compressed layers before has."""
    options: dict[str, Any] = dict(bits=4) if method == "gptq" else dict(sparsity=0.5)
    compress(saved(name), tmp_path / "out", method, calibration=IDS, **options)
    recipe, source = make_recipe(method, options | dict(calibration=IDS)), Source.open(saved(name), None, None, True)
    for layer in range(3):
        model = float_model(tmp_path / "out", saved(name), recipe, layer)
        points = input_points(model.config)
        asked = [f"blocks.{layer}.{point}" for point in points.values()]
        _, kept = model.run_with_cache(IDS, names=asked)
        stored = float_parameters(recipe, source, local_arrays(tmp_path / "out", layer))
        for matrix, point in points.items():
            inputs = jnp.asarray(kept[f"blocks.{layer}.{point}"]).reshape(*IDS.shape, -1)
            hessian = add_hessian(jnp.zeros((inputs.shape[-1],) * 2), 0, inputs)
            path = f"model.decoder.layers.{layer}.{matrix}.kernel"
            weight: Any = named_parameters(model)[path].get_value().T
            if method == "gptq":
                expected: Any = gptq(weight, hessian, Grid(4))[0].dequantize()
            elif method == "wanda":
                expected = wanda(weight, jnp.sqrt(jnp.diagonal(hessian)), 0.5)
            else:
                expected = sparsegpt(weight, hessian, 0.5)[0]
            equal = np.isclose(stored[f"{matrix}.kernel"].T.astype(np.float32), expected, rtol=2**-7, atol=1e-6)
            assert equal.mean() > 0.995, (layer, matrix, equal.mean())  # rounding of sums may flip one of them


def test_true_sequential_looks_behind_matrices_of_the_same_layer(saved, tmp_path):
    name, recipe = "opt-125m", Recipe("gptq", bits=2)
    for i, sequential in enumerate((False, True)):
        compress(saved(name), tmp_path / f"{i}", "gptq", calibration=IDS, bits=2, true_sequential=sequential)
    source = Source.open(saved(name), None, None, True)
    changed = float_parameters(recipe, source, local_arrays(tmp_path / "1", 0))
    stream = Stream(source, IDS, tmp_path / "stream")
    for matrix, before in (("self_attn.out_proj", MATRICES[:3]), ("fc2", MATRICES[:5])):
        module = source.module(0, {f"{m}.kernel": changed[f"{m}.kernel"] for m in before})
        point = input_points(source.config)[matrix]
        weight = jnp.asarray(source.weight(0, f"{matrix}.kernel").T)
        for i in range(2):
            hessian = collect(stream, module if i else source.module(0), 0, {matrix: point})[point].hessian
            expected = gptq(weight, hessian, Grid(2))[0].dequantize()
            stored = float_parameters(recipe, source, local_arrays(tmp_path / f"{i}", 0))[f"{matrix}.kernel"].T
            assert np.isclose(stored, expected, atol=1e-6).mean() > 0.995


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["rtn", "magnitude"])
def test_methods_without_samples(saved, tmp_path, name, method):
    report = compress(saved(name), tmp_path / "out", method, **FORMS[method])
    source = Source.open(saved(name), None, None, True)
    for layer, errors in enumerate(report["errors"]):
        stored = local_arrays(tmp_path / "out", layer)
        floats = float_parameters(Recipe(method, bits=4), source, stored)
        for matrix in MATRICES:
            weight = jnp.asarray(source.weight(layer, f"{matrix}.kernel").T)
            expected = (
                magnitude(weight, 0.5) if method == "magnitude" else round_to_nearest(weight, Grid(4, 8)).dequantize()
            )
            assert (floats[f"{matrix}.kernel"].T.astype(np.float32) == expected).all()
            change = float(jnp.square(weight - expected).sum() / jnp.square(weight).sum())
            assert errors[matrix] == pytest.approx(change, rel=1e-5) and change > 1e-4
    assert report["error_of"] == "weights" and report["calibration"] is None


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_scales_move_without_changing_the_function(saved, tmp_path, method):
    """With 8 bits, the model computes nearly what it did, though its LayerNorms changed."""
    options: dict[str, Any] = dict(bits=8) if method == "awq" else {}
    compress(saved("opt-125m"), tmp_path / "out", method, calibration=IDS, **options)
    before = OPTForCausalLM.from_pretrained(saved("opt-125m"))
    after = float_model(tmp_path / "out", saved("opt-125m"), Recipe(method, bits=8))
    np.testing.assert_allclose(after(IDS).logits, before(IDS).logits, atol=0.15)
    changed = {path: value for path, value in local_arrays(tmp_path / "out", 1).items() if "kernel" not in path}
    unlike = {
        path.removeprefix("model.decoder.layers.1.")
        for path, param in named_parameters(before).items()
        if (local := path.removeprefix("model.decoder.layers.1.")) in changed
        and not np.array_equal(np.asarray(param.get_value()), changed[local].astype(np.float32))
    }
    norms = {f"{norm}.{name}" for norm in ("self_attn_layer_norm", "final_layer_norm") for name in ("scale", "bias")}
    assert unlike == norms | ({"self_attn.v_proj.bias", "fc1.bias"} if method == "awq" else set())


def test_awq_compares_the_outputs_of_attention(saved, tmp_path):
    source = Source.open(saved("opt-125m"), None, None, True)
    stream, module = Stream(source, IDS, tmp_path / "stream"), source.module(0)
    kernels = [jnp.asarray(source.weight(0, f"{matrix}.kernel").T) for matrix in MATRICES]
    model = OPTForCausalLM.from_pretrained(saved("opt-125m"))
    _, kept = model.run_with_cache(
        IDS, names=["blocks.0.hook_attn_out", "blocks.0.ln1.hook_normalized", "*0.attn.hook_q"]
    )
    inputs = kept["blocks.0.ln1.hook_normalized"]
    out = layers._attention_outputs(module.self_attn, kernels[:3], inputs)
    np.testing.assert_allclose(out, kept["blocks.0.hook_attn_out"], rtol=1e-4, atol=1e-5)
    assert not np.allclose(out, layers._attention_outputs(module.self_attn, [2 * kernels[0], *kernels[1:3]], inputs))
    tokens = layers._tokens(stream, module, ["ln1.hook_normalized"])["ln1.hook_normalized"]
    np.testing.assert_allclose(tokens, np.asarray(inputs).reshape(-1, 24), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product(kernels[:1], tokens), tokens @ kernels[0].T, rtol=1e-4, atol=1e-5)


def test_evenly_spaced_tokens(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "_CLIP_TOKENS", 40)
    source = Source.open(saved("opt-125m"), None, None, True)
    stream, module = Stream(source, IDS, tmp_path / "stream"), source.module(0)
    every = np.concatenate([x["hook_resid_pre"] for x in stream.inputs(module, ["hook_resid_pre"])]).reshape(-1, 24)
    assert (layers._tokens(stream, module, ["hook_resid_pre"])["hook_resid_pre"] == every[:: 12 * 32 // 40]).all()


@pytest.mark.parametrize("layer", [0, 4])
def test_errors_on_real_text(tmp_path, layer):
    """On the embedded model GPTQ is better than rounding, and SparseGPT better than removing the smallest."""
    source = Source.open("tiny", None, None, True)
    text = [str(REPOSITORY / "opt_jax" / "cli.py")]
    ids = read_calibration(text, OPTTokenizer.from_pretrained("tiny"), samples=8, window=256).ids
    stream = Stream(source, ids, tmp_path / "stream")
    for i in range(layer):
        stream.advance(source.module(i))
    points = input_points(source.config)
    collected = collect(stream, source.module(layer), layer, points)
    for matrix, point in points.items():
        weight, hessian = jnp.asarray(source.weight(layer, f"{matrix}.kernel").T), collected[point].hessian
        for bits in (4, 3):
            nearest = layer_error(weight, round_to_nearest(weight, Grid(bits)), hessian)
            assert 0 < gptq(weight, hessian, Grid(bits))[1] < 0.9 * nearest
        assert 0 < sparsegpt(weight, hessian, 0.5)[1] < 0.9 * layer_error(weight, magnitude(weight, 0.5), hessian)


# What is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FORMS)
def test_everything_else_stays_as_it_was(saved, tmp_path, method):
    name = "opt-125m" if method in ("awq", "smoothquant") else "untied"
    calls = []
    options: dict[str, Any] = FORMS[method] | dict(progress=lambda *call: calls.append(call))
    report = compress(saved(name), tmp_path / "out", method, **options)
    before, after = (open_stored(place / "params") for place in (saved(name), tmp_path / "out"))
    for path, array in before.items():
        is_kernel = ".layers." in path and path.endswith("kernel")
        if is_kernel and report.get("bits"):
            assert path not in after and after[path.replace("kernel", "qweight")].dtype == np.uint32
        else:
            assert after[path].dtype == array.dtype == jnp.bfloat16 and after[path].shape == array.shape
            scaled = method in ("awq", "smoothquant") and ".layers." in path
            if not is_kernel and not scaled:
                assert after[path].load().tobytes() == array.load().tobytes()
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)] and [call[2] for call in calls] == report["errors"]
    assert json.loads((tmp_path / "out" / "compression.json").read_text()) == report
    assert report["method"] == method and [*report["errors"][0]] == [*MATRICES]
    assert report["error_of"] == ("outputs" if "calibration" in FORMS[method] else "weights")
    config, original = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", saved(name)))
    settings = config.pop("quantization_config", None)
    assert config == original and (settings is not None) == ("bits" in report)
    if settings is not None:
        assert settings["quant_method"] == "opt-jax" and settings["bits"] == report["bits"]
        assert settings["activation_bits"] == (8 if method == "smoothquant" else None)
        assert settings["recipe"]["method"] == method
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("method", FORMS)
def test_the_directory_is_a_model(saved, tmp_path, method):
    options = FORMS[method]
    compress(saved("opt-125m"), tmp_path / "out", method, **options)
    model, recipe = OPTForCausalLM.from_pretrained(tmp_path / "out"), make_recipe(method, options)
    expected = float_model(tmp_path / "out", saved("opt-125m"), recipe)(IDS).logits
    atol = 0.15 if method == "smoothquant" else 1e-4  # it also rounds activations
    np.testing.assert_allclose(model(IDS).logits, expected, rtol=1e-3, atol=atol)
    assert method != "smoothquant" or not np.allclose(model(IDS).logits, expected, atol=1e-3)
    assert model.generate(IDS[:1, :4], max_new_tokens=3).sequences.shape == (1, 7)
    if recipe.bits:
        with pytest.raises(ValueError, match="kernel is quantized already: take the model that was quantized"):
            compress(tmp_path / "out", tmp_path / "again", "rtn")


def test_a_pruned_model_is_a_model(saved, tmp_path):
    compress(saved("opt-350m"), tmp_path / "out", "wanda", **FORMS["wanda"])
    model = OPTForCausalLM.from_pretrained(tmp_path / "out")
    assert np.isfinite(model(IDS).logits).all()
    for path, param in named_parameters(model).items():
        if ".layers." in path and path.endswith("kernel"):
            zeros = (np.asarray(param.get_value()).T == 0).reshape(-1, 4).sum(axis=1)
            assert (zeros == 2).all()
    model.save_pretrained(tmp_path / "out", overwrite=True)  # its compression.json is no foreign file


# Killed and resumed ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["gptq", "awq", "wanda"])
@pytest.mark.parametrize("finished", [1, 2, 3])
@pytest.mark.combinations
def test_killed_and_resumed_is_bit_identical(saved, tmp_path, monkeypatch, method, finished):
    def killed(done, *_):
        if done == finished:
            raise Killed

    compress(saved("opt-125m"), tmp_path / "complete", method, **FORMS[method])
    with pytest.raises(Killed):
        compress(saved("opt-125m"), tmp_path / "part", method, **FORMS[method], progress=killed)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".part.compressing", "complete"]
    next((tmp_path / ".part.compressing").glob("0.*.npy")).with_name(
        "2.fc2.kernel.npy.opt-jax-" + "0" * 32 + ".part"
    ).touch()
    with pytest.raises(Killed), monkeypatch.context() as patch:  # while the model is written
        patch.setattr(_compress, "write_arrays", lambda *_: operator.call(killed, finished))
        compress(saved("opt-125m"), tmp_path / "part", method, **FORMS[method])
    calls = []
    report = compress(
        saved("opt-125m"), tmp_path / "part", method, **FORMS[method], progress=lambda *call: calls.append(call)
    )
    assert calls == [] and len(report["errors"]) == 3
    assert content(tmp_path / "part") == content(tmp_path / "complete")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["complete", "part"]


def test_a_lost_file_is_noticed(saved, tmp_path):
    def killed(*_):
        raise Killed

    with pytest.raises(Killed):
        compress(saved("opt-125m"), tmp_path / "out", "rtn", progress=killed)
    (tmp_path / ".out.compressing" / "0.fc1.qweight.npy").unlink()
    with pytest.raises(FileNotFoundError, match="0.fc1.qweight.npy"):
        compress(saved("opt-125m"), tmp_path / "out", "rtn")
    assert not (tmp_path / "out").exists()


def test_other_arguments_do_not_go_on(saved, tmp_path):
    def killed(*_):
        raise Killed

    with pytest.raises(Killed):
        compress(saved("opt-125m"), tmp_path / "out", "gptq", calibration=IDS, bits=3, progress=killed)
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / ".out.compressing").iterdir())
    for words, change in (
        ("another bits: 3", dict(bits=4)),
        ("another group_size: null", dict(group_size=8)),
        ("another calibration: ", dict(calibration=IDS[1:])),
        ("another model: ", dict(model=saved("untied"))),
        ("another dtype: ", dict(dtype="bfloat16")),
        ("another method: ", dict(method="awq")),
    ):
        arguments: dict[str, Any] = dict(model=saved("opt-125m"), method="gptq", calibration=IDS, bits=3)
        arguments |= change
        with pytest.raises(ValueError, match=f"compressing was begun with {words}.*remove that directory"):
            compress(output=tmp_path / "out", **arguments)
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / ".out.compressing").iterdir()) == before
    state = tmp_path / ".out.compressing" / "state.json"
    state.write_text(state.read_text().replace('"platform": "cpu"', '"platform": "gpu"'))
    with pytest.raises(ValueError, match='begun with another platform: "gpu"'):
        compress(saved("opt-125m"), tmp_path / "out", "gptq", calibration=IDS, bits=3)


def test_on_disk_is_the_same_as_in_memory(saved, tmp_path, monkeypatch):
    compress(saved("opt-350m"), tmp_path / "a", "gptq", **FORMS["gptq"])
    monkeypatch.setattr(layerwise, "IN_MEMORY", 100)
    compress(saved("opt-350m"), tmp_path / "b", "gptq", **FORMS["gptq"])
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("method", ["gptq", exhaustive("awq"), "wanda"])
def test_a_mesh_is_one_device(tmp_path, method):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    our_model("opt-125m", vocab_size=100).save_pretrained(tmp_path / "model")
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    options = FORMS[method]
    one = compress(tmp_path / "model", tmp_path / "one", method, **options)
    eight = compress(tmp_path / "model", tmp_path / "eight", method, **options, mesh=mesh)
    source, recipe = Source.open(tmp_path / "model", None, None, True), make_recipe(method, options)
    for layer in range(3):
        a, b = (float_parameters(recipe, source, local_arrays(tmp_path / x, layer)) for x in ("one", "eight"))
        for path, value in a.items():
            assert np.isclose(value, b[path], rtol=1e-3, atol=1e-5).mean() > 0.99, (layer, path)
        for matrix, error in one["errors"][layer].items():
            assert eight["errors"][layer][matrix] == pytest.approx(error, rel=0.02)
    with pytest.raises(ValueError, match="samples is 3: it must be a multiple of 4"):
        compress(tmp_path / "model", tmp_path / "c", "gptq", calibration=IDS[:3], mesh=mesh)


# What is refused ---------------------------------------------------------------------------------------------------


def test_statistics_of_nothing(saved, tmp_path, monkeypatch):
    model = OPTForCausalLM.from_pretrained(saved("opt-125m"))
    named_parameters(model)["model.decoder.layers.1.final_layer_norm.bias"].set_value(jnp.full(24, jnp.nan))
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(NothingCollectedError, match="layer 1, fc1: its inputs are not finite"):
        compress(tmp_path / "nan", tmp_path / "out", "gptq", calibration=IDS)
    monkeypatch.setattr(layerwise, "run_layer", lambda _, x, points: (x, {}))
    with pytest.raises(NothingCollectedError, match=r"layer 0, self_attn.q_proj: no inputs were seen at ln1.hook_norm"):
        compress(saved("opt-125m"), tmp_path / "other", "gptq", calibration=IDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.compressing", "nan"]


GIVEN: dict[str, Any] = dict(
    bits=4,
    group_size=8,
    symmetric=True,
    act_order=True,
    true_sequential=True,
    damping=0.1,
    alpha=0.4,
    sparsity=0.3,
    calibration=IDS,
    dtype="bfloat16",
)


@pytest.mark.parametrize("method", OPTIONS)
def test_options_without_effect_are_refused(saved, tmp_path, method):
    for name, value in GIVEN.items():
        if name not in OPTIONS[method]:
            with pytest.raises(ValueError, match=f"^{name} without effect: {method} has no such option; it has"):
                compress(saved("opt-125m"), tmp_path / "out", method, **FORMS[method] | {name: value})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("method 'qptq': choose one of rtn, gptq", dict(method="qptq")),
        ("gptq needs calibration: name a text", dict(method="gptq")),
        ("bits is 9; it must be 2 to 8", dict(method="rtn", bits=9)),
        ("group_size 7 does not divide the 24 inputs", dict(method="rtn", group_size=7)),
        ("group_size 24 does not divide the 40 inputs", dict(method="rtn", group_size=24)),
        ("sparsity is 1.0; it must be between 0 and 1", dict(method="magnitude", sparsity=1.0)),
        ("sparsity 3:7: 7 does not divide the 24 inputs", dict(method="magnitude", sparsity="3:7")),
        ("sparsity 'half': give a share such as 0.5", dict(method="magnitude", sparsity="half")),
        ("symmetric without effect: it goes with bits", dict(method="sparsegpt", symmetric=True, calibration=IDS)),
        ("damping is -1: it must be above 0", dict(method="gptq", damping=-1, calibration=IDS)),
        ("alpha is 2: it must be above 0 and below 1", dict(method="smoothquant", alpha=2, calibration=IDS)),
        ("samples without effect: calibration holds ids", dict(method="gptq", samples=3, calibration=IDS)),
        (r"calibration ids must be \[N, T\] with T at most 64", dict(method="gptq", calibration=IDS[0])),
        (r"calibration holds 99, outside \[0, 98\]", dict(method="gptq", calibration=[[99]])),
        ("window is 65: it must be at least 2 and at most 64", dict(method="gptq", window=65, calibration=["LICENSE"])),
        ("samples is 0: it must be at least 1", dict(method="gptq", samples=0, calibration=["LICENSE"])),
        ("calibration ids must be", dict(method="gptq", calibration=[[]])),
        ("calibration ids hold the pad token, 1: cut", dict(method="gptq", calibration=[[5, 6], [7, 1]])),
        ("bits is 4.0: it must be an integer", dict(method="rtn", bits=4.0)),
        ("group_size is 8.0: it must be an integer", dict(method="rtn", group_size=8.0)),
    ],
)
def test_what_is_refused(saved, tmp_path, words, arguments):
    with pytest.raises(ValueError, match=words):
        compress(saved("opt-125m"), tmp_path / "out", **arguments)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["opt-350m", "galactica"])
def test_models_whose_norms_take_no_scales(saved, tmp_path, name):
    for method in ("awq", "smoothquant"):
        with pytest.raises(ValueError, match="LayerNorm"):
            compress(saved(name), tmp_path / "out", method, calibration=IDS)
    assert not [*tmp_path.iterdir()]


def test_values_that_the_stored_dtype_cannot_hold(tmp_path, monkeypatch):
    model = our_model("opt-125m", param_dtype=jnp.float16)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(layers, "_compress_matrix", lambda _, weight, __: (weight.at[2, 1].set(7e4), 0.0))
    with pytest.raises(ValueError, match="layer 0, self_attn.q_proj.kernel: float16, as stored, cannot hold its new"):
        compress(tmp_path / "model", tmp_path / "out", "magnitude")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_directory_stays(saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="exists already: choose another name, or remove it first"):
        compress(saved("opt-125m"), tmp_path / "out", "rtn")
    (tmp_path / ".other.compressing").mkdir()
    (tmp_path / ".other.compressing" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="thesis.tex, which opt-jax did not put there"):
        compress(saved("opt-125m"), tmp_path / "other", "rtn")
