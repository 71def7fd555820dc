"""Writing Hugging Face directories: the safetensors library and our reader read the same back."""

import dataclasses
import errno
import json
import os
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file
from support.hf_files import TINY, VARIANTS, hf_weights, write_hf
from support.hf_output import expected, hidden, read, write
from support.processes import largest_file

from convert import to_hf, to_orbax
from convert.source import open_directory
from opt_jax.checkpoints import chunks
from opt_jax.checkpoints.arrays import LazyArray, first_difference
from opt_jax.checkpoints.formats import hf_writer, names

HEADS = {
    "lm_head": "OPTForCausalLM",
    "score": "OPTForSequenceClassification",
    "qa_outputs": "OPTForQuestionAnswering",
    "": "OPTModel",
}


# Accepted -------------------------------------------------------------------------------------------------------------


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head", HEADS)
def test_there_and_back_is_bit_exact(tmp_path, dtype, head):
    config = VARIANTS["350m"] | {"architectures": [HEADS[head]], "a field of tomorrow": {"kept": [1, None]}}
    weights = hf_weights(config, head, dtype)
    next(iter(weights.values())).view(np.uint8)[0] = 255  # NaNs whose bits must not change
    source = write_hf(tmp_path / "hf", config, weights, "bin")
    to_orbax.convert(open_directory(source), tmp_path / "orbax")
    back = write(tmp_path / "orbax", tmp_path / "back")
    assert read(back) == expected(weights)
    assert json.loads((back / "config.json").read_text()) == config
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_opens_again(tmp_path, variant):
    config = VARIANTS[variant]
    weights = hf_weights(config)
    back = write(write_hf(tmp_path / "hf", config, weights), tmp_path / "out", max_shard_size="1KB")
    assert read(back) == expected(weights)
    arrays, again = (open_directory(d).arrays for d in (tmp_path / "hf", back))
    assert arrays.keys() == again.keys()
    assert all(first_difference(arrays[path], again[path]) is None for path in arrays)


def test_layers_beyond_ten_are_in_order(tmp_path):
    config = TINY | {"num_hidden_layers": 12}
    weights = hf_weights(config)
    out = write(write_hf(tmp_path / "hf", config, weights), tmp_path / "out", max_shard_size="2KB")
    where = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = [where[f"model.decoder.layers.{i}.fc1.weight"] for i in range(12)]
    assert files == sorted(files) and len(set(files)) == 12
    assert read(out) == expected(weights)


def test_bytes_are_those_of_the_library(tmp_path):
    """With mixed dtypes, by which the library orders tensors."""
    weights = hf_weights(TINY)
    for name in list(weights)[::3]:
        weights[name] = weights[name].astype(np.float16)
    for name in list(weights)[1::3]:
        weights[name] = weights[name].astype(ml_dtypes.bfloat16)
    out = write(write_hf(tmp_path / "hf", TINY, weights), tmp_path / "out")
    save_file(weights, tmp_path / "theirs", metadata={"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_large_tensors_are_written_in_slabs(tmp_path, monkeypatch, form):
    """The size of a slab does not divide the number of rows. Each slab is reported, and written by small calls."""
    weights = hf_weights(TINY)
    source = write_hf(tmp_path / "hf", TINY, weights)
    if form == "orbax":
        to_orbax.convert(open_directory(source), tmp_path / "orbax")
        source = tmp_path / "orbax"
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 7 * 8 * 4)
    monkeypatch.setattr(hf_writer, "_WRITE_BYTES", 100)
    pwrite, sizes, reports = os.pwrite, [], []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: sizes.append(len(data)) or pwrite(fd, data, at))
    out = write(source, tmp_path / "out", progress=lambda *report: reports.append(report))
    assert read(out) == expected(weights)
    slabs = [nbytes for path, nbytes in reports if path == "model.decoder.embed_tokens.embedding"]
    assert sorted(slabs) == [6 * 32] + [7 * 32] * 6
    assert sum(nbytes for _, nbytes in reports) == sum(a.nbytes for a in weights.values())
    assert max(sizes) == 100 and sum(sizes) == (out / "model.safetensors").stat().st_size


