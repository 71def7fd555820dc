"""Formats that are not read are named, with what to do: as a file and as a directory. And float8, which is read."""

import json
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
from support.conversions import assert_same, convert, load_hf_names, refused
from support.hf_files import TINY, hf_weights, write_hf

from opt_jax import OPTForCausalLM, named_parameters
from opt_jax.checkpoints.formats import foreign

FC1 = "model.decoder.layers.1.fc1.weight"
NAMED = [
    (
        "tf_model.h5",
        b"\x89HDF\r\n\x1a\n",
        "a TensorFlow checkpoint (HDF5), which is not read: load it with transformers 4",
    ),
    ("opt-125m.Q4_K_M.gguf", b"GGUF\3\0\0\0", "a GGUF file (llama.cpp), which is not read: take the safetensors or"),
    ("ggml-model-q4_0.bin", b"lmgg", "a GGUF file (llama.cpp), which"),
    ("model.onnx", b"\x08\x07\x12", "an ONNX graph, which is not read: take the safetensors or PyTorch files"),
    ("openvino_model.bin", b"\0", "an OpenVINO model, which"),
    ("model.tflite", b"\x1c\0\0\0TFL3", "a TensorFlow Lite model, which"),
    ("rust_model.ot", b"PK", "a rust-bert model, which"),
]


@pytest.mark.parametrize(("name", "content", "message"), NAMED)
def test_other_formats_are_named(tmp_path, capsys, name, content, message):
    source = tmp_path / "model"
    source.mkdir()
    (source / name).write_bytes(content)
    assert f"{source / name} is {message}" in refused(capsys, source / name, tmp_path / "out")
    with pytest.raises(ValueError, match=re.escape(f"{source / name} is {message}")):
        OPTForCausalLM.from_pretrained(source / name)
    for config in (None, TINY):  # llama.cpp's directories have none
        if config is not None:
            (source / "config.json").write_text(json.dumps(config))
        assert f"; {name} is {message}" in refused(capsys, source, tmp_path / "out")
        with pytest.raises(FileNotFoundError, match=re.escape(f"; {name} is {message}")):
            OPTForCausalLM.from_pretrained(source)
    convert(write_hf(source, TINY, hf_weights(TINY)), tmp_path / "out")  # beside weights that are read: no matter


def test_other_formats_under_other_names(tmp_path, capsys):
    assert foreign.hint(["config.json", "vocab.json", "model.bin", "README.md", "bottom.txt"]) == ""
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY), "bin")
    for _, content, message in NAMED[:3]:
        (source / "pytorch_model.bin").write_bytes(content)
        assert f"pytorch_model.bin: {message}" in refused(capsys, source, tmp_path / "out")
        (tmp_path / "weights").write_bytes(content)
        assert f"{tmp_path}/weights is {message}" in refused(capsys, tmp_path / "weights", tmp_path / "out")
    (source / "pytorch_model.bin").unlink()
    (source / "onnx").mkdir()
    (source / "onnx" / "decoder_model.onnx").write_bytes(b"\x08")
    assert "; onnx/decoder_model.onnx is an ONNX graph" in refused(capsys, source, tmp_path / "out")


def test_a_file_of_a_quantized_model(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    for name, content in {"config.json": TINY, "quant_config.json": {"w_bit": 4}}.items():
        (tmp_path / "hf" / name).write_text(json.dumps(content))
    file = tmp_path / "hf" / "awq_model-w4-g128.safetensors"
    file.write_bytes(b"x")
    for source in (file, file.parent):
        assert "this is an AWQ checkpoint (quant_config.json)" in refused(capsys, source, tmp_path / "out")


# float8 ---------------------------------------------------------------------------------------------------------------


def float8_weights(dtype: str, kinds: tuple[str, ...] = ("fc1.weight", "fc2.weight")) -> dict[str, np.ndarray]:
    small = getattr(ml_dtypes, dtype)
    weights = hf_weights(TINY, dtype="float16")
    return {name: array.astype(small) if name.endswith(kinds) else array for name, array in weights.items()}


@pytest.mark.parametrize(
    ("dtype", "config", "target"),
    [
        ("float8_e4m3fn", {}, "float16"),  # of the other tensors
        ("float8_e5m2", {"dtype": "bfloat16"}, "bfloat16"),
        ("float8_e4m3fn", {"torch_dtype": "float32"}, "float32"),
        ("float8_e4m3fn", {"dtype": "float8_e4m3fn"}, "float16"),
    ],
)
def test_float8_is_cast_and_noted(tmp_path, capsys, dtype, config, target):
    weights = float8_weights(dtype)
    weights[FC1][0, :2] = np.array([np.nan, ml_dtypes.finfo(weights[FC1].dtype).max], np.float32)
    source = write_hf(tmp_path / "hf", TINY | config, weights)
    message = rf"{source}: model.decoder.layers.0.fc1.kernel and 3 more tensors are {dtype}, read as {target}"
    with pytest.warns(UserWarning, match=message) as noted:
        model = OPTForCausalLM.from_pretrained(source, param_dtype="auto")
    assert len(noted) == 1
    expected = {n: a.astype(getattr(ml_dtypes, target, target)) if a.itemsize == 1 else a for n, a in weights.items()}
    kernel = named_parameters(model)["model.decoder.layers.1.fc1.kernel"].get_value()
    assert kernel.dtype == target and np.asarray(kernel).T.tobytes() == expected[FC1].tobytes()
    with warnings.catch_warnings(action="always"):
        convert(source, tmp_path / "out")
    assert capsys.readouterr().err.count("warning: ") == 1
    assert_same(load_hf_names(tmp_path / "out"), expected)


@pytest.mark.parametrize("name", [f"{FC1}_scale_inv", f"{FC1}_scale", FC1.replace("weight", "input_scale")])
def test_float8_with_scales_is_a_quantized_checkpoint(tmp_path, capsys, name):
    weights = float8_weights("float8_e4m3fn") | {name: np.ones((1, 1), np.float32)}
    said = refused(capsys, write_hf(tmp_path / "hf", TINY, weights), tmp_path / "out")
    assert f"tensor {name} is left over: no OPT model has it: such a tensor is part of a quantized checkpoint" in said


def test_float8_of_a_quantization_is_refused(tmp_path, capsys):
    config = TINY | {"quantization_config": {"quant_method": "fp8"}}
    said = refused(capsys, write_hf(tmp_path / "hf", config, float8_weights("float8_e4m3fn")), tmp_path / "out")
    assert "fc1.weight is float8_e4m3fn, which no weight of a model is: this is an FP8 checkpoint" in said
