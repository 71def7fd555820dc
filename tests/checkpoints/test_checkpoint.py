"""Saving and loading models: both layer forms, dtypes, meshes, heads that differ, and nothing half-written."""

import dataclasses
import json
import logging
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from support.conversions import assert_same
from support.hf_files import TINY, VARIANTS, hf_weights, write_hf

import opt_jax
from convert.__main__ import main as convert
from opt_jax import OPTConfig, OPTForCausalLM, OPTForSequenceClassification, OPTModel, named_parameters
from opt_jax.checkpoints import chunks, directories, orbax, pretrained
from opt_jax.parallel.mesh import make_mesh
from opt_jax.parallel.rules import param_sharding

CLASSES = ("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering")
EMBEDDING = "model.decoder.embed_tokens.embedding"


def random_model(cls="OPTForCausalLM", variant="125m", scan_layers=False, param_dtype=jnp.float32, **changes):
    config = OPTConfig.from_hf(VARIANTS[variant] | changes)
    create = getattr(opt_jax, cls)  # shapes alone: JAX would compile its random values for each shape
    model = nnx.eval_shape(lambda: create(config, rngs=nnx.Rngs(0), param_dtype=param_dtype, scan_layers=scan_layers))
    rng = np.random.default_rng(0)
    for param in named_parameters(model).values():  # LayerNorms and biases too
        param.set_value(jnp.asarray(rng.standard_normal(param.get_value().shape), param_dtype))
    return model


def arrays(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(param.get_value()) for path, param in named_parameters(model).items()}


def hidden(directory) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name.startswith("."))


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("variant", ["350m", "untied"])
def test_save_and_load(tmp_path, cls, variant):
    model = random_model(cls, variant, num_labels=3)
    model.save_pretrained(tmp_path / "out")
    loaded = getattr(opt_jax, cls).from_pretrained(tmp_path / "out")
    assert_same(arrays(loaded), arrays(model))
    assert loaded.config.to_hf() == model.config.to_hf() | {"architectures": [cls], "torch_dtype": "float32"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stacked_model_is_stored_per_layer(tmp_path, dtype):
    model = random_model(scan_layers=True, param_dtype=jnp.dtype(dtype))
    stacked = arrays(model)
    model.save_pretrained(tmp_path / "out")
    loaded = arrays(OPTForCausalLM.from_pretrained(tmp_path / "out", param_dtype="auto"))
    assert len(loaded) > len(stacked)
    for path, array in loaded.items():
        layer = re.search(r"\.layers\.(\d+)", path)
        expected = stacked[path] if layer is None else stacked[path.replace(layer[0], ".layers")][int(layer[1])]
        assert array.dtype == dtype and array.tobytes() == expected.tobytes(), path
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_loading_onto_a_mesh(tmp_path, kind):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    weights = hf_weights(TINY, dtype="float16")
    source = write_hf(tmp_path / "hf", TINY, weights, "bin")
    if kind == "orbax":
        OPTForCausalLM.from_pretrained(source, param_dtype="auto").save_pretrained(tmp_path / "out")
        source = tmp_path / "out"
    expected = arrays(OPTForCausalLM.from_pretrained(source))
    for spec in ("data=2,fsdp=2,tensor=2", "fsdp=8", "tensor=4,data=2"):
        mesh = make_mesh(spec)
        model = OPTForCausalLM.from_pretrained(source, mesh=mesh)
        for path, param in named_parameters(model).items():
            value = param.get_value()
            assert value.sharding == param_sharding(path, value.shape, mesh)
        assert_same(arrays(model), expected)
    model.save_pretrained(tmp_path / "from-mesh")
    assert_same(arrays(OPTForCausalLM.from_pretrained(tmp_path / "from-mesh")), expected)


@pytest.mark.slow
def test_a_loaded_model_is_independent_of_its_files_and_trains(tmp_path):
    weights = hf_weights(TINY)
    source = write_hf(tmp_path / "hf", TINY, weights, "bin")  # aligned to 64 bytes, so that JAX could use it in place
    model = OPTForCausalLM.from_pretrained(source)
    embedding = weights["model.decoder.embed_tokens.weight"]
    with open(source / "pytorch_model.bin", "r+b") as file:
        file.seek(file.read().index(embedding.tobytes()))
        file.write(bytes(embedding.nbytes))
    assert arrays(model)[EMBEDDING].tobytes() == embedding.tobytes()

    ids = np.array([[2, 9, 4, 7]])
    step = jax.jit(
        lambda m: jax.tree.map(lambda p, g: p - 0.1 * g, m, jax.grad(lambda m: m.forward(ids, labels=ids).loss)(m)),
        donate_argnums=0,
    )
    new = step(model)
    assert np.isfinite(new.forward(ids, labels=ids).loss)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(model))

    new.save_pretrained(tmp_path / "orbax")
    first, second = (OPTForCausalLM.from_pretrained(tmp_path / "orbax") for _ in range(2))
    step(first)
    for again in (second, OPTForCausalLM.from_pretrained(tmp_path / "orbax")):
        assert_same(arrays(again), arrays(new))


