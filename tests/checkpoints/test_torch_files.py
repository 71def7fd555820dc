"""The readers of safetensors and torch files: files that torch has written, and malformed ones.

The malformed files are written by hand, one for each refusal. test_hostile.py has hundreds more.
"""

import json
import os
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.conversions import DATA, assert_same, convert, load_hf_names, refused
from support.hf_files import TINY, global_, hf_weights, state_dict_pickle, tensor_pickle, torch_zip, write_hf

from convert import to_orbax
from convert.source import open_directory
from opt_jax.checkpoints.formats.safetensors import read_safetensors
from opt_jax.checkpoints.formats.stored import Stored, locate
from opt_jax.checkpoints.formats.torch_files import read_torch


def test_files_written_by_torch(tmp_path):
    """tests/parity/test_convert_parity.py has written tests/fixtures/torch with torch itself."""
    arange = np.arange(24, dtype=np.float32)
    expected = {
        "float32": arange.reshape(4, 6),
        "float16": arange.astype(np.float16),
        "bfloat16": arange.astype(ml_dtypes.bfloat16),
        "transposed": arange.reshape(4, 6).T,
        "shared_row": arange.reshape(4, 6)[2],
        "steps": arange[1::5],
        "expanded": np.broadcast_to(arange[3:6, None], (3, 4)),
        "parameter": arange[:3],
        "scalar": np.float32(7),
        "empty": np.zeros((0, 5), np.float32),
    }
    tensors = read_torch(DATA / "torch" / "views.bin")
    assert_same({k: np.array(v) for k, v in tensors.items()}, {k: np.asarray(v) for k, v in expected.items()})
    assert not tensors["float32"].flags.writeable

    convert(DATA / "torch" / "tiny-opt", tmp_path / "out")
    out = load_hf_names(tmp_path / "out")
    golden = json.loads((DATA / "torch" / "tiny-opt" / "sums.json").read_text())
    assert {name: float(np.abs(a.astype(np.float64)).sum()) for name, a in out.items()} == pytest.approx(golden)


def test_parts_of_what_is_in_a_file(monkeypatch):
    """For all kinds of strides, a part equals that of the mapped view. Parts of rows or columns read no other byte."""
    count = 0
    preadv = os.preadv

    def counting(*args):
        nonlocal count
        done = preadv(*args)
        count += done
        return done

    monkeypatch.setattr(os, "preadv", counting)
    path, random = DATA / "torch" / "views.bin", np.random.default_rng(0)
    tensors = read_torch(path)
    for name, view in tensors.items():
        stored = locate(path, tensors.map, view).lazy()
        assert (stored.shape, stored.dtype) == (view.shape, view.dtype)
        assert stored.load().tobytes() == view.tobytes() and stored.T.load().tobytes() == view.T.tobytes()
        for _ in range(20):
            index = tuple(slice(*sorted(random.integers(0, n + 1, 2).tolist())) for n in view.shape)
            count = 0
            assert stored.load(index).tobytes() == view[index].tobytes(), (name, index)
            if name not in ("steps", "expanded"):
                assert count == view[index].nbytes, (name, index)


def test_a_transposed_matrix_is_read_in_its_columns(tmp_path, monkeypatch):
    array = np.arange(3000, dtype=np.float32).reshape(60, 50)
    (tmp_path / "x").write_bytes(array.tobytes())
    read = []
    monkeypatch.setattr(
        os,
        "preadv",
        lambda fd, buffers, at, call=os.preadv: read.append(sum(map(len, buffers))) or call(fd, buffers, at),
    )
    lazy = Stored(tmp_path / "x", 0, (50, 60), (4, 200), np.dtype(np.float32)).lazy()
    for index in ((slice(3, 7), slice(0, 60)), (slice(0, 50), slice(5, 6)), (slice(8, 9), slice(2, 40))):
        read.clear()
        part = lazy.load(index)
        np.testing.assert_array_equal(part, array.T[index])
        assert sum(read) == part.nbytes  # not all bytes from the first to the last


def test_a_file_that_is_truncated_while_it_is_read(tmp_path):
    """With mmap, reading beyond its end would kill the process."""
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    opened = open_directory(source)
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=re.escape(f"{file} is shorter than it was when it was opened")):
        to_orbax.convert(opened, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_file_that_is_replaced_by_a_pipe_while_it_is_read(tmp_path):
    """Opening a pipe would wait for a writer."""
    opened = open_directory(write_hf(tmp_path / "hf", TINY, hf_weights(TINY)))
    (file := tmp_path / "hf/model.safetensors").unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=re.escape(f"{file} is not a regular file")):
        to_orbax.convert(opened, tmp_path / "out")


# Hostile and damaged torch files --------------------------------------------------------------------------------------