def test_each_stored_chunk_is_read_once(tmp_path, monkeypatch):
    """Slabs here are less than a row. If each read what it needs, each chunk would be read many times."""
    weights = hf_weights(TINY)
    source = open_directory(write_hf(tmp_path / "hf", TINY, weights))
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 20)
    asked = []
    path = "model.decoder.layers.0.fc1.kernel"
    array = source.arrays[path]

    def counting(index):
        asked.append(index)
        return array.read(index)

    def write_lazily(chunk: tuple[int, int] | None, out) -> None:
        asked.clear()
        lazy = LazyArray(array.shape, array.dtype, counting, chunk)
        to_hf.convert(dataclasses.replace(source, arrays={**source.arrays, path: lazy}), out)
        assert read(out) == expected(weights)

    write_lazily((8, 16), tmp_path / "out")  # a chunk that is larger than a slab is held in memory
    assert asked == [(slice(0, 8), slice(0, 16))]
    write_lazily((2, 1), tmp_path / "small")  # two chunks fit into a slab, and are a part of a row in the file
    corners = sorted((rows.start, rows.stop, columns.start, columns.stop) for rows, columns in asked)
    assert corners == [(row, row + 4, column, column + 1) for row in (0, 4) for column in range(16)]
    write_lazily(None, tmp_path / "streamed")  # an array that is not stored in chunks is read slab by slab
    assert len(asked) == 16 and all(columns.stop - columns.start == 1 for _, columns in asked)


def test_the_disk_begins_before_all_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "_WRITEBACK_BYTES", 1000)
    begun, begin = [], hf_writer._begin_writeback
    monkeypatch.setattr(hf_writer, "_begin_writeback", lambda fd: begun.append(begin(fd)))
    out = write(write_hf(tmp_path / "hf", TINY, hf_weights(TINY)), tmp_path / "out")
    assert 2 <= len(begun) <= (out / "model.safetensors").stat().st_size // 1000
    assert all(begun) == (sys.platform == "linux")


def test_cast(tmp_path):
    config = TINY | {"torch_dtype": "float32"}
    weights = hf_weights(config)
    source = write_hf(tmp_path / "hf", config, weights)
    out = write(source, tmp_path / "out", dtype="bfloat16")
    assert read(out) == expected({name: a.astype(ml_dtypes.bfloat16) for name, a in weights.items()})
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}
    weights["model.decoder.layers.1.fc2.weight"][3, 4] = 1e6
    write_hf(source, config, weights)
    with pytest.raises(ValueError, match="layers.1.fc2.weight has values that float16 cannot hold"):
        write(source, tmp_path / "half", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_what_lies_beside_the_weights(tmp_path):
    source = write_hf(tmp_path / "hf", TINY | {"bos_token_id": 7, "eos_token_id": [2, 3]}, hf_weights(TINY))
    generation_config = write(source, tmp_path / "derived") / "generation_config.json"
    assert json.loads(generation_config.read_text()) == {
        "_from_model_config": True,
        "bos_token_id": 7,
        "eos_token_id": [2, 3],
        "pad_token_id": 1,
    }
    for name in ("vocab.json", "merges.txt", "generation_config.json", "flax_model.msgpack"):
        (source / name).write_text(f"content of {name}")
    out = write(source, tmp_path / "out")
    names = ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert all(
        (out / name).read_text() == f"content of {name}" for name in names if name[0] in "gmv" and "saf" not in name
    )
    score = TINY | {"architectures": ["OPTForSequenceClassification"]}
    out = write(write_hf(tmp_path / "score", score, hf_weights(score, "score")), tmp_path / "classifier")
    assert not (out / "generation_config.json").exists()


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("10KB", 10**4),
        ("5GiB", 5 * 2**30),
        ("1.5 kib", 1536),
        ("2TB", 2 * 10**12),
        ("12345", 12345),
        (12345, 12345),
        ("7B", 7),
        ("3mib", 3 * 2**20),
    ],
)
def test_sizes(text, nbytes):
    assert hf_writer.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", "0", 0, -3, "5 G B", "nan", "1e9", "5I", "0.1B", "٣GB"])
def test_bad_sizes(tmp_path, text):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    with pytest.raises(ValueError, match="max_shard_size .* is not a size"):
        write(source, tmp_path / "out", max_shard_size=text)
    assert not (tmp_path / "out").exists()


def test_shards_keep_to_the_limit(tmp_path):
    weights = hf_weights(TINY)
    source = write_hf(tmp_path / "hf", TINY, weights)
    out = write(source, tmp_path / "out", max_shard_size=1000)
    sizes = []
    for file in sorted(out.glob("*.safetensors")):
        data = [len(entry["data"]) for _, entry in safetensors.deserialize(file.read_bytes())]
        assert sum(data) <= 1000 or len(data) == 1
        sizes.append(sum(data))
    n = len(sizes)
    assert [p.name for p in sorted(out.glob("*.safetensors"))] == [
        f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)
    ]
    assert max(sizes) == 48 * 8 * 4  # the embedding, by itself
    assert all(a + b > 1000 for a, b in zip(sizes[2:], sizes[3:], strict=False))  # no two files would fit into one
    total = sum(a.nbytes for a in weights.values())
    assert len(list(write(source, tmp_path / "one", max_shard_size=total).glob("*.safetensors"))) == 1
    two = write(source, tmp_path / "two", max_shard_size=total - 1)
    assert [p.name for p in sorted(two.glob("model*"))][-1] == "model.safetensors.index.json"
    assert len(list(two.glob("*.safetensors"))) == 2