def test_large_arrays_are_stored_in_chunks(tmp_path, monkeypatch):
    """A process that needs one shard must not read all of an array."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4096)
    random_model(vocab_size=4096).save_pretrained(tmp_path / "out")
    metadata: Any = ocp.PyTreeCheckpointHandler().metadata((tmp_path / "out" / "params").absolute())
    for path, leaf in orbax.flatten(metadata.tree).items():
        assert np.prod(leaf.storage.chunk_shape) * 4 <= 4096, path
    assert_same(arrays(OPTForCausalLM.from_pretrained(tmp_path / "out")), arrays(random_model(vocab_size=4096)))


# Dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "orbax"])
@pytest.mark.parametrize(
    "options, compute, param",
    [
        ({}, "float32", "float32"),
        ({"dtype": "auto"}, "float16", "float16"),  # HF's `dtype` is that of the parameters too
        ({"dtype": "auto", "param_dtype": "float32"}, "float16", "float32"),
        ({"dtype": "auto", "param_dtype": "auto"}, "float16", "float16"),
        ({"dtype": jnp.bfloat16}, "bfloat16", "bfloat16"),
        ({"dtype": jnp.bfloat16, "param_dtype": "float32"}, "bfloat16", "float32"),
        ({"param_dtype": "float16"}, "float32", "float16"),
        ({"dtype": "float32", "param_dtype": np.dtype(jnp.bfloat16)}, "float32", "bfloat16"),
    ],
)
def test_dtypes_on_cpu(tmp_path, kind, options, compute, param):
    weights = hf_weights(TINY, dtype="float16")
    source = write_hf(tmp_path / "hf", TINY, weights)
    if kind == "orbax":
        OPTForCausalLM.from_pretrained(source, param_dtype="auto").save_pretrained(tmp_path / "out")
        source = tmp_path / "out"
    model = OPTForCausalLM.from_pretrained(source, **options)
    assert (model.dtype, model.param_dtype) == (compute, param)
    loaded = arrays(model)
    assert {array.dtype for array in loaded.values()} == {jnp.dtype(param)}
    kernel = loaded["model.decoder.layers.0.fc1.kernel"]
    expected = weights["model.decoder.layers.0.fc1.weight"].T.astype(jnp.dtype(param))
    assert kernel.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "platform, stored, asked, chosen",
    [
        ("cpu", "float16", (None, None), ("float32", "float32")),
        ("gpu", "float16", (None, None), ("float16", "float16")),
        ("gpu", "bfloat16", (None, "float32"), ("bfloat16", "float32")),
        ("tpu", "float16", (None, None), ("bfloat16", "bfloat16")),
        ("tpu", "float16", (None, "auto"), ("bfloat16", "float16")),
        ("tpu", "float16", ("auto", "auto"), ("float16", "float16")),
        ("tpu", "float32", (None, None), ("float32", "float32")),
    ],
)
def test_default_dtypes_of_every_platform(platform, stored, asked, chosen, caplog, tmp_path):
    dtype, param_dtype = asked
    dtypes = {EMBEDDING: np.dtype(stored)}
    with caplog.at_level(logging.INFO, "opt_jax"):
        compute, params = pretrained.choose_dtypes(dtype, param_dtype, dtypes, platform, tmp_path)
    assert (compute, params[EMBEDDING]) == chosen
    assert bool(caplog.records) == ("bfloat16" in chosen and stored == "float16")


@pytest.mark.parametrize("dtype", ["int8", "float64", "complex64", "float8_e4m3fn"])
def test_dtypes_that_models_do_not_have(tmp_path, dtype):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    for options in ({"dtype": dtype}, {"param_dtype": dtype}):
        with pytest.raises(ValueError, match=dtype):
            OPTForCausalLM.from_pretrained(source, **options)


# Heads ----------------------------------------------------------------------------------------------------------------


def test_a_missing_head_is_new_and_reported(tmp_path, caplog):
    base = random_model(num_labels=3)
    base.save_pretrained(tmp_path / "out")
    with caplog.at_level(logging.INFO, "opt_jax"):
        model = OPTForSequenceClassification.from_pretrained(tmp_path / "out")
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "score.kernel" in caplog.text
    loaded = arrays(model)
    score = loaded.pop("score.kernel")
    assert score.shape == (8, 3) and 0 < np.std(score) < 10 * base.config.init_std
    assert_same(loaded, arrays(base))

    caplog.clear()
    qa = opt_jax.OPTForQuestionAnswering.from_pretrained(tmp_path / "out", param_dtype="bfloat16")
    assert len(caplog.records) == 2 and "qa_outputs.kernel" in caplog.text and "qa_outputs.bias" in caplog.text
    assert arrays(qa)["qa_outputs.kernel"].dtype == jnp.bfloat16


def test_a_head_that_is_not_wanted_is_dropped_and_reported(tmp_path, caplog):
    tuned = random_model("OPTForSequenceClassification")
    tuned.save_pretrained(tmp_path / "tuned")
    expected = arrays(tuned)
    expected.pop("score.kernel")
    for cls in (OPTForCausalLM, OPTModel):
        caplog.clear()
        assert_same(arrays(cls.from_pretrained(tmp_path / "tuned")), expected)
        assert "score.kernel is not used" in caplog.text

    untied = random_model(variant="untied")
    untied.save_pretrained(tmp_path / "untied")
    caplog.clear()
    assert "lm_head.kernel" not in arrays(OPTModel.from_pretrained(tmp_path / "untied"))
    assert "lm_head.kernel is not used" in caplog.text


def edit_config(directory, **changes):
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, changes, message",
    [
        ("125m", {"tie_word_embeddings": False}, "tensor lm_head.kernel is missing"),
        ("untied", {"tie_word_embeddings": True}, "tensor lm_head.kernel is left over"),
        ("125m", {"_remove_final_layer_norm": True}, "tensor model.decoder.final_layer_norm.bias is left over"),
        ("no-final-norm", {"_remove_final_layer_norm": False}, "tensor model.decoder.final_layer_norm.bias is missing"),
        ("125m", {"num_hidden_layers": 3}, "tensor model.decoder.layers.2."),
        ("125m", {"num_hidden_layers": 1}, "tensor model.decoder.layers.1."),
        ("galactica", {"enable_bias": True}, "bias is missing"),
        ("125m", {"enable_bias": False}, "bias is left over"),
        ("125m", {"ffn_dim": 32}, "layers.0.fc1.bias has shape (16,), but the config calls for (32,)"),
        ("125m", {"vocab_size": 50}, "embed_tokens.embedding has shape (48, 8), but the config calls for (50, 8)"),
    ],
)
def test_everything_else_must_fit(tmp_path, variant, changes, message):
    random_model(variant=variant).save_pretrained(tmp_path / "out")
    edit_config(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        OPTForCausalLM.from_pretrained(tmp_path / "out")


def test_half_a_head_is_not_a_new_head(tmp_path):
    weights = hf_weights(TINY, "qa_outputs")
    del weights["qa_outputs.bias"]
    source = write_hf(tmp_path / "hf", TINY, weights)
    with pytest.raises(ValueError, match="tensor qa_outputs.bias is missing"):
        opt_jax.OPTForQuestionAnswering.from_pretrained(source)


# Files ----------------------------------------------------------------------------------------------------------------


def test_tokenizer_files_travel(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    (source / "vocab.json").write_text("vocabulary")
    (source / "generation_config.json").write_text("{}")
    model = OPTForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "one")
    OPTForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    opt_jax.stack_layers(model).save_pretrained(tmp_path / "stacked")
    for name in ("one", "two", "stacked"):
        assert (tmp_path / name / "vocab.json").read_text() == "vocabulary"
        assert (tmp_path / name / "generation_config.json").read_text() == "{}"

    class Tokenizer:
        def save_pretrained(self, directory):
            (directory / "tokenizer.json").write_text("another")

    OPTForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "three", tokenizer=Tokenizer())
    assert not (tmp_path / "three" / "vocab.json").exists()
    assert (tmp_path / "three" / "tokenizer.json").read_text() == "another"
    random_model().save_pretrained(tmp_path / "four")
    assert sorted(p.name for p in (tmp_path / "four").iterdir()) == ["config.json", "params"]


def test_overwriting_is_asked_for_and_limited_to_models(tmp_path):
    first, second = random_model(), random_model(variant="350m")
    first.save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists already"):
        second.save_pretrained(tmp_path / "out")
    second.save_pretrained(tmp_path / "out", overwrite=True)
    assert_same(arrays(OPTForCausalLM.from_pretrained(tmp_path / "out")), arrays(second))
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "out", overwrite=True)  # onto itself
    assert_same(arrays(OPTForCausalLM.from_pretrained(tmp_path / "out")), arrays(second))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a model directory"):
        first.save_pretrained(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists() and not hidden(tmp_path)


def test_a_failed_save_leaves_things_as_they_were(tmp_path):
    class Broken:
        def save_pretrained(self, directory):
            (directory / "tokenizer.json").write_text("half of")
            raise OSError("disk full")

    first = random_model()
    with pytest.raises(OSError, match="disk full"):
        first.save_pretrained(tmp_path / "out", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []
    first.save_pretrained(tmp_path / "out")
    with pytest.raises(OSError, match="disk full"):
        random_model(variant="350m").save_pretrained(tmp_path / "out", overwrite=True, tokenizer=Broken())
    with pytest.raises(FileNotFoundError):
        with directories.new_directory(tmp_path / "out", overwrite=True) as new:
            shutil.rmtree(new)  # as somebody tidying up would
    assert_same(arrays(OPTForCausalLM.from_pretrained(tmp_path / "out")), arrays(first))
    assert not hidden(tmp_path)


def test_abstract_models_cannot_be_saved(tmp_path):
    model = nnx.eval_shape(lambda: OPTForCausalLM(OPTConfig.from_hf(TINY), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="cannot save parameter"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damaged_orbax_directories(tmp_path):
    random_model().save_pretrained(tmp_path / "out")
    params = tmp_path / "out" / "params"
    biggest = max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = biggest.read_bytes()
    biggest.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="params cannot be read: ") as error:
        OPTForCausalLM.from_pretrained(tmp_path / "out")
    assert "\n" not in str(error.value)
    biggest.write_bytes(content)
    (params / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="params cannot be read"):
        OPTForCausalLM.from_pretrained(tmp_path / "out")
    (params / "_METADATA").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        OPTForCausalLM.from_pretrained(tmp_path / "out")


def test_without_verifying_a_damaged_model_is_read_as_it_is(tmp_path, capsys):
    model = random_model()
    model.save_pretrained(tmp_path / "out")
    needle = arrays(model)[EMBEDDING].tobytes()[:64]
    files = [path for path in (tmp_path / "out" / "params").rglob("*") if path.is_file()]
    path = next(path for path in files if needle in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(needle, bytes([needle[0] ^ 1]) + needle[1:]))
    with pytest.raises(ValueError, match=f"tensor {EMBEDDING} cannot be read: "):
        OPTForCausalLM.from_pretrained(tmp_path / "out")
    assert convert([str(tmp_path / "out"), str(tmp_path / "copy")]) == 1
    assert f"tensor {EMBEDDING} cannot be read: " in capsys.readouterr().err
    assert convert([str(tmp_path / "out"), str(tmp_path / "copy"), "--no-verify", "--quiet"]) == 0
    compare = ["verify", str(tmp_path / "out"), "--against", str(tmp_path / "copy"), "--quiet"]
    assert [convert(compare), convert([*compare, "--no-verify"])] == [1, 0]
    ours, theirs = OPTForCausalLM.from_pretrained(tmp_path / "out", verify=False), arrays(model)
    differ = {path for path, value in arrays(ours).items() if value.tobytes() != theirs[path].tobytes()}
    assert differ == {EMBEDDING}
    assert_same(arrays(OPTForCausalLM.from_pretrained(tmp_path / "copy")), arrays(ours))


# Size -----------------------------------------------------------------------------------------------------------------


def test_names_are_compared_before_a_model_of_the_config_is_built(tmp_path):
    built = []

    class Recorder(OPTForCausalLM):
        def __init__(self, config, **options):
            built.append(config.num_hidden_layers)
            super().__init__(config, **options)

    directory = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    config, _ = pretrained.read_config(directory)
    stored, _ = pretrained.open_parameters(directory, config)
    claimed = {f"model.decoder.layers.{i}.fc1.bias": stored["model.decoder.layers.0.fc1.bias"] for i in range(2, 300)}
    config = dataclasses.replace(config, num_hidden_layers=300)
    with pytest.raises(ValueError, match=r"tensor model\.decoder\.layers\.2\..* is missing"):
        pretrained.check_parameters(Recorder, config, stored | claimed, "here")
    assert built == [1]


@pytest.mark.parametrize(
    "cls, variant",
    [("OPTForCausalLM", "untied"), ("OPTForSequenceClassification", "350m"), ("OPTForQuestionAnswering", "galactica")],
)
def test_expected_shapes_are_those_of_the_model(cls, variant):
    config = OPTConfig.from_hf(VARIANTS[variant])
    model = nnx.eval_shape(lambda: getattr(opt_jax, cls)(config, rngs=nnx.Rngs(0)))
    shapes = {path: param.get_value().shape for path, param in named_parameters(model).items()}
    assert dict(pretrained.expected_shapes(getattr(opt_jax, cls), config)) == shapes


def test_a_new_head_is_in_proportion_to_the_checkpoint(tmp_path):
    write_hf(tmp_path / "out", TINY, hf_weights(TINY))
    edit_config(tmp_path / "out", num_labels=10**8, id2label=None)
    with pytest.raises(ValueError, match="config.json: .*num_labels=100000000 must be at most 1000000"):
        OPTForSequenceClassification.from_pretrained(tmp_path / "out")
    edit_config(tmp_path / "out", num_labels=10**6)  # 8 x 10**6 elements: small enough for any checkpoint
    wide = {"score.kernel": (10**5, 10**6)}
    config, _ = pretrained.read_config(tmp_path / "out")
    stored, _ = pretrained.open_parameters(tmp_path / "out", config)
    expected, fresh, _ = pretrained.check_parameters(
        OPTForSequenceClassification, config, stored, "here", may_lack=("score.",)
    )
    assert fresh == ["score.kernel"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "expected_shapes", lambda cls, config: iter((expected | wide).items()))
        with pytest.raises(ValueError, match=r"a new head of shape \(100000, 1000000\), with num_labels=1000000"):
            pretrained.check_parameters(OPTForSequenceClassification, config, stored, "here", may_lack=("score.",))
