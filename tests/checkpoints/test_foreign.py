"""Formats that are not read are named, with what to do: as a file and as a directory."""

import json
import re

import pytest
from support.conversions import convert, refused
from support.hf_files import TINY, hf_weights, write_hf

from opt_jax import OPTForCausalLM
from opt_jax.checkpoints.formats import foreign

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
    for name, content in {"config.json": TINY, "quantize_config.json": {"bits": 4}}.items():
        (tmp_path / "hf" / name).write_text(json.dumps(content))
    file = tmp_path / "hf" / "gptq_model-4bit-128g.safetensors"
    file.write_bytes(b"x")
    for source in (file, file.parent):
        assert "this is a GPTQ checkpoint (quantize_config.json)" in refused(capsys, source, tmp_path / "out")