# Refused -------------------------------------------------------------------------------------------------------------


def test_existing_destination(tmp_path):
    weights = hf_weights(TINY)
    source = write_hf(tmp_path / "hf", TINY, weights)
    out = write(source, tmp_path / "out", dtype="float16")
    before = read(out)
    for options in ({}, {"shard_of": (1, 1)}):
        with pytest.raises(FileExistsError, match="--overwrite"):
            write(source, out, **options)
    weights["model.decoder.final_layer_norm.bias"][:] = 1e30
    write_hf(tmp_path / "large", TINY, weights)
    with pytest.raises(ValueError, match="cannot hold"):
        write(tmp_path / "large", out, dtype="float16", overwrite=True)
    assert read(out) == before and hidden(tmp_path) == []
    write(source, out, overwrite=True, max_shard_size="1KB")
    assert read(out) == expected(hf_weights(TINY)) and not (out / "model.safetensors").exists()
    write(source, out, overwrite=True, shard_of=(1, 1))
    assert read(out) == expected(hf_weights(TINY)) and (out / "model.safetensors").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    for options in ({}, {"shard_of": (1, 1)}):
        with pytest.raises(FileExistsError, match="not a model directory"):
            write(source, tmp_path / "precious", overwrite=True, **options)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("shard_of", [None, (1, 1)])
def test_full_disk(tmp_path, shard_of):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    out = write(source, tmp_path / "out", dtype="float16")
    before = read(out)
    with largest_file(8000), pytest.raises(OSError) as failed:
        write(source, out, overwrite=True, shard_of=shard_of)
    assert failed.value.errno == errno.EFBIG and str(failed.value.filename).endswith("model.safetensors")
    assert read(out) == before
    assert [p.name for p in tmp_path.rglob("*.part")] == []
    write(source, out, overwrite=True, shard_of=shard_of)
    assert read(out) == expected(hf_weights(TINY)) and hidden(tmp_path) == []


def test_too_little_space(tmp_path, monkeypatch):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    usage = type("Usage", (), {"free": 8000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for shard_of in (None, (1, 2)):
        with pytest.raises(OSError, match="MB are needed"):
            write(source, tmp_path / "out", shard_of=shard_of)
        assert not (tmp_path / "out").exists()


def test_a_worker_without_files_has_nothing_to_do(tmp_path):
    """With more workers than files, those without a file neither fail nor write."""
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    for shard_of in ((2, 2), (1, 2), (2, 2)):
        write(source, tmp_path / "out", shard_of=shard_of)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (tmp_path / "out").exists()


def test_what_is_on_disk_is_compared(tmp_path, monkeypatch):
    """If the writer loses bytes, the conversion fails before it publishes the directory."""
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    pwrite = hf_writer._pwrite
    lossy = lambda fd, data, offset: pwrite(fd, data[: -1 if offset else None], offset)  # noqa: E731
    monkeypatch.setattr(hf_writer, "_pwrite", lossy)
    for shard_of in (None, (1, 1)):
        with pytest.raises((OSError, ValueError), match=r"bytes, not|does not have"):
            write(source, tmp_path / "out", shard_of=shard_of)
        assert not (tmp_path / "out").exists()


def test_the_library_checks_each_header(tmp_path, monkeypatch):
    """A header that says what is not so is found out, also when the sizes are right."""
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    write_all = hf_writer._pwrite
    for old, new, error in (
        (b"F32", b"I32", r"was to be \('F32'.*but is \('I32'"),
        (b"fc1.bias", b"fc1.bios", "fc1.bi[ao]s was to be"),
        (b'"shape":[16]', b'"shape":[15]', "safetensors cannot read it"),
    ):
        damage = lambda fd, data, offset: write_all(fd, memoryview(bytes(data).replace(old, new, 1)), offset)  # noqa: B023, E731
        monkeypatch.setattr(hf_writer, "_pwrite", damage)
        with pytest.raises(OSError, match=f"{error}.*nothing was published"):
            write(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_every_parameter_has_its_place_in_the_order():
    """Without it, `to-hf` of that model fails when it compares tuples."""
    parts = {part for name, _ in names.TABLE.values() for part in name.split(".")} - {"decoder", "*"}
    assert parts <= set(hf_writer.ORDER)
