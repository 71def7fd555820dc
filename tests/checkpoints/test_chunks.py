"""Chunks with checksums: damage is noticed, from one bit to a missing file. Metadata beyond the limits is refused."""

import json
import os
import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from opt_jax.checkpoints import chunks, orbax
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.orbax import open_arrays, write_arrays
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.step import TrainState

RNG = np.random.default_rng(0)
ARRAYS = {
    "m.embedding": RNG.standard_normal((300, 8)).astype(np.float16),
    "m.layers.0.kernel": RNG.standard_normal((16, 40)).astype(np.float32),
    "m.zeros": np.zeros((10, 5), np.float32),
}


def write(directory: Path, arrays: dict[str, np.ndarray] = ARRAYS) -> Path:
    write_arrays(directory, {name: LazyArray(a.shape, a.dtype, a.__getitem__) for name, a in arrays.items()})
    return directory


def read(directory: Path, **options: Any) -> dict[str, np.ndarray]:
    return {name: array.load() for name, array in open_arrays(directory, **options).items()}


def same(ours: Any, theirs: Any) -> bool:
    bits = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]  # noqa: E731
    return jax.tree.structure(ours) == jax.tree.structure(theirs) and bits(ours) == bits(theirs)


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def outcomes(directory: Path, damaged: Iterator[Path], load: Callable[[], Any], expected: Any) -> Counter:
    """Count what `load` makes of each damage: "noticed", in a line that names the directory, or "harmless"."""
    counts = Counter()
    for path in damaged:
        try:
            loaded = load()
        except (ValueError, OSError) as error:
            assert str(directory) in str(error) and str(error).isprintable(), path
            counts["noticed"] += 1
        else:
            assert same(loaded, expected), f"{path} is damaged, and other values are read without an error"
            counts["harmless"] += 1
    return counts


def flipped_bits(directory: Path, per_file: int) -> Iterator[Path]:
    """Flip bits of every file, one at a time."""
    rng = random.Random(0)
    for path in files(directory):
        content = path.read_bytes()
        for bit in rng.sample(range(8 * len(content)), min(per_file, 8 * len(content))):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            yield path
        path.write_bytes(content)


def missing_files(directory: Path) -> Iterator[Path]:
    for path in files(directory):
        content = path.read_bytes()
        path.unlink()
        yield path
        path.write_bytes(content)


def file_with(directory: Path, values: np.ndarray) -> Path:
    return next(path for path in files(directory) if values.tobytes() in path.read_bytes())


# Models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1 << 20, 1200], ids=["one chunk", "many chunks"])
def model(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", request.param)
    return write(tmp_path / "params")


def test_every_flipped_bit_is_noticed_or_harmless(model):
    counts = outcomes(model, flipped_bits(model, 8), lambda: read(model), ARRAYS)
    assert counts["noticed"] > 20


def test_every_bit_of_a_chunk_counts(tmp_path):
    values = np.arange(300, dtype=np.float32)  # above 1 kB: the database keeps smaller values in its index
    directory = write(tmp_path / "params", {"a": values})
    path = file_with(directory, values)
    content = path.read_bytes()
    start = content.index(values.tobytes())
    for bit in range(8 * start, 8 * (start + values.nbytes + 4), 101):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="tensor a cannot be read: "):
            read(directory)


def test_every_missing_file_is_noticed_or_harmless(model):
    counts = outcomes(model, missing_files(model), lambda: read(model), ARRAYS)
    assert counts["noticed"] >= 3


def test_a_missing_chunk_is_an_error(model):
    """TensorStore by itself reads zeros for it."""
    base = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{model}/"}).result()
    key = min(key for key in base.list().result() if b"kernel/c/" in key)
    base.delete_range(ts.KvStore.KeyRange(key, key + b"\0")).result()
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"tensor m\.layers\.0\.kernel cannot be read: "):
            read(model, verify=verify)