def write_state(path: Path, entry: bytes, storages=None, **kwargs) -> Path:
    """A file whose state dict has one entry, "x", made by the pickle opcodes `entry`."""
    start = state_dict_pickle({})[:-1]
    pickled = start + b"(X\x01\0\0\0x" + entry + b"u."
    torch_zip(path, pickled, {"0": bytes(64)} if storages is None else storages, **kwargs)
    return path


@pytest.mark.parametrize(
    "asks_for, opcodes",
    [
        ("os.system", global_("os system") + b"(X\x0e\0\0\0touch pwned.txttR"),
        ("posix.system", b"X\5\0\0\0posixX\6\0\0\0system\x93(X\x0e\0\0\0touch pwned.txttR"),
        ("builtins.eval", global_("builtins eval") + b"(X\4\0\0\0exittR"),
        ("collections.OrderedDict.fromkeys", b"X\x0b\0\0\0collectionsX\x14\0\0\0OrderedDict.fromkeys\x93"),
        ("torch.storage._load_from_bytes", global_("torch.storage _load_from_bytes") + b"(tR"),
        ("torch.jit._script.unpickle", b"(itorch.jit._script\nunpickle\n"),
        ("numpy.core.multiarray._reconstruct", global_("numpy.core.multiarray _reconstruct")),
    ],
)
def test_pickle_that_asks_for_code_is_refused_by_name(tmp_path, capsys, monkeypatch, asks_for, opcodes):
    monkeypatch.chdir(tmp_path)
    write_state(write_hf(tmp_path / "hf", TINY, {}, "bin") / "pytorch_model.bin", opcodes)
    assert f"asks for {asks_for};" in refused(capsys, tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "pwned.txt").exists()


@pytest.mark.parametrize(
    "entry, message",
    [
        (tensor_pickle("0", "float32", 16, 0, (4, 5)), "tensor x: it reaches beyond"),
        (tensor_pickle("0", "float32", 16, 1, (16,)), "tensor x: it reaches beyond"),
        (tensor_pickle("0", "float32", 16, 0, (2, 2), (20, 1)), "tensor x: it reaches beyond"),
        (tensor_pickle("0", "float32", 17, 0, (16,)), "tensor x: its storage 0 has 64 bytes"),
        (tensor_pickle("1", "float32", 16, 0, (16,)), "tensor x: record data/1 is not in the file"),
        (tensor_pickle("../data.pkl", "float32", 1, 0, (1,)), "tensor x: record data/../data.pkl is not in the file"),
        (tensor_pickle("0", "float32", 16, -1, (4,)), "tensor x: malformed"),
        (tensor_pickle("0", "float32", 16, 0, (-4,)), "tensor x: malformed"),
        (tensor_pickle("0", "float32", 16, 3, (4,), (-1,)), "tensor x: malformed"),
        (tensor_pickle("0", "float32", 16, 0, (4,), (1, 1)), "tensor x: malformed"),
        (tensor_pickle("0", "float32", 16, 0, (10**12,), (0,)), "tensor x: shape (1000000000000,) is larger than the"),
        (
            tensor_pickle("0", "float16", 16, 0, (16,)),
            "tensor x: its storage 0 has 64 bytes, not 16 elements of float16",
        ),
        (tensor_pickle("0", "float32", 16, 0, (1,) * 33), "tensor x: malformed"),
        (b"}(N)Nu", "damaged: it puts 3 keys and values into a dict"),
        (b"}()Nu", "damaged: a dictionary has a tuple as key"),
        (b"Nr\xff\xff\xff\xff0N\x8f", "damaged: it has the instruction EMPTY_SET"),
        (b"I7\n", "entry x is a int"),
        (b"}", "entry x is a dict"),
        (b"", "the pickle in it is damaged"),
        (
            tensor_pickle("0", "float32", 16, 0, (4,))[:-2] + b"}X\x03\0\0\0neg\x88stR",
            "tensor x: torch's neg or conj bit",
        ),
        (tensor_pickle("0", "float32", 16, 0, (4,))[:-2] + b"K\1tR", "tensor x: torch's neg or conj bit"),
        (global_("torch Size") + tensor_pickle("0", "float32", 16, 0, (4,)) + b"\x85R", "damaged"),
        # BUILD tries to change the object behind a global, which later files use too.
        (global_("torch._utils _rebuild_tensor_v2") + b"N}X\x08\0\0\0__code__Ns\x86b", "damaged"),
    ],
)
def test_malformed_tensors_are_named(tmp_path, entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_torch(write_state(tmp_path / "x.bin", entry))
    tensor, data = tensor_pickle("0", "float32", 16, 2, (2, 3), (1, 4)), np.arange(16, dtype="f4").tobytes()
    good = write_state(tmp_path / "good.bin", tensor, {"0": data})
    np.testing.assert_array_equal(read_torch(good)["x"], [[2, 6, 10], [3, 7, 11]])


def test_odd_archives(tmp_path):
    import zipfile

    tensor = tensor_pickle("0", "float32", 16, 0, (16,))
    with pytest.raises(ValueError, match="big-endian"):
        read_torch(write_state(tmp_path / "a.bin", tensor, byteorder="big"))
    with pytest.raises(ValueError, match="compressed"):
        read_torch(write_state(tmp_path / "b.bin", tensor, compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "c.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match="not one written by torch.save"):
        read_torch(tmp_path / "c.bin")
    torch_zip(tmp_path / "d.bin", b"\x80\x02]q\0.", {})
    with pytest.raises(ValueError, match="holds a list"):
        read_torch(tmp_path / "d.bin")
    # torch may leave the checksums 0, so they are not compared
    path = write_state(tmp_path / "e.bin", tensor)
    raw = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):
        at = -1
        while (at := raw.find(signature, at + 1)) >= 0:
            raw[at + offset : at + offset + 4] = bytes(4)
    path.write_bytes(raw)
    assert read_torch(path)["x"].shape == (16,)


def test_pickles_of_too_many_instructions(tmp_path, monkeypatch):
    path = write_state(tmp_path / "x.bin", tensor_pickle("0", "float32", 16, 0, (16,)))
    monkeypatch.setattr("opt_jax.checkpoints.formats.unpickle._MAX_INSTRUCTIONS", 20)
    with pytest.raises(ValueError, match="more than 20 instructions"):
        read_torch(path)


def test_records_beyond_4_gb(tmp_path):
    """A sparse file: a record behind 4 GB of zeros, found by the directory's 64-bit numbers."""
    pickled = state_dict_pickle({"x": np.arange(16, dtype=np.float32)})
    torch_zip(tmp_path / "small.bin", pickled, {"x": np.arange(16, dtype=np.float32).tobytes()})
    raw = (tmp_path / "small.bin").read_bytes()
    start = struct.unpack_from("<I", raw, len(raw) - 6)[0]
    directory, far = raw[start : len(raw) - 22], 5 << 30
    last = directory.rindex(b"PK\1\2")
    (record,) = struct.unpack_from("<I", directory, last + 42)
    entry = bytearray(directory[last:])
    struct.pack_into("<H", entry, 30, 12)
    struct.pack_into("<I", entry, 42, 0xFFFFFFFF)
    entry += struct.pack("<HHQ", 1, 8, far)
    moved = raw[record:start]
    at, size, count = far + len(moved), last + len(entry), directory.count(b"PK\1\2")
    with open(tmp_path / "large.bin", "wb") as file:
        file.write(raw[:record])
        file.seek(far)
        file.write(moved + directory[:last] + entry)
        file.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, at + size, 1))
        file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    np.testing.assert_array_equal(read_torch(tmp_path / "large.bin")["x"], np.arange(16))


