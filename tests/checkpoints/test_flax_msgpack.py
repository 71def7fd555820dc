"""`flax_model.msgpack`, as transformers 4 wrote it: the bits of the .bin of the same model, or one line of error."""

import json
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import save_file
from support.conversions import assert_same, convert, load_hf_names, refused
from support.hf_files import TINY, VARIANTS, flax_arrays, hf_weights, write_hf
from support.hostile_flax import packed, packed_array

import opt_jax
from convert.__main__ import main
from opt_jax import OPTForCausalLM, named_parameters
from opt_jax.checkpoints import hub
from opt_jax.checkpoints.formats.flax_msgpack import read_flax

FILE = "flax_model.msgpack"


def write(path: Path, tree: dict) -> Path:
    path.write_bytes(serialization.msgpack_serialize(tree))
    return path


@pytest.mark.parametrize(
    ("variant", "cls", "form", "dtype"),
    [
        ("125m", "OPTForCausalLM", "flax", "float16"),
        ("350m", "OPTForCausalLM", "flax-sharded", "bfloat16"),
        ("untied", "OPTForCausalLM", "flax", "float32"),
        ("no-final-norm", "OPTModel", "flax-sharded", "float16"),
        ("350m", "OPTModel", "flax", "bfloat16"),
    ],
)
def test_the_bits_are_those_of_the_bin(tmp_path, capsys, variant, cls, form, dtype):
    config = VARIANTS[variant] | {"architectures": [cls]}
    weights = hf_weights(config, "" if cls == "OPTModel" else "lm_head", dtype)
    weights[next(name for name in weights if "layers.1.fc1.weight" in name)].view(np.uint8)[:] = 255  # NaNs
    torch, flax = write_hf(tmp_path / "bin", config, weights, "bin"), write_hf(tmp_path / "flax", config, weights, form)
    assert ("decoder/embed_tokens/embedding" in flax_arrays(weights)) == (cls == "OPTModel")
    expected = load_hf_names(convert(torch, tmp_path / "from-bin"))
    assert_same(load_hf_names(convert(flax, tmp_path / "from-flax")), expected)
    ours, theirs = (getattr(opt_jax, cls).from_pretrained(path, param_dtype="auto") for path in (flax, torch))
    params = named_parameters(theirs)
    for path, param in named_parameters(ours).items():
        assert np.asarray(param.get_value()).tobytes() == np.asarray(params[path].get_value()).tobytes(), path
    capsys.readouterr()
    assert main(["verify", str(flax), "--against", str(torch), "--quiet"]) == 0
    assert main(["to-hf", str(flax), str(tmp_path / "hf")]) == main(["to-hf", str(torch), str(tmp_path / "hf2")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (tmp_path / "hf2" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["inspect", str(flax)]) == 0
    files = "2 files" if form == "flax-sharded" else "1 file"
    out, err = capsys.readouterr()
    assert f": Hugging Face Flax msgpack, {files}\n" in out and "model.decoder.layers.0-1.fc1.weight" in out and not err


def test_formats_in_one_directory_are_read_in_order(tmp_path):
    formats = ("safetensors", "bin", "flax", "flax-sharded")
    source = tmp_path / "hf"
    for i, form in reversed([*enumerate(formats)]):
        weights = {name: np.full_like(array, i) for name, array in hf_weights(TINY).items()}
        write_hf(source, TINY, weights, form)
        out = load_hf_names(convert(source, tmp_path / form))
        assert {array.flat[0] for array in out.values()} == {i}, form
    assert all(hub.is_model_file(path.name) for path in source.iterdir())  # --overwrite replaces them


def test_safetensors_of_the_flax_classes(tmp_path):
    """What their save_pretrained(safe_serialization=True) wrote: the same names, with dots."""
    weights = hf_weights(TINY)
    source = write_hf(tmp_path / "hf", TINY, weights)
    arrays = {name.replace("/", "."): array.copy("C") for name, array in flax_arrays(weights).items()}
    save_file(arrays, source / "model.safetensors", metadata={"format": "flax"})
    assert_same(load_hf_names(convert(source, tmp_path / "out")), weights)


def test_the_final_layer_norm_that_the_13b_lacks(tmp_path, capsys):
    weights = {name: array for name, array in hf_weights(TINY).items() if "decoder.final_layer_norm" not in name}
    for form in ("flax", "flax-sharded"):
        source = write_hf(tmp_path / form, TINY, weights, form)
        said = refused(capsys, source, tmp_path / "out")
        assert f"{source}/flax_model.msgpack" in said and "model/decoder/final_layer_norm is missing, as in" in said
        assert "facebook/opt-13b: convert from the PyTorch files" in said
        with pytest.raises(ValueError, match="convert from the PyTorch files"):
            OPTForCausalLM.from_pretrained(source)
    source = write_hf(tmp_path / "bin", TINY, weights, "bin")
    assert "tensor model.decoder.final_layer_norm.bias is missing" in refused(capsys, source, tmp_path / "out")


def test_arrays_in_chunks(tmp_path, monkeypatch):
    """Any part of a matrix, whatever its chunks; and no byte outside of a run of elements is read."""
    matrix = np.arange(35 * 7, dtype=np.float32).reshape(35, 7)
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read.append(n := preadv(fd, buffers, at)) or n)
    for chunk in (4, 28, 100, 36 * 28 // 2, 1 << 30):  # bytes: one element, one row, ...
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
        array = read_flax(write(tmp_path / "x", {"a": {"b": matrix, "c": np.ones(3, np.int8)}}))["a/b"]
        for rows, columns in (
            ((0, 35), (0, 7)),
            ((3, 30), (2, 5)),
            ((34, 35), (6, 7)),
            ((3, 3), (0, 7)),
            ((3, 9), (7, 7)),
        ):
            read.clear()
            part = array.load((slice(*rows), slice(*columns)))
            np.testing.assert_array_equal(part, matrix[slice(*rows), slice(*columns)])
            assert sum(read) == part.nbytes


def test_short_arrays_have_headers_of_their_own(tmp_path):
    """msgpack writes extensions of 1, 2, 4, 8 and 16 bytes in another way: a bfloat16 of shape (1,) has 16."""
    arrays = {str(n): np.arange(n, dtype=ml_dtypes.bfloat16) for n in range(5)} | {"": np.full((), 3, np.float64)}
    assert packed_array((1,), "bfloat16", b"\0\0")[0] == 0xD8
    assert_same({name: array.load() for name, array in read_flax(write(tmp_path / "x", arrays)).items()}, arrays)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Of two chunks with holes, 6 GB together, nothing is read but the structure and the rows that are asked for."""
    rows, columns, item, first = 50_272, 30_720, 4, 50_272 * 30_720 // 2 + 1000  # the second chunk begins amid a row
    with open(tmp_path / FILE, "wb") as file:

        def bytes_of(length: int) -> None:
            inner = b"\x93" + packed([length]) + packed("float32") + b"\xc6" + (length * item).to_bytes(4, "big")
            file.write(b"\xc9" + (len(inner) + length * item).to_bytes(4, "big") + b"\1" + inner)
            file.seek(length * item - 8, os.SEEK_CUR)
            file.write(np.array([1, length], np.float32).tobytes())

        file.write(b"\x81" + packed("w") + b"\x83" + packed("__msgpack_chunked_array__") + b"\xc3")
        file.write(packed("shape") + packed({"0": rows, "1": columns}) + packed("chunks") + b"\x82")
        file.write(packed("0"))
        bytes_of(first)
        file.write(packed("1"))
        bytes_of(rows * columns - first)
    assert (tmp_path / FILE).stat().st_size > 6e9
    tracemalloc.start()
    array = read_flax(tmp_path / FILE)["w"]
    row, column = divmod(first, columns)
    around = array.load((slice(row, row + 2), slice(0, columns)))
    last = array.load((slice(rows - 10_000, rows), slice(columns - 2, columns)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert around[0, column - 2 : column + 1].tolist() == [1, np.float32(first), 0] and (around[1] == 0).all()
    assert last[-1].tolist() == [1, np.float32(rows * columns - first)] and not last[:-1].any()
    assert peak < 4 * around.nbytes + (1 << 20), peak


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>", "msgpack's code 0x3c is not a map"),
        (b"\x81\xa1a", "entry a: the file is truncated at byte 3"),
        (b"\xdf\xff\xff\xff\xff\xa1a", "more entries, than a checkpoint has"),
        (b"\x81\xa1a" * 100, "more maps in maps"),
        (b"\x82\xa1a\x80\xa1a\x80", "the key a is there twice"),
        (b"\x81\xa1a\x80\x00", "1 bytes follow after its end"),
        (b"\x81\xa1a\x05", "entry a is 5, not an array"),
        (b"\x81\xa1a\xc0", "entry a: msgpack's code 0xc0 is not an array"),
        (b"\x81\x05\x80", "msgpack's code 0x05 is not a text"),
        (b"\x81\xd9\x65" + b"x" * 101 + b"\x80", "a key or the name of a dtype has 101 bytes"),
        (
            b"\x82\xa3a/b" + packed_array((), "int8", b"\0") + b"\xa1a\x81\xa1b" + packed_array((), "int8", b"\0"),
            "twice",
        ),
        (b"\x81\xa1a" + packed_array((2,), "int8", b"\0\0", 3), "entry a: it is an extension of type 3"),
        (b"\x81\xa1a" + packed_array((3,), "int8", b"\0\0"), "entry a: int8 of shape (3,) does not fill its 2 bytes"),
        (b"\x81\xa1a" + packed_array((2,), "object", b"\0\0"), "entry a: dtype object is not supported"),
        (b"\x81\xa1a" + packed_array((2,), "int8", b"\0\0")[:-1], "truncated"),
        (b"\x81\xa1a\xc7\xff" + packed_array((2,), "int8", b"\0\0")[2:], "but the array at 261"),
        (b"\x81\xa1a\x81\xb9__msgpack_chunked_array__\xc3", "entry a: an array in chunks is not described by"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, message):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_flax(tmp_path / FILE)
    said = str(error.value)
    assert str(tmp_path / FILE) in said and message in said and "\n" not in said, said


def test_truncated_at_every_place(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    path = write(tmp_path / FILE, traverse_util.unflatten_dict(flax_arrays(hf_weights(TINY, dtype="float16")), sep="/"))
    content = path.read_bytes()
    for length in (*range(200), *range(200, len(content), 97), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=str(path)):
            read_flax(path)


def test_shards_that_contradict_the_index(tmp_path, capsys):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY), "flax-sharded")
    index = source / "flax_model.msgpack.index.json"
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))
    write(source / first, {})  # as transformers wrote where the first array is larger than a shard
    assert f"{source}/{first}: tensor model/decoder/" in refused(capsys, source, tmp_path / "out")
    (source / second).unlink()
    assert f"{source}/{second} is missing, but {index.name} names it" in refused(capsys, source, tmp_path / "out")