def test_without_verifying_arrays_of_many_chunks_are_read_whole(tmp_path, monkeypatch):
    """So are parts that end within a chunk."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 256)
    array = np.arange(24 * 18, dtype=np.float32).reshape(24, 18)
    write_arrays(tmp_path / "out", {"a": jnp.asarray(array)})
    stored = open_arrays(tmp_path / "out", verify=False)["a"]
    for part in ((slice(0, 24), slice(0, 18)), (slice(5, 23), slice(3, 17))):
        np.testing.assert_array_equal(stored.load(part), array[part])


def test_without_verifying_damage_is_read_as_it_is(model):
    assert same(read(model, verify=False), ARRAYS)
    part = (slice(3, 8), slice(1, 19))
    ours = open_arrays(model, verify=False)["m.layers.0.kernel"].load(part)
    np.testing.assert_array_equal(ours, ARRAYS["m.layers.0.kernel"][part])
    needle = ARRAYS["m.embedding"][:2].tobytes()
    path = file_with(model, ARRAYS["m.embedding"][:2])
    path.write_bytes(path.read_bytes().replace(needle, bytes([needle[0] ^ 1]) + needle[1:]))
    with pytest.raises(ValueError, match=r"tensor m\.embedding cannot be read: .*[Dd]igest"):
        read(model)
    damaged = read(model, verify=False)
    bits = [damaged.pop("m.embedding").view(np.uint16), ARRAYS["m.embedding"].view(np.uint16)]
    assert np.argwhere(bits[0] != bits[1]).tolist() == [[0, 0]]
    assert same(damaged, {name: a for name, a in ARRAYS.items() if name != "m.embedding"})


@pytest.mark.parametrize("zarr3", [False, True])
def test_without_checksums_a_line_says_so(tmp_path, zarr3):
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=zarr3)  # Orbax's own form, as older versions wrote it
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "params", args=ocp.args.PyTreeSave(orbax.nest(ARRAYS)))
    with pytest.warns(UserWarning, match=f"^{tmp_path} has no checksums") as said:
        assert same(read(tmp_path / "params"), ARRAYS)
    assert len(said) == 1
    assert same(read(tmp_path / "params", verify=False), ARRAYS)  # without a warning
    with warnings.catch_warnings(action="ignore"):
        path = next(p for p in files(tmp_path / "params") if p.parent.name == "d")
        path.unlink()
        assert outcomes(tmp_path, iter([path]), lambda: read(tmp_path / "params"), ARRAYS)


# Training ---------------------------------------------------------------------------------------------------------


def state(step: int) -> TrainState:
    model: Any = {"layers.kernel": jnp.arange(600.0).reshape(2, 3, 100) + step, "norm": jnp.ones(3)}
    return TrainState(jnp.int32(step), model, {"m": jnp.full((3, 100), 0.5), "count": jnp.int32(step)}, jnp.bool(False))


@pytest.fixture
def run(tmp_path) -> Path:
    with Checkpoints(tmp_path / "checkpoints", keep=3, data_state=lambda step: {"step": step}) as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, state(step))
    return tmp_path / "checkpoints"


def restore(directory: Path, says: list[str], **options: Any) -> tuple[int, Any, Any]:
    shardings = jax.tree.map(lambda x: x.sharding, state(0))
    with Checkpoints(directory, keep=3, data_state=lambda step: {"step": step}) as checkpoints:
        return checkpoints.restore_newest(jax.eval_shape(state, 0), shardings, says.append, **options)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda directory: flipped_bits(directory, 3), missing_files])
def test_damage_of_a_training_checkpoint_is_noticed_or_harmless(run, damage):
    expected, says = (6, state(6), {"step": 6}), []
    counts = outcomes(run / "6", damage(run / "6"), lambda: restore(run, says), expected)
    assert counts["noticed"] >= 5
    assert not says and same(restore(run, says), expected)


def test_a_layer_is_read_without_the_others(run):
    """Of a chunk with all layers, a process that reads layer after layer would read every byte once per layer."""
    kernel = np.asarray(state(6).model["layers.kernel"])
    file = file_with(run / "6", kernel[1])
    file.write_bytes(file.read_bytes().replace(kernel[1].tobytes(), kernel[0].tobytes()))
    arrays = open_arrays(run / "6" / "params")
    np.testing.assert_array_equal(arrays["model.layers.0.kernel"].load(), kernel[0])
    with pytest.raises(ValueError, match=r"tensor model\.layers\.kernel cannot be read: "):
        arrays["model.layers.1.kernel"].load()


def test_falling_back(run):
    path = file_with(run / "6", np.asarray(state(6).model["layers.kernel"][0]))
    needle = np.float32(29).tobytes()
    path.write_bytes(path.read_bytes().replace(needle, np.float32(28).tobytes()))
    with pytest.raises(
        ValueError, match=rf"^checkpoint {run}/6 is damaged: .*--fall-back goes on from .*, 3$"
    ) as error:
        restore(run, [])
    assert str(error.value).isprintable() and sorted(p.name for p in run.iterdir()) == ["3", "6"]
    step, read_as_it_is, _ = restore(run, [], verify=False)
    assert step == 6 and np.asarray(read_as_it_is.model["layers.kernel"]).ravel().tolist().count(28) == 2
    says: list[str] = []
    assert same(restore(run, says, fall_back=True), (3, state(3), {"step": 3}))
    assert [re.sub(": .*;", ": ...;", line) for line in says] == [
        f"checkpoint {run}/6 is damaged: ...; falling back to the one before it, 3"
    ]
    with Checkpoints(run, keep=3) as checkpoints:  # step 6 can be saved again
        assert checkpoints.latest_step() == 3
        checkpoints.save(6, state(6))
    assert same(restore(run, [])[1], state(6))
    file_with(run / "6", np.asarray(state(6).model["layers.kernel"][0])).write_bytes(b"")
    restore(run, [], fall_back=True)
    aside = [f"{run.name}-damaged-6", f"{run.name}-damaged-6.2"]  # both damaged ones are kept
    assert sorted(p.name for p in run.parent.iterdir() if "damaged" in p.name) == aside
    assert path.name in {p.name for p in (run.parent / aside[0]).rglob("*")}


def test_without_a_checkpoint_before_it(run):
    for step in ("3", "6"):
        file_with(run / step, np.asarray(state(0).opt_state["m"])).write_bytes(b"")
    says: list[str] = []
    with pytest.raises(ValueError, match=f"^checkpoint {run}/3 is damaged: .*; there is none before it"):
        restore(run, says, fall_back=True)
    assert len(says) == 1 and sorted(p.name for p in run.iterdir()) == ["3", "6"]  # nothing is removed


@pytest.mark.parametrize("name", ["params", "optimizer"])
def test_a_part_of_another_checkpoint_is_noticed(run, tmp_path, name):
    """Of another step, and of another run's same step; all of their chunks are whole."""
    shutil.copytree(run, tmp_path / "other")
    with Checkpoints(tmp_path / "other", keep=3) as checkpoints:
        checkpoints.save(9, state(6))
    for other in (run / "3", tmp_path / "other" / "9"):
        shutil.rmtree(run / "6" / name)
        shutil.copytree(other / name, run / "6" / name)
        message = f"^checkpoint {run}/6 is damaged: its params and optimizer were not saved together"
        with pytest.raises(ValueError, match=message):
            restore(run, [])
    for part in ("params", "optimizer"):  # of a version that wrote no id
        content = json.loads((run / "6" / part / "_METADATA").read_text())
        (run / "6" / part / "_METADATA").write_text(json.dumps(content | {"custom_metadata": None}))
    assert restore(run, [])[0] == 6