def safetensors_bytes(header, data: bytes = bytes(16)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize(
    "header, message",
    [
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, "tensor x (F32, shape [4]) does not fill"),
        ({"x": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, "tensor x ends at byte 32 of 16"),
        ({"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "tensor x has a malformed"),
        ({"x": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}, "tensor x has a malformed"),
        ({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "tensor x has a malformed"),
        ({"x": [1, 2]}, "tensor x has a malformed"),
        ({"x": {"dtype": "F6_E2M3", "shape": [16], "data_offsets": [0, 16]}}, "tensor x has dtype F6_E2M3"),
        ({"x": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, "tensor x has"),
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}, "tensor x overlaps another or leaves a gap"),
        ({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "xy"}, "tensor y overlaps another"),
        ({}, "16 bytes after the last tensor"),
        (b'{"x": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}, "x": {}}', "x is there twice"),
        (b"[]", "header is damaged"),
        (b"\xff\xfe", "header is damaged"),
        (b"[" * 100_000, "header is damaged"),
    ],
)
def test_damaged_safetensors_headers(tmp_path, header, message):
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors_bytes(header))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_safetensors(file)


def test_safetensors_may_be_unaligned_and_in_any_order(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [5, 9]},
        "a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
        "c": {"dtype": "F32", "shape": [], "data_offsets": [9, 13]},
        "d": {"dtype": "F16", "shape": [3, 0], "data_offsets": [13, 13]},
    }
    data = bytes(range(5)) + np.array([1.5, -2], ml_dtypes.bfloat16).tobytes() + np.float32(3).tobytes()
    (tmp_path / "x").write_bytes(safetensors_bytes(header, data))
    tensors = read_safetensors(tmp_path / "x")
    assert tensors.keys() == {"a", "b", "c", "d"} and tensors["c"] == 3 and tensors["d"].shape == (3, 0)
    np.testing.assert_array_equal(tensors["b"].astype(np.float32), [[1.5], [-2]])
