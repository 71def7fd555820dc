"""The converter, run as users run it, on small checkpoints that are written without torch."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.conversions import DATA, assert_same, convert, load_hf_names, refused
from support.hf_files import TINY, VARIANTS, hf_weights, write_hf
from support.metaseq_files import contents, namespace, settings
from support.metaseq_files import write as write_metaseq

import opt_jax
from convert.__main__ import main
from opt_jax import OPTConfig, OPTForCausalLM, named_parameters
from opt_jax.checkpoints import orbax, pretrained
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats import names

# Accepted -------------------------------------------------------------------------------------------------------------


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "safetensors-sharded", "bin", "bin-sharded"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_form_and_dtype_arrives_bit_for_bit(tmp_path, form, dtype):
    weights = hf_weights(TINY, dtype=dtype)
    weights["model.decoder.layers.1.fc1.weight"].view(np.uint8)[:] = 255  # NaNs whose bits must not change
    convert(write_hf(tmp_path / "hf", TINY, weights, form), tmp_path / "out")
    assert_same(load_hf_names(tmp_path / "out"), weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == TINY


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", ["lm_head", "score", "qa_outputs", ""])
def test_every_architecture_and_class_arrives_and_loads(tmp_path, variant, head, caplog):
    classes = {"lm_head": "OPTForCausalLM", "score": "OPTForSequenceClassification", "": "OPTModel"}
    cls = classes.get(head, "OPTForQuestionAnswering")
    config = VARIANTS[variant] | {"architectures": [cls]}
    weights = hf_weights(config, head, "float16")
    source = write_hf(tmp_path / "hf", config, weights)
    convert(source, tmp_path / "out")
    expected = {name if head else f"model.{name}": array for name, array in weights.items()}
    assert_same(load_hf_names(tmp_path / "out"), expected)

    with caplog.at_level(logging.WARNING, "opt_jax"):
        from_hf = getattr(opt_jax, cls).from_pretrained(source, param_dtype="auto")
        from_orbax = getattr(opt_jax, cls).from_pretrained(tmp_path / "out", param_dtype="auto")
    assert not caplog.records  # no parameter is new, no tensor unused
    params = named_parameters(from_hf)
    for path, param in named_parameters(from_orbax).items():
        name, transposed = names.to_hf(path)
        for array in (np.asarray(param.get_value()), np.asarray(params[path].get_value())):
            assert (array.T if transposed else array).tobytes() == expected[name].tobytes(), path


def test_official_layouts_of_names(tmp_path):
    """Files on the hub have names without `model.`, and lm_head.weight although it is tied."""
    weights = hf_weights(TINY)
    expected = dict(weights)
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    weights["model.decoder.version"] = np.full(1, 3, np.float32)  # HF ignores it too
    convert(write_hf(tmp_path / "tied", TINY, weights), tmp_path / "out1")
    assert_same(load_hf_names(tmp_path / "out1"), expected)
    bare = {name.removeprefix("model."): array for name, array in weights.items()}
    convert(write_hf(tmp_path / "bare", TINY, bare, "bin"), tmp_path / "out2")
    assert_same(load_hf_names(tmp_path / "out2"), expected)


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_dtype_casts_and_says_so_in_the_config(tmp_path, stored, asked):
    config = TINY | {"dtype": stored}
    weights = hf_weights(config, dtype=stored)
    convert(write_hf(tmp_path / "hf", config, weights), tmp_path / "out", "--dtype", asked)
    kind = getattr(ml_dtypes, asked, asked)
    assert_same(load_hf_names(tmp_path / "out"), {name: array.astype(kind) for name, array in weights.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": asked}


def test_companion_files_travel(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    files = (
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
    )
    for name in (*files, "flax_model.msgpack"):
        (source / name).write_text(f"content of {name}")
    out = convert(source, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == sorted([*files, "config.json", "params"])
    assert all((out / name).read_text() == f"content of {name}" for name in files)


@pytest.mark.slow
def test_command_needs_neither_torch_nor_noise(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY, dtype="float16"), "bin")
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "torch.py").write_text("raise ImportError('torch is not needed')")
    command = [sys.executable, "-W", "error", "-m", "convert", str(source), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "shadow")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=DATA.parents[1], env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    count = sum(a.size for a in hf_weights(TINY).values())
    pattern = rf"\S+out: {count:,} parameters, {2 * count:,} bytes, [0-9.]+ seconds, peak RSS [0-9,]+ MB\n"
    assert re.fullmatch(pattern, done.stdout)


# Refused -------------------------------------------------------------------------------------------------------------


def test_existing_destination(tmp_path, capsys):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    weights = hf_weights(TINY, dtype="float16")
    out = convert(write_hf(tmp_path / "half", TINY, weights), tmp_path / "out")
    assert "--overwrite" in refused(capsys, source, out)
    assert_same(load_hf_names(out), weights)
    (tmp_path / "broken").mkdir()
    assert "config" in refused(capsys, tmp_path / "broken", out, "--overwrite")  # the old checkpoint survives a failure
    assert_same(load_hf_names(out), weights)
    convert(source, out, "--overwrite")
    assert_same(load_hf_names(out), hf_weights(TINY))
    assert "not a model directory" in refused(capsys, source, source, "--overwrite")
    (tmp_path / "file").write_text("precious")
    assert "not a model directory" in refused(capsys, source, tmp_path / "file", "--overwrite")
    assert "not a model directory" in refused(capsys, out, source, "--overwrite")
    assert "is, or holds, the checkpoint to convert" in refused(capsys, out, out, "--overwrite")
    (out / "NOTES.md").write_text("precious")
    assert "holds NOTES.md" in refused(capsys, source, out, "--overwrite")
    (out / "NOTES.md").unlink()
    convert(out, tmp_path / "copy", "--dtype", "bfloat16")
    bfloat16 = {name: array.astype(ml_dtypes.bfloat16) for name, array in hf_weights(TINY).items()}
    assert_same(load_hf_names(tmp_path / "copy"), bfloat16)


@pytest.mark.parametrize("options", [["--frobnicate"], ["--dtype", "int8"], ["third"]])
def test_bad_usage(tmp_path, capsys, options):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    with pytest.raises(SystemExit) as exit:
        main([str(source), str(tmp_path / "out"), *options])
    assert exit.value.code == 2 and not (tmp_path / "out").exists()


FC1 = "model.decoder.layers.1.fc1.weight"
EMBED = "model.decoder.embed_tokens.weight"


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (TINY, {FC1: None}, f"tensor {FC1} is missing"),
        (TINY, {"model.decoder.final_layer_norm.bias": None}, "tensor model.decoder.final_layer_norm.bias is missing"),
        (TINY, {"score.weight": np.zeros((2, 8))}, "tensor score.weight is left over"),
        (TINY, {"model.decoder.layers.2.fc1.weight": np.zeros((16, 8))}, "tensor model.decoder.layers.2.fc1.weight is"),
        (TINY, {"model.decoder.layers.01.fc1.weight": np.zeros((16, 8))}, "layers.01.fc1.weight is left over"),
        (TINY, {"model.decoder.versions": np.zeros(1)}, "tensor model.decoder.versions is left over"),
        (TINY, {"decoder.embed_tokens.weight": np.zeros((48, 8))}, "decoder.embed_tokens.weight is there twice"),
        (TINY, {FC1: np.zeros((8, 16))}, f"tensor {FC1} has shape (8, 16), but the config calls for (16, 8)"),
        (TINY, {EMBED: np.zeros((48, 8, 1))}, f"tensor {EMBED} has shape (48, 8, 1)"),
        (TINY, {"lm_head.weight": np.zeros((48, 8))}, "tensor lm_head.weight differs"),
        (TINY, {"lm_head.weight": np.zeros((47, 8))}, "tensor lm_head.weight differs"),
        (VARIANTS["untied"], {"lm_head.weight": None}, "tensor lm_head.weight is missing"),
        (VARIANTS["350m"], {"model.decoder.final_layer_norm.weight": np.zeros(8)}, "final_layer_norm.weight is left"),
        (TINY, {FC1: np.zeros((16, 8), np.int32)}, f"tensor {FC1} is int32"),
        (TINY, {FC1: np.zeros((16, 8), np.float64)}, f"tensor {FC1} is float64"),
        (TINY | {"architectures": [7]}, {}, "architectures=[7] must be a list of names"),
        (TINY | {"model_type": "gpt2"}, {}, "model_type is 'gpt2'"),
        (TINY | {"hidden_size": "8"}, {}, "hidden_size='8'"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, capsys, config, changes, message):
    weights = hf_weights(config | {"hidden_size": 8}) | changes
    weights = {name: array for name, array in weights.items() if array is not None}
    source = write_hf(tmp_path / "hf", config, weights)
    assert message in refused(capsys, source, tmp_path / "out")


def with_integers(directory: Path, form: str, dtype: str) -> Path:
    """Write a checkpoint whose FC1 has this dtype. Returns the path to convert."""
    weights = hf_weights(TINY)
    weights[FC1] = np.ones((16, 8), getattr(ml_dtypes, dtype, dtype))
    if form == "metaseq":
        return write_metaseq(directory, contents(weights, cfg=namespace({"model": settings(TINY)})))[0]
    if form != "orbax":
        return write_hf(directory, TINY, weights, form)
    arrays = {}
    for name, array in weights.items():
        path, transposed = names.from_hf(name)
        array = array.T if transposed else array
        arrays[path] = LazyArray(array.shape, array.dtype, array.__getitem__)
    orbax.write_arrays(directory / "params", arrays)
    (directory / "config.json").write_text(json.dumps(TINY))
    return directory


@pytest.mark.parametrize(
    "form, dtype",
    [
        ("safetensors", "int8"),
        ("safetensors", "uint32"),
        ("safetensors", "bool"),
        ("safetensors-sharded", "int64"),
        ("bin", "int8"),
        ("bin-sharded", "int32"),
        ("flax", "int8"),
        ("orbax", "int8"),
        ("orbax", "uint8"),
        ("metaseq", "int8"),
    ],
)
def test_what_is_not_floating_point_is_no_weight(tmp_path, capsys, form, dtype):
    source = with_integers(tmp_path / "source", form, dtype)
    if form != "metaseq":
        with pytest.raises(ValueError, match=f"{source}: tensor .*fc1.* is {dtype}, which no weight of a model is$"):
            OPTForCausalLM.from_pretrained(source)
    for options in (["--dtype", "float32"], []):
        assert f"tensor {FC1} is {dtype}, which no weight" in refused(capsys, source, tmp_path / "out", *options)


@pytest.mark.parametrize(
    "file, content, recipe",
    [
        ("config.json", TINY | {"quantization_config": {"quant_method": "awq"}}, "this is an AWQ checkpoint"),
        ("config.json", TINY | {"quantization_config": {"load_in_8bit": True}}, "this is a bitsandbytes checkpoint"),
        ("config.json", TINY | {"quantization_config": {"quant_method": "hqq"}}, "this is a 'hqq' checkpoint"),
        ("config.json", TINY | {"quantization_config": {"quant_method": None}}, "a quantized (quant_method None) "),
        ("quant_config.json", {"w_bit": 4}, "this is an AWQ checkpoint"),
    ],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_a_quantized_checkpoint_is_called_one(tmp_path, capsys, file, content, recipe, renamed):
    weights = hf_weights(TINY)
    weights[FC1] = np.ones((16, 8), np.int8)
    if renamed:
        weights[FC1.replace("weight", "qweight")] = weights.pop(FC1)
    source = write_hf(tmp_path / "hf", TINY, weights)
    (source / file).write_text(json.dumps(content))
    said = refused(capsys, source, tmp_path / "out")
    assert recipe in said and "fc1" in said and "take the model that was quantized" in said
    with pytest.raises(ValueError, match=re.escape(recipe)):
        OPTForCausalLM.from_pretrained(source)


def test_a_quantization_of_weights_that_are_not_quantized_is_noted(tmp_path, capsys):
    source = write_hf(tmp_path / "hf", TINY | {"quantization_config": {"bits": 4}}, hf_weights(TINY))
    with pytest.warns(UserWarning, match=r"without effect: quantization_config=.'bits': 4. .no weight is quantized"):
        OPTForCausalLM.from_pretrained(source)
    with warnings.catch_warnings(action="always"):
        convert(source, tmp_path / "out")
    assert "without effect: quantization_config={'bits': 4} (no weight is quantized)\n" in capsys.readouterr().err


def test_cast_that_would_overflow(tmp_path, capsys):
    weights = hf_weights(TINY)
    weights[FC1][3, 4] = 1e5
    source = write_hf(tmp_path / "hf", TINY, weights)
    assert FC1 in refused(capsys, source, tmp_path / "out", "--dtype", "float16")
    weights[FC1][3, 4] = np.inf  # without a cast it is kept
    convert(write_hf(tmp_path / "inf", TINY, weights), tmp_path / "out", "--dtype", "float16")


@pytest.mark.parametrize("form", ["safetensors-sharded", "bin-sharded"])
def test_shards_that_contradict_the_index(tmp_path, capsys, form):
    weights = hf_weights(TINY)
    source = write_hf(tmp_path / "hf", TINY, weights, form)
    first, second = sorted(p for p in source.iterdir() if "-of-" in p.name)
    index = next(source.glob("*.index.json"))
    content = json.loads(index.read_text())

    def with_map(**changes) -> str:
        index.write_text(json.dumps({"weight_map": content["weight_map"] | changes}))
        return refused(capsys, source, tmp_path / "out")

    assert "tensor nowhere is missing" in with_map(nowhere=first.name)
    assert "is not the name of a file in this directory" in with_map(nowhere="../" + first.name)
    assert "not an index" in with_map(nowhere=7)
    index.write_text(json.dumps(content))
    content_of_second = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert f"{second}: tensor " in refused(capsys, source, tmp_path / "out")
    second.write_bytes(content_of_second)
    convert(source, tmp_path / "fine")
    second.unlink()
    assert second.name in refused(capsys, source, tmp_path / "out")
    index.write_text("[]")
    assert index.name in refused(capsys, source, tmp_path / "out")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_truncated_at_every_place(tmp_path, capsys, form):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY, dtype="float16"), form)
    file = next(p for p in source.iterdir() if p.name != "config.json")
    content = file.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(content), 997), len(content) - 1]:
        file.write_bytes(content[:length])
        assert str(file) in refused(capsys, source, tmp_path / "out")
    file.write_bytes(content + b"\0" * 8)
    if form == "safetensors":
        assert "belong to none" in refused(capsys, source, tmp_path / "out")


def test_other_things_than_weights(tmp_path, capsys):
    source = write_hf(tmp_path / "hf", TINY, {})
    (source / "model.safetensors").unlink()
    assert "no weights" in refused(capsys, source, tmp_path / "out")
    file = source / "pytorch_model.bin"
    for content, message in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02", "before 1.6"),
        (b"\0" * 257 + b"ustar" + b"\0" * 250, "before 1.6"),
        (b"<html>not found</html>", "not a file written by torch.save"),
    ]:
        file.write_bytes(content)
        assert message in refused(capsys, source, tmp_path / "out")
    file.unlink()
    (source / "config.json").unlink()
    assert "config" in refused(capsys, source, tmp_path / "out")
    assert "no directory" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")


def test_cut_short_by_an_error_while_writing(tmp_path, capsys):
    """The last tensor fails. Those before it are on disk already and must be removed."""
    weights = hf_weights(TINY)
    weights["model.decoder.final_layer_norm.bias"][:] = 1e30
    source = write_hf(tmp_path / "hf", TINY, weights)
    assert "final_layer_norm.bias" in refused(capsys, source, tmp_path / "out", "--dtype", "float16")


# The table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cls", ["OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"])
def test_name_table_is_a_bijection(variant, cls):
    shapes = dict(pretrained.expected_shapes(getattr(opt_jax, cls), OPTConfig.from_hf(VARIANTS[variant])))
    hf_names = {path: names.to_hf(path) for path in shapes}
    assert len({name for name, _ in hf_names.values()}) == len(shapes)
    for path, (name, transposed) in hf_names.items():
        assert names.from_hf(name) == (path, transposed)
        if name.startswith("model."):
            assert names.from_hf(name.removeprefix("model.")) == (path, transposed)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.lm_head.weight",
        "model.decoder.layers.*.fc1.weight",
        "model.decoder.layers.-1.fc1.weight",
        "model.decoder.layers.007.fc1.weight",
        "model.decoder.layers.\u0661.fc1.weight",  # a digit to str.isdigit
        "model.decoder.layers.1.layers.2.fc1.weight",
        "model.model.decoder.embed_tokens.weight",
    ],
)
def test_name_table_has_nothing_else(name):
    with pytest.raises(KeyError):
        names.from_hf(name)