def test_damage_of_the_state_of_the_data_is_not_blamed_on_the_data(run):
    path = run / "6" / "data" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 7}))
    with pytest.raises(ValueError, match=f"^checkpoint {run}/6 is damaged: {path} cannot be read: it does not agree"):
        restore(run, [])


# Many devices -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("spec", [(), ("a",), (None, "b"), ("b", "a"), (("a", "b"),)])
def test_replicas_share_the_chunks(tmp_path, monkeypatch, spec):
    """Each chunk is written once, and together they are the array."""
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    values = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    array = jax.device_put(values, jax.NamedSharding(mesh, jax.P(*spec)))
    shard = array.sharding.shard_shape(values.shape)
    for chunk in (shard, (1, shard[1])):
        count = np.zeros(values.shape, int)
        for index, part in chunks.on_host(chunks.chunks_of_process(array, chunk)):
            count[index] += 1
            np.testing.assert_array_equal(part, values[index])
        assert (count == 1).all()
    write_arrays(tmp_path / "params", {"x": array})
    assert same(read(tmp_path / "params"), {"x": values})


# What a foreign directory may hold ----------------------------------------------------------------------------------


METADATA = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [4],
    "data_type": "float32",
    "fill_value": 0.0,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
    "chunk_key_encoding": {"name": "default"},
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
}
ZARR2 = {
    "zarr_format": 2,
    "shape": [4],
    "chunks": [4],
    "dtype": "<f4",
    "compressor": None,
    "fill_value": None,
    "filters": None,
    "order": "C",
}


