"""Quantized models on disk: Orbax directories of ours, GPTQ's files in and out, bitsandbytes' int8 in."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.test_packed import random_matrices
from reference import our_model
from safetensors.numpy import load_file, save_file
from support.conversions import convert, refused
from support.gptq_files import CONFIG, FC1, dequantized, write_bitsandbytes, write_gptq
from support.hf_files import TINY, hf_weights, write_hf

from convert.__main__ import main
from convert.source import open_source
from opt_jax import OPTForCausalLM, OPTForSequenceClassification, OPTModel, named_parameters, quantize
from opt_jax.checkpoints import arrays as lazy_arrays
from opt_jax.checkpoints import orbax
from opt_jax.checkpoints.formats import quantized
from opt_jax.model.packed import PackedLinear
from opt_jax.model.packed_models import pack_model, packed_layers
from opt_jax.model.quantization import Int8Linear, count_int8
from opt_jax.parallel.mesh import make_mesh

KERNEL = f"{FC1}.kernel"
IDS = np.array([[2, 5, 9, 4]], np.int32)


def assert_same(one: Any, other: Any) -> None:
    """All arrays of two models are equal, bit by bit."""
    ours, theirs = named_parameters(one), named_parameters(other)
    assert ours.keys() == theirs.keys()
    for path, param in ours.items():
        a, b = (np.asarray(p.get_value()) for p in (param, theirs[path]))
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), path


def settings_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def edit(directory: Path, **changes: Any) -> Path:
    """Change fields of `quantization_config`; those that are None are removed."""
    content = json.loads((directory / "config.json").read_text())
    settings = content["quantization_config"] | changes
    content["quantization_config"] = {name: value for name, value in settings.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def edit_tensors(directory: Path, **changes: Any) -> Path:
    """Change tensors of the first fc1; those that are None are removed."""
    tensors = load_file(directory / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(f"{FC1}.{name}", None)
        if value is not None:
            tensors[f"{FC1}.{name}"] = np.ascontiguousarray(value)
    save_file(tensors, directory / "model.safetensors")
    return directory


# Orbax -------------------------------------------------------------------------------------------------------

PACKED: dict[str, dict[str, Any]] = {
    "4 bits": dict(bits=4, group_size=8),
    "symmetric": dict(bits=8, symmetric=True),
    "act-order, groups that end within a word": dict(bits=3, group_size=12, act_order=True),
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_model_comes_back_bit_by_bit(tmp_path, kind):
    model = our_model("opt-350m", num_hidden_layers=1)
    model = pack_model(model, random_matrices(model, **PACKED[kind]))
    model.save_pretrained(tmp_path / "out")
    settings = settings_of(tmp_path / "out")
    assert settings == {
        "quant_method": "opt-jax",
        "format": 1,
        "bits": PACKED[kind]["bits"],
        "activation_bits": None,
        "recipe": None,
    }
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(loaded, model)
    assert packed_layers(loaded)[KERNEL].bits == PACKED[kind]["bits"]
    kernels = packed_layers(model)
    floats = named_parameters(OPTForCausalLM.from_pretrained(tmp_path / "out", dequantize=True))
    for path, layer in kernels.items():
        np.testing.assert_array_equal(floats[path].get_value().T, layer.matrix().dequantize())
    stored = orbax.open_arrays(tmp_path / "out" / "params")
    assert sum(array.nbytes for array in stored.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def test_matrices_of_different_bits_and_rounded_inputs(tmp_path):
    model = our_model("opt-125m", num_hidden_layers=2)
    eight = {path: m for path, m in random_matrices(model, bits=8, symmetric=True).items() if "fc1" in path}
    model = pack_model(
        pack_model(model, eight, activation_bits=8),
        {path: matrix for path, matrix in random_matrices(model, bits=4).items() if path not in eight},
    )
    model.save_pretrained(tmp_path / "out")
    settings = settings_of(tmp_path / "out")
    assert settings["bits"][KERNEL] == 8 and settings["bits"][KERNEL.replace("fc1", "fc2")] == 4
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(loaded, model)
    assert [layer.activation_bits for layer in packed_layers(loaded).values()].count(8) == 2
    assert packed_layers(loaded)[KERNEL].activation_bits == 8
    with pytest.raises(ValueError, match=r"GPTQ's form cannot hold this model \(.*write an Orbax directory, or deq"):
        model.save_pretrained(tmp_path / "hf", safe_serialization=True)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["opt-125m", "untied"])
def test_an_int8_model_comes_back_bit_by_bit(tmp_path, name):
    pytest.importorskip("qwix")
    model = quantize(our_model(name, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "out")
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(loaded, model)
    assert count_int8(loaded) == count_int8(model) > 6
    if name == "untied":
        np.testing.assert_array_equal(loaded(IDS).logits, model(IDS).logits)
    floats = named_parameters(OPTForCausalLM.from_pretrained(tmp_path / "out", dequantize=True))
    table: Any = model.model.decoder.embed_tokens
    expected = table.weight.get_value().astype(np.float32) * table.scale.get_value()
    np.testing.assert_array_equal(floats["model.decoder.embed_tokens.embedding"].get_value(), expected)
    with pytest.raises(ValueError, match="GPTQ's form cannot hold .* is int8 with a scale for each output"):
        model.save_pretrained(tmp_path / "hf", safe_serialization=True)


def test_a_recipe_is_kept(tmp_path):
    source, _ = write_gptq(tmp_path / "hf")
    OPTForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "out")
    assert settings_of(tmp_path / "out")["recipe"] == settings_of(source)
    OPTForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert settings_of(tmp_path / "again") == settings_of(tmp_path / "out")
    OPTForCausalLM.from_pretrained(tmp_path / "out", dequantize=True).save_pretrained(tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("kind", ["packed", "act-order", "int8"])
def test_models_on_a_mesh(tmp_path, kind):
    """Each device reads its shard: those of a matrix that divides are smaller than the matrix."""
    if kind == "int8":
        pytest.importorskip("qwix")
        plain = our_model(
            "opt-125m", hidden_size=32, ffn_dim=64, num_attention_heads=4, vocab_size=96, num_hidden_layers=1
        )
        quantize(plain).save_pretrained(tmp_path / "source")
        source = tmp_path / "source"
    else:
        source, _ = write_gptq(tmp_path / "source", desc_act=kind == "act-order")
    mesh = make_mesh("fsdp=2,tensor=4", jax.devices()[:8])
    sharded, single = (OPTForCausalLM.from_pretrained(source, mesh=m) for m in (mesh, None))
    assert_same(sharded, single)
    matrix = named_parameters(sharded)[f"{FC1}.{'weight' if kind == 'int8' else 'qweight'}"].get_value()
    rows, columns = (4, 2) if kind == "int8" else (2, 4)  # int8: [outputs, inputs]
    assert matrix.sharding.shard_shape(matrix.shape) == (matrix.shape[0] // rows, matrix.shape[1] // columns)
    np.testing.assert_allclose(sharded(IDS).logits, single(IDS).logits, rtol=1e-4, atol=1e-4)
    sharded.save_pretrained(tmp_path / "out")
    assert_same(OPTForCausalLM.from_pretrained(tmp_path / "out", mesh=mesh), sharded)


def test_damaged_chunks_are_noticed(tmp_path):
    source, _ = write_gptq(tmp_path / "hf")
    convert(source, tmp_path / "out")
    for path in (tmp_path / "out" / "params").glob("ocdbt.process_0/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match="tensor .* cannot be read|cannot be read"):
        OPTForCausalLM.from_pretrained(tmp_path / "out")


# GPTQ's files -------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "2 bits": dict(bits=2, group_size=-1),
    "3 bits": dict(bits=3),
    "4 bits": dict(),
    "8 bits": dict(bits=8, group_size=-1),
    "act-order, two layers": dict(desc_act=True, config={"num_hidden_layers": 2}),
    "act-order, 3 bits": dict(bits=3, desc_act=True),
    "symmetric": dict(sym=True),
    "second form": dict(form="gptq_v2"),
    "a smaller last group": dict(group_size=40),
    "a group of all inputs": dict(group_size=128),
}


@pytest.mark.parametrize("kind", FORMS)
def test_gptq_in_and_out(tmp_path, capsys, kind):
    """Read packed, read as floats, converted to Orbax and back: each number, and each byte of the file."""
    source, matrices = write_gptq(tmp_path / "hf", **FORMS[kind])
    opened = open_source([str(source)])
    opened.check()
    for base, matrix in matrices.items():
        array: Any = opened.arrays[f"{base}.kernel"]
        assert array.dtype == np.float16 and array.bits == FORMS[kind].get("bits", 4)
        np.testing.assert_array_equal(array.dequantized("float32").load().T, dequantized(matrix))
        np.testing.assert_array_equal(
            array.load((slice(3, 37), slice(5, 6))).T, dequantized(matrix)[5:6, 3:37].astype("f2")
        )
    convert(source, tmp_path / "out")
    model = OPTForCausalLM.from_pretrained(tmp_path / "out")
    for base, matrix in matrices.items():
        layer = packed_layers(model)[f"{base}.kernel"]
        np.testing.assert_array_equal(layer.matrix().dequantize(), dequantized(matrix))
        again = PackedLinear.from_matrix(layer.matrix())
        np.testing.assert_array_equal(layer.qweight.get_value(), again.qweight.get_value())  # left over slots, too
    assert main(["to-hf", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].tobytes() == tensor.tobytes(), name
    fields = ("bits", "desc_act", "sym", "checkpoint_format")
    settings, expected = settings_of(tmp_path / "back"), settings_of(source)
    assert all(settings[name] == expected[name] for name in fields) and settings["pack_dtype"] == "int32"
    assert settings["group_size"] == (-1 if kind.endswith("all inputs") else expected["group_size"])
    for dst in ("out", "back") if kind.startswith("act-order") else ():
        assert main(["verify", str(tmp_path / dst), "--against", str(source)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f"{opened.arrays[KERNEL].bits}-bit" in capsys.readouterr().out  # type: ignore[reportAttributeAccessIssue]


def test_a_model_saves_what_it_read(tmp_path):
    """`safe_serialization` writes the bytes of the file that the model was read from."""
    source, _ = write_gptq(tmp_path / "hf", bits=3)
    model = OPTForCausalLM.from_pretrained(source, param_dtype="auto")
    model.save_pretrained(tmp_path / "out", safe_serialization=True)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


def test_scales_that_float16_cannot_hold_stay_float32(tmp_path):
    model = our_model("opt-125m", hidden_size=32, ffn_dim=64, num_attention_heads=4, num_hidden_layers=1)
    model = pack_model(model, random_matrices(model, bits=4))
    model.save_pretrained(tmp_path / "out", safe_serialization=True)
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{FC1}.scales"].dtype == np.float32
    assert settings_of(tmp_path / "out")["checkpoint_format"] == "gptq_v2"  # a zero is 0
    assert_same(OPTForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_models_that_gptq_cannot_hold(tmp_path):
    model = our_model("opt-125m", hidden_size=32, ffn_dim=64, num_attention_heads=4, num_hidden_layers=2)
    four, three = (random_matrices(model, bits=bits, group_size=16) for bits in (4, 3))
    last = KERNEL.replace("layers.0", "layers.1")
    cases = {
        "integers of different bits": four | {KERNEL: three[KERNEL]},
        "in a part of the layers only": {path: matrix for path, matrix in four.items() if path != last},
        "groups of different sizes": four | {KERNEL: random_matrices(model, bits=4, group_size=8)[KERNEL]},
        "fc1 has integers of 5 bits; the form has 2, 3, 4, 8": random_matrices(model, bits=5),
    }
    for message, matrices in cases.items():
        packed = pack_model(model, matrices)
        with pytest.raises(ValueError, match=rf"GPTQ's form cannot hold this model \(.*{message}\): write an Orbax"):
            packed.save_pretrained(tmp_path / "out", safe_serialization=True)
    narrow = our_model("opt-125m", num_hidden_layers=1)  # 24 inputs
    narrow = pack_model(narrow, random_matrices(narrow, bits=2))
    with pytest.raises(ValueError, match="fc1 is 40 x 24, and 24 integers of 2 bits do not fill words of 32 bits"):
        narrow.save_pretrained(tmp_path / "out", safe_serialization=True)
    without_fc2 = {path: matrix for path, matrix in four.items() if "fc2" not in path}
    pack_model(model, without_fc2).save_pretrained(tmp_path / "out", safe_serialization=True)
    settings = settings_of(tmp_path / "out")
    assert settings["modules_in_block_to_quantize"] == [
        ["fc1", *(f"self_attn.{x}_proj" for x in ("k", "out", "q", "v"))]
    ]
    assert len(packed_layers(OPTForCausalLM.from_pretrained(tmp_path / "out"))) == 10


def test_settings_in_the_older_file(tmp_path):
    source, matrices = write_gptq(tmp_path / "hf")
    settings = settings_of(source)
    del settings["checkpoint_format"], settings["quant_method"]
    (source / "quantize_config.json").write_text(json.dumps(settings))
    edit(source, **dict.fromkeys(settings_of(source)))
    model = OPTForCausalLM.from_pretrained(source)
    np.testing.assert_array_equal(packed_layers(model)[KERNEL].matrix().dequantize(), dequantized(matrices[FC1]))
    model.save_pretrained(tmp_path / "out")  # its settings are in config.json
    assert_same(OPTForCausalLM.from_pretrained(tmp_path / "out"), model)
    edit(source, quant_method="gptq", **settings)
    assert_same(OPTForCausalLM.from_pretrained(source), model)
    (source / "quantize_config.json").write_text(json.dumps(settings | {"checkpoint_format": "gptq_v2"}))
    with pytest.raises(ValueError, match="quantize_config.json has other bits, group_size or checkpoint_format than"):
        OPTForCausalLM.from_pretrained(source)


def test_a_file_with_the_name_of_autogptq(tmp_path):
    source, _ = write_gptq(tmp_path / "hf")
    (source / "model.safetensors").rename(source / "gptq_model-4bit-32g.safetensors")
    with pytest.raises(FileNotFoundError, match="rename gptq_model-4bit-32g.safetensors to model.safetensors"):
        OPTForCausalLM.from_pretrained(source)
    with pytest.raises(ValueError, match="is a file; give the directory it is in"):
        OPTForCausalLM.from_pretrained(source / "gptq_model-4bit-32g.safetensors")


def test_a_file_without_g_idx(tmp_path):
    source, matrices = write_gptq(tmp_path / "hf")
    edit_tensors(source, g_idx=None)
    layers = packed_layers(OPTForCausalLM.from_pretrained(source))
    np.testing.assert_array_equal(layers[KERNEL].matrix().dequantize(), dequantized(matrices[FC1]))
    with pytest.raises(ValueError, match=r"fc1.*g_idx is missing, which desc_act=True calls for"):
        OPTForCausalLM.from_pretrained(edit(source, desc_act=True))


def test_other_classes_and_names(tmp_path):
    source, _ = write_gptq(tmp_path / "hf")
    expected = OPTForCausalLM.from_pretrained(source)
    base = OPTModel.from_pretrained(source)
    np.testing.assert_array_equal(base(IDS).last_hidden_state, expected.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base", safe_serialization=True)
    assert "decoder.layers.0.fc1.qweight" in load_file(tmp_path / "base" / "model.safetensors")
    assert_same(OPTModel.from_pretrained(tmp_path / "base"), base)
    classifier = OPTForSequenceClassification.from_pretrained(source, num_labels=3)
    assert len(packed_layers(classifier)) == 6
    tensors = load_file(source / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, source / "model.safetensors")
    with pytest.warns(UserWarning, match="module"):
        assert_same(OPTForCausalLM.from_pretrained(source), expected)


REFUSED_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "bits": (dict(bits=5), "bits=5 is not supported: 2, 3, 4, 8 are"),
    "bits that are no number": (dict(bits="4"), "bits='4' is not supported"),
    "group size": (dict(group_size=0), "group_size=0 is not supported"),
    "no group size": (dict(group_size=None), "group_size=None is not supported"),
    "form": (dict(checkpoint_format="marlin"), "checkpoint_format='marlin' is not supported"),
    "form under its new name": (dict(checkpoint_format=None, format="bitblas"), "format='bitblas' is not supported"),
    "two forms": (dict(format="gptq_v2"), "format='gptq_v2' is not supported: checkpoint_format says gptq"),
    "words": (dict(pack_dtype="int16"), "pack_dtype='int16' is not supported: int32 is"),
    "head": (dict(lm_head=True), "lm_head=True is not supported"),
    "rules": (dict(dynamic={"-:fc1": {}}), "dynamic=.*is not supported: it may change the numbers"),
    "unknown": (dict(rotation="hadamard"), "rotation='hadamard' is not supported"),
    "other bits than the tensors": (dict(bits=8), "scales has shape|g_idx has shape"),
    "other groups than the tensors": (dict(group_size=16), "scales has shape .2, 96., but .* say 4 groups"),
}


@pytest.mark.parametrize("kind", REFUSED_SETTINGS)
def test_settings_that_are_refused(tmp_path, kind):
    source, _ = write_gptq(tmp_path / "hf")
    changes, message = REFUSED_SETTINGS[kind]
    edit(source, **changes)
    with pytest.raises(ValueError, match=message):
        OPTForCausalLM.from_pretrained(source)
    with pytest.raises(ValueError, match=message):
        open_source([str(source)])


def test_settings_without_effect_pass(tmp_path):
    source, _ = write_gptq(tmp_path / "hf")
    expected = OPTForCausalLM.from_pretrained(source)
    edit(
        source,
        dynamic={},
        adapter=False,
        meta={"damp_percent": 0.01},
        static_groups=True,
        exllama_config={"version": 2},
    )
    assert_same(OPTForCausalLM.from_pretrained(source), expected)


def _poisoned(scales: np.ndarray) -> np.ndarray:
    scales = scales.copy()
    scales[0, 3] = np.nan
    return scales


DAMAGED: dict[str, tuple[Any, str]] = {
    "zero of 0 in the first form": (lambda t: dict(qzeros=t["qzeros"] | 15), "qzeros holds 15, which programs read as"),
    "group out of range": (lambda t: dict(g_idx=t["g_idx"] + 1), "g_idx has groups from 1 to 2, but there are 2"),
    "negative group": (lambda t: dict(g_idx=t["g_idx"] - 1), "g_idx has groups from -1 to 0, but there are 2"),
    "crowded group": (lambda t: dict(g_idx=t["g_idx"] * 0), "g_idx puts 64 inputs into a group, more than the 32"),
    "NaN": (lambda t: dict(scales=_poisoned(t["scales"])), "scales of model.*fc1.weight are not all finite"),
    "no scales": (lambda t: dict(scales=None), "fc1.*scales is missing"),
    "no zeros": (lambda t: dict(qzeros=None), "fc1.*qzeros is missing"),
    "no integers": (lambda t: dict(qweight=None), "tensor .*fc1.* is left over|fc1.weight is missing"),
    "floats": (lambda t: dict(qweight=t["qweight"].astype(np.float32)), "qweight is float32 .*, not int32"),
    "integer scales": (lambda t: dict(scales=t["scales"].astype(np.int32)), "scales is int32"),
    "weight as well": (lambda t: dict(weight=np.ones((96, 64), np.float16)), "has both qweight and weight"),
    "fewer inputs": (lambda t: dict(qweight=t["qweight"][:4]), "scales has shape"),
    "fewer outputs": (lambda t: dict(qweight=t["qweight"][:, :8]), "scales has shape"),
    "fewer zeros": (lambda t: dict(qzeros=t["qzeros"][:, :4]), "qzeros has shape .2, 4., which 96 integers of 4 bits"),
    "another rank": (lambda t: dict(qweight=t["qweight"].reshape(-1)), "qweight is int32 .*of rank 2"),
    "empty": (lambda t: dict(qweight=t["qweight"][:0]), "qweight has shape"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_tensors_that_are_refused(tmp_path, kind):
    source, _ = write_gptq(tmp_path / "hf")
    damage, message = DAMAGED[kind]
    tensors = {
        name: load_file(source / "model.safetensors")[f"{FC1}.{name}"]
        for name in ("qweight", "qzeros", "scales", "g_idx")
    }
    edit_tensors(source, **damage(tensors))
    with pytest.raises(ValueError, match=message) as caught:
        OPTForCausalLM.from_pretrained(source)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        open_source([str(source)]).check()


@pytest.mark.parametrize("damage", ["qweight", "scales", "zeros", "order", "format", "bits", "scale"])
def test_orbax_directories_that_are_refused(tmp_path, damage):
    source, _ = write_gptq(tmp_path / "hf", desc_act=True)
    opened = open_source([str(source)])
    settings: Any = quantized.settings_for(opened.arrays, None)
    arrays = quantized.expand(opened.arrays)
    name = f"{FC1}.{damage}"
    if damage == "format":
        settings["format"] = 2
    elif damage == "bits":
        settings["bits"] = 8
    elif damage == "scale":
        arrays[f"{FC1}.weight"] = _lazy(np.ones((4, 4), np.int8))
    elif damage == "order":
        arrays[name] = _lazy(np.zeros(64, np.int32))
    else:
        array = arrays[name].load()
        arrays[name] = _lazy(array[:-1] if damage == "qweight" else array.astype(np.int64))
    with pytest.raises(ValueError, match=rf"{tmp_path}: (tensor .*|.*update opt-jax)") as caught:
        quantized.gather(arrays, tmp_path, opened.config, settings)
    assert "\n" not in str(caught.value)


def _lazy(array: np.ndarray) -> lazy_arrays.LazyArray:
    return lazy_arrays.LazyArray(array.shape, array.dtype, array.__getitem__)


# bitsandbytes' int8 -------------------------------------------------------------------------------------------


def test_int8_of_bitsandbytes(tmp_path):
    source, matrices = write_bitsandbytes(tmp_path / "hf")
    model = OPTForCausalLM.from_pretrained(source)
    floats = named_parameters(OPTForCausalLM.from_pretrained(source, dequantize=True))
    assert count_int8(model) == len(matrices) == 6
    for base, matrix in matrices.items():
        np.testing.assert_array_equal(floats[f"{base}.kernel"].get_value().T, matrix)
    layers: Any = model.model.decoder.layers
    layer = layers[0].fc1
    assert isinstance(layer, Int8Linear)
    np.testing.assert_array_equal(layer.weight.get_value() * layer.scale.get_value(), matrices[FC1])
    convert(source, tmp_path / "out")
    assert_same(OPTForCausalLM.from_pretrained(tmp_path / "out"), model)
    assert settings_of(tmp_path / "out")["recipe"]["load_in_8bit"] is True
    convert(source, tmp_path / "floats", "--dequantize", "--dtype", "float32")
    converted = named_parameters(OPTForCausalLM.from_pretrained(tmp_path / "floats"))
    np.testing.assert_array_equal(converted[KERNEL].get_value().T, matrices[FC1])


def test_what_is_refused_of_bitsandbytes(tmp_path):
    source, _ = write_bitsandbytes(tmp_path / "four", load_in_8bit=False, load_in_4bit=True)
    with pytest.raises(ValueError, match="this is a bitsandbytes checkpoint .*of which only 8 bits"):
        OPTForCausalLM.from_pretrained(source)
    source, _ = write_bitsandbytes(tmp_path / "hf")
    with pytest.raises(ValueError, match="weight_format is not 0"):
        OPTForCausalLM.from_pretrained(edit_tensors(source, weight_format=np.uint8(2)))
    edit_tensors(source, weight_format=np.uint8(0), SCB=np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"SCB is float32 \(3,\), not float32 \(96,\)"):
        OPTForCausalLM.from_pretrained(source)
    with pytest.raises(ValueError, match="fc1.weight is int8, which no weight of a model is: this is a bitsandbytes"):
        OPTForCausalLM.from_pretrained(edit_tensors(source, SCB=None, weight_format=None))
    edit_tensors(source, SCB=np.full(96, np.inf, np.float32))
    with pytest.raises(ValueError, match="the scales of .*fc1.weight are not all finite"):
        OPTForCausalLM.from_pretrained(source)


# Options ------------------------------------------------------------------------------------------------------


def test_integers_without_a_recipe_are_never_numbers(tmp_path):
    source, _ = write_gptq(tmp_path / "hf")
    content = json.loads((source / "config.json").read_text())
    del content["quantization_config"]
    (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is left over: .*but no quantization_config in config.json"):
        OPTForCausalLM.from_pretrained(source)
    convert(write_gptq(tmp_path / "gptq")[0], tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    del content["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tensor .* is .*int.*, which no weight of a model is"):
        OPTForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("method", ["gptq", "opt-jax", "bitsandbytes"])
def test_settings_beside_floats_are_noted(tmp_path, method):
    settings = {"quant_method": method, "bits": 4, "format": 1, "load_in_8bit": True}
    source = write_hf(tmp_path / "hf", TINY | {"quantization_config": settings}, hf_weights(TINY))
    with pytest.warns(UserWarning, match="no weight is quantized"):
        model = OPTForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "out")
    with warnings.catch_warnings(action="error"):
        OPTForCausalLM.from_pretrained(tmp_path / "out")


def test_options_of_from_pretrained(tmp_path):
    source, _ = write_gptq(tmp_path / "hf")
    half = OPTForCausalLM.from_pretrained(source, dtype="bfloat16")
    dtypes = {path.rpartition(".")[2]: p.get_value().dtype for path, p in named_parameters(half).items() if FC1 in path}
    assert dtypes == {"qweight": jnp.uint32, "scales": jnp.float32, "zeros": jnp.uint8, "bias": jnp.bfloat16}
    assert packed_layers(half)[KERNEL].dtype == jnp.bfloat16
    auto = OPTForCausalLM.from_pretrained(source, dtype="auto", dequantize=True)
    assert {p.get_value().dtype for p in named_parameters(auto).values()} == {jnp.dtype("float16")}
    stacked = OPTForCausalLM.from_pretrained(source, scan_layers=True, dequantize=True)
    assert named_parameters(stacked)["model.decoder.layers.fc1.kernel"].get_value().shape == (1, 64, 96)
    given: list[dict[str, Any]] = [dict(scan_layers=True), dict(adapter=tmp_path)]
    for options in given:
        with pytest.raises(
            ValueError, match="fc1.weight is quantized, and .* takes matrices of floats: pass dequantize"
        ):
            OPTForCausalLM.from_pretrained(source, **options)
    wider = CONFIG | {"ffn_dim": 128}
    config = {k: v for k, v in wider.items() if k not in ("architectures", "model_type", "dtype")}
    with pytest.raises(
        ValueError, match=r"fc1.bias has shape \(96,\)|fc1.weight has shape \(96, 64\), but .*\(128, 64\)"
    ):
        OPTForCausalLM.from_pretrained(source, ffn_dim=config["ffn_dim"])
    model, info = OPTForCausalLM.from_pretrained(
        source, ffn_dim=128, ignore_mismatched_sizes=True, output_loading_info=True
    )  # type: ignore[reportGeneralTypeIssues]
    assert (f"{FC1}.weight", (96, 64), (128, 64)) in info["mismatched_keys"]
    assert len(packed_layers(model)) == 4 and KERNEL in named_parameters(model)


def test_options_of_the_converter(tmp_path, capsys):
    source, matrices = write_gptq(tmp_path / "hf")
    convert(source, tmp_path / "half", "--dequantize")
    half = OPTForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    expected = dequantized(matrices[FC1]).astype(np.float16)
    np.testing.assert_array_equal(named_parameters(half)[KERNEL].get_value().T, expected)
    assert main(["verify", str(tmp_path / "half"), "--against", str(source), "--dequantize"]) == 0
    assert main(["verify", str(tmp_path / "half"), "--against", str(source)]) == 1
    assert "weight is float16 in" in capsys.readouterr().err
    assert main(["to-hf", str(source), str(tmp_path / "floats"), "--dequantize", "--dtype", "float32"]) == 0
    floats = load_file(tmp_path / "floats" / "model.safetensors")
    np.testing.assert_array_equal(floats[f"{FC1}.weight"], dequantized(matrices[FC1]))
    assert "quantization_config" not in (tmp_path / "floats" / "config.json").read_text()
    convert(source, tmp_path / "bf16", "--dtype", "bfloat16")  # of what is no matrix
    assert (
        named_parameters(OPTForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto"))[f"{FC1}.bias"]
        .get_value()
        .dtype
        == jnp.bfloat16
    )
    assert "quantized models, and" in refused(capsys, tmp_path / "half", tmp_path / "x", "--dequantize")
    said = refused(capsys, source, tmp_path / "x", "--adapter", str(tmp_path / "half"))
    assert "an adapter takes matrices of floats: pass --dequantize" in said
    other, _ = write_gptq(tmp_path / "other", group_size=-1)
    assert main(["verify", str(other), "--against", str(source)]) == 1
    assert "is quantized to other" in capsys.readouterr().err


def test_a_dequantized_value_that_overflows(tmp_path, capsys):
    source, _ = write_gptq(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    edit_tensors(source, scales=np.full_like(tensors[f"{FC1}.scales"], 60000))
    assert "values that float16 cannot hold" in refused(capsys, source, tmp_path / "out", "--dequantize")


def test_generation_and_scores(tmp_path):
    source, _ = write_gptq(tmp_path / "hf")
    packed, floats = (OPTForCausalLM.from_pretrained(source, dequantize=d) for d in (False, True))
    options: Any = dict(max_new_tokens=4, eos_token_id=[], do_sample=False)
    np.testing.assert_array_equal(packed.generate(IDS, **options), floats.generate(IDS, **options))
    np.testing.assert_allclose(packed.score(IDS), floats.score(IDS), rtol=1e-5, atol=1e-5)