def grid(*chunk: Any) -> dict[str, Any]:
    return {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}}


def with_raw(metadata: dict[str, Any], name: str, text: str) -> bytes:
    return json.dumps(metadata | {name: "@"}).replace('"@"', text).encode()


HOSTILE = {
    "deep": b"[" * 60_000,
    "deep inside": with_raw(METADATA, "attributes", "[" * 500 + "]" * 500),
    "deep zarr2": with_raw(ZARR2, "compressor", '{"a":' * 90 + "0" + "}" * 90),
    "long": json.dumps(METADATA | {"attributes": {"x": "y" * 100_000}}).encode(),
    "no JSON": b"\xff",
    "a list": b"[]",
    "null": b"null",
    "null inside": with_raw(METADATA, "chunk_grid", "null"),
    "without a shape": json.dumps({k: v for k, v in METADATA.items() if k != "shape"}).encode(),
    "huge chunk": json.dumps(METADATA | {"shape": [2**40]} | grid(2**40)).encode(),
    "huge chunk zarr2": json.dumps(ZARR2 | {"shape": [2**40], "chunks": [2**40]}).encode(),
    "chunk beyond the shape": json.dumps(METADATA | grid(2**28)).encode(),
    "no chunk": json.dumps(METADATA | grid(0)).encode(),
    "negative": json.dumps(METADATA | {"shape": [-4]}).encode(),
    "overflow": json.dumps(METADATA | {"shape": [2**62] * 4} | grid(*[1] * 4)).encode(),
    "rank": json.dumps(METADATA | {"shape": [1] * 33} | grid(*[1] * 33)).encode(),
    "text for a shape": json.dumps(METADATA | {"shape": "4"}).encode(),
    "float for a shape": json.dumps(METADATA | {"shape": [4.0]}).encode(),
    "dtype": json.dumps(METADATA | {"data_type": "complex128"}).encode(),
    "dtype zarr2": json.dumps(ZARR2 | {"dtype": [["a", "<f4"]]}).encode(),
    "complex zarr2": json.dumps(ZARR2 | {"dtype": "<c8"}).encode(),
    "wide dtype zarr2": json.dumps(ZARR2 | {"dtype": "|S1000000000"}).encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_are_checked_before_tensorstore_sees_them(tmp_path, monkeypatch, name):
    directory, key = write(tmp_path / "params"), "x/.zarray" if "zarr2" in name else "x/zarr.json"
    ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result().write(key, HOSTILE[name]).result()
    monkeypatch.setattr(ts, "open", None)
    with pytest.raises(ValueError, match=rf"^{directory} cannot be read: {key}") as error:
        open_arrays(directory)
    assert str(error.value).isprintable() and len(str(error.value)) < 500 and "Error" not in str(error.value)


def test_an_array_in_two_formats_is_refused(tmp_path):
    directory = write(tmp_path / "params")
    name = next(iter(ARRAYS)).replace("/", ".")
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result()
    database.write(f"{name}/.zarray", json.dumps(ZARR2).encode()).result()
    with pytest.raises(ValueError, match=f"cannot be read: {name} is there twice, in zarr's formats 2 and 3"):
        open_arrays(directory)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to a device", "dangling link"])
@pytest.mark.parametrize("place", ["_METADATA", "manifest.ocdbt", "d/x"])
def test_regular_files_only(tmp_path, kind, place):
    directory = write(tmp_path / "params")
    path = directory / place
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(tmp_path / "pipe")
    targets = {"link to a pipe": tmp_path / "pipe", "link to a device": "/dev/zero", "dangling link": tmp_path / "no"}
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(targets[kind])
    with pytest.raises(ValueError, match=f"{path} is not a regular file"):
        open_arrays(directory)


def test_links_to_files_and_directories_are_followed(tmp_path):
    directory = write(tmp_path / "params")
    shutil.move(directory / "manifest.ocdbt", tmp_path / "m")
    (directory / "manifest.ocdbt").symlink_to(tmp_path / "m")
    (directory / "loop").symlink_to(directory)
    shutil.move(directory, tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").unlink()
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    assert same(read(directory), ARRAYS)


def test_a_manifest_has_a_limit(tmp_path):
    directory = write(tmp_path / "params")
    with open(directory / "manifest.ocdbt", "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="manifest.ocdbt is larger than a manifest may be"):
        open_arrays(directory)
