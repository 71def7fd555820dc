"""Lazy arrays, Orbax trees written piece by piece, and directories that appear all at once."""

import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.hf_files import TINY, hf_weights, write_hf

from convert import to_orbax
from convert.source import open_directory
from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer
from opt_jax.checkpoints import chunks, directories, orbax, pretrained
from opt_jax.checkpoints.arrays import LazyArray, empty, first_difference
from opt_jax.checkpoints.directories import new_directory
from opt_jax.checkpoints.formats import names
from opt_jax.checkpoints.hub import check_array_path, resolve
from opt_jax.checkpoints.orbax import open_arrays, pieces, write_arrays
from opt_jax.system.temporary import MARKER
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.files import run_directory

RNG = np.random.default_rng(0)


def lazy(array: np.ndarray, seen: list | None = None) -> LazyArray:
    def read(index):
        if seen is not None:
            seen.append(array[index].nbytes)
        return array[index]

    return LazyArray(array.shape, array.dtype, read)


# Lazy arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("shape", [(), (5,), (40, 70), (70, 40), (1, 33), (33, 1), (3, 4, 5)])
def test_parts_and_transposes_are_those_of_the_array(dtype, shape):
    array = RNG.standard_normal(shape).astype(dtype)
    for ours, theirs in ((lazy(array), array), (lazy(array).T, array.T), (lazy(array).T.T, array)):
        assert (ours.shape, ours.size, ours.nbytes) == (theirs.shape, theirs.size, theirs.nbytes)
        loaded = ours.load()
        assert loaded.flags.c_contiguous and loaded.dtype == dtype and loaded.tobytes() == theirs.tobytes()
        index = tuple(slice(n // 3, n - n // 4) for n in theirs.shape)
        assert ours.load(index).tobytes() == theirs[index].tobytes()
        buffer = np.zeros(2 * theirs.nbytes + 6, np.uint8)
        part = ours.load(index, buffer)
        assert part.tobytes() == theirs[index].tobytes() and np.shares_memory(part, buffer)
    assert lazy(array).load() is not array


def test_loading_reads_the_part_only():
    seen: list[int] = []
    array = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(lazy(array, seen).T.load((slice(1, None), slice(None, 2))), array.T[1:, :2])
    assert seen == [6 * 8]


@pytest.mark.parametrize("shape, piece", [((), ()), ((7,), (3,)), ((4, 6), (4, 6)), ((5, 7), (2, 3)), ((0, 3), (1, 3))])
def test_pieces_cover_an_array_once(shape, piece):
    count = np.zeros(shape, int)
    for index in pieces(shape, piece):
        count[index] += 1
        assert all(s.stop - s.start <= n for s, n in zip(index, piece, strict=True))
    assert (count == 1).all()


def test_first_difference(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64)
    array = RNG.standard_normal((9, 11)).astype(np.float32)
    array[2, 3] = np.nan
    other = array.copy()
    assert first_difference(lazy(array), lazy(other)) is None
    other[8, 10] += 1
    other[7, 4] = -array[7, 4]
    assert first_difference(lazy(array), lazy(other)) == (7, 4)
    zeros = np.zeros(3, np.float16)
    assert first_difference(lazy(zeros), lazy(-zeros)) == (0,)  # equal by ==, but with other bits
    assert first_difference(lazy(array), lazy(array.T)) == ()
    assert first_difference(lazy(array), lazy(array.astype(np.float64))) == ()
    assert first_difference(lazy(array[0, 0]), lazy(array[0, 0])) is None


# Orbax trees ----------------------------------------------------------------------------------------------------------


def tree() -> dict[str, np.ndarray]:
    return {
        "model.decoder.embed.embedding": RNG.standard_normal((300, 64)).astype(np.float16),
        "model.decoder.layers.0.fc1.kernel": RNG.standard_normal((64, 200)).astype(ml_dtypes.bfloat16),
        "model.decoder.layers.0.fc1.bias": RNG.standard_normal(200).astype(np.float32),
        "zeros": np.zeros((50, 50), np.float32),
    }


def test_what_is_written_is_read_by_us_and_by_plain_orbax(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4096)
    arrays, done = tree(), {}
    read: list[int] = []
    write_arrays(
        tmp_path / "out",
        {k: lazy(v, read) for k, v in arrays.items()},
        lambda k, n: done.update({k: done.get(k, 0) + n}),
    )
    assert done == {name: array.nbytes for name, array in arrays.items()}
    assert max(read) <= 4096 and sum(read) == sum(a.nbytes for a in arrays.values())  # in chunks, each byte once
    with ocp.StandardCheckpointer() as checkpointer:
        plain = orbax.flatten(checkpointer.restore((tmp_path / "out").absolute()))
    ours = open_arrays(tmp_path / "out")
    assert plain.keys() == ours.keys() == arrays.keys()
    for name, array in arrays.items():
        assert ours[name].dtype == plain[name].dtype == array.dtype
        assert ours[name].load().tobytes() == np.asarray(plain[name]).tobytes() == array.tobytes()
    part = (slice(100, 103), slice(7, 9))
    np.testing.assert_array_equal(
        ours["model.decoder.embed.embedding"].load(part), arrays["model.decoder.embed.embedding"][part]
    )


def test_stacked_layers_appear_one_by_one(tmp_path):
    stacked = RNG.standard_normal((3, 4, 5)).astype(np.float32)
    write_arrays(tmp_path / "out", {"m.layers.fc1.kernel": lazy(stacked), "m.norm.scale": lazy(stacked[0, 0])})
    arrays = open_arrays(tmp_path / "out")
    assert arrays.keys() == {"m.norm.scale", *(f"m.layers.{i}.fc1.kernel" for i in range(3))}
    for i in range(3):
        one = arrays[f"m.layers.{i}.fc1.kernel"]
        assert one.shape == (4, 5)
        np.testing.assert_array_equal(one.load(), stacked[i])
        np.testing.assert_array_equal(one.T.load((slice(2, 4), slice(0, 3))), stacked[i].T[2:4, :3])


def test_an_error_while_reading_comes_out_as_it_is(tmp_path):
    def broken(index):
        raise ValueError("tensor x is bad")

    arrays = {"a": lazy(np.ones(3)), "x": LazyArray((4,), np.dtype(np.float32), broken), "z": lazy(np.ones(3))}
    with pytest.raises(ValueError, match="^tensor x is bad$"):
        write_arrays(tmp_path / "out", arrays)


def test_nothing_is_written_after_an_interrupt(tmp_path, monkeypatch):
    """TensorStore finishes a write that it has begun, so the directory may be removed only afterwards."""
    loaded, interrupted, opened = [], [], ts.open
    arrays = {f"a{i}": LazyArray((4,), np.dtype("f4"), lambda _: loaded.append(1) or np.ones(4)) for i in range(5)}
    pool, main_thread = ThreadPoolExecutor(1), threading.get_ident()

    def interrupted_open(*args, **kwargs):
        def slowly():
            time.sleep(0.5)
            return opened(*args, **kwargs).result()

        future = pool.submit(slowly)
        if not interrupted:  # once: a second Ctrl-C would end the wait
            interrupted.append(True)
            signal.pthread_kill(main_thread, signal.SIGINT)
        return future

    monkeypatch.setattr(ts, "open", interrupted_open)
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out") as new:
        write_arrays(new / "params", arrays)
    assert not loaded
    pool.shutdown()
    assert not list(tmp_path.iterdir())


READ_BACK = ["a#b", "50%", "a%20b", "a|b", "a:b;c", " ünï &+'\"$~{,}", "]!", "a\nb"]
REFUSED = ["a?b", "a*b", "x[1]", "x[!a]", "a\\b", "logs:", "bad\udcff"]


@pytest.mark.parametrize("name", READ_BACK)
def test_names_of_directories_are_read_back(tmp_path, name):
    array = np.arange(3.0)
    write_arrays(tmp_path / "a b" / "params", {"x": lazy(-array)})  # "a%20b" must not be read as this name
    write_arrays(tmp_path / name / "params", {"x": lazy(array)})
    np.testing.assert_array_equal(open_arrays(tmp_path / name / "params")["x"].load(), array)


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_orbax_or_tensorstore_misread_are_refused(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    model = nnx.eval_shape(lambda: OPTForCausalLM(OPTConfig(num_hidden_layers=1), rngs=nnx.Rngs(0)))
    for place in (tmp_path / name / "out", tmp_path / "elsewhere" / name):
        for write in (
            lambda: write_arrays(place, {"x": lazy(np.arange(3.0))}),  # noqa: B023
            lambda: model.save_pretrained(place),  # noqa: B023
            lambda: to_orbax.convert(open_directory(resolve("tiny")), place),  # noqa: B023
            lambda: run_directory(str(place)),  # noqa: B023
            lambda: Checkpoints(place, keep=1),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="would be lost under a path with .*: choose another name$"):
                write()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["elsewhere"]


def test_a_link_to_such_a_name_is_refused(tmp_path):
    (tmp_path / "x[1]").mkdir()
    (tmp_path / "fine").symlink_to("x[1]")
    with pytest.raises(ValueError, match=r"fine/run: arrays would be lost .* '\[' \(in .*/x\[1\]/run\)"):
        run_directory(str(tmp_path / "fine" / "run"))


@pytest.mark.parametrize("name", ["gs://bucket/a#b", "gs://bucket/x[1]", "/gs/bucket/x", "/s3/x", "gs://b/x?y"])
def test_names_that_mean_other_objects_are_refused(name):
    with pytest.raises(ValueError, match="arrays would be lost"):
        check_array_path(name)
    check_array_path("gs://bucket/50% of a|b")


def test_a_backslash_is_not_read_as_a_slash(tmp_path):
    write_arrays(tmp_path / "a" / "b", {"x": lazy(np.arange(3.0))})
    (tmp_path / "a" / "b").rename(tmp_path / "a\\b")
    write_arrays(tmp_path / "a" / "b", {"x": lazy(np.arange(3.0))})
    with pytest.raises(ValueError, match="cannot be read: .* backslash"):
        open_arrays(tmp_path / "a\\b")


# Directories ----------------------------------------------------------------------------------------------------------


def model_at(path: Path, content: str = "old") -> Path:
    (path / "params").mkdir(parents=True)
    (path / "params" / "_METADATA").write_text(content)
    return path


def killed(path: Path, old: str | None = None, new: str | None = None) -> Path:
    """Write what a killed process has left beside its destination `path`. `old`, `new`: contents of models, or None."""
    place = path.with_name(f".{path.name}.new")
    place.mkdir()
    (place / MARKER).touch()
    for name, content in (("old", old), ("new", new)):
        if content is not None:
            model_at(place / name, content)
    return place


def test_leftovers_of_a_killed_process_are_cleaned_up(tmp_path):
    killed(tmp_path / "out", "old", "half")
    with new_directory(tmp_path / "out", overwrite=True) as new:
        # killed between two renamings: the old model is put back until the new one is complete
        assert (tmp_path / "out" / "params" / "_METADATA").read_text() == "old"
        assert list(new.iterdir()) == []
        (new / "params").mkdir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "params" / "_METADATA").exists()


def test_killed_after_publishing_the_new_one_stays(tmp_path):
    model_at(tmp_path / "out", "new")
    killed(tmp_path / "out", "old")
    with pytest.raises(FileExistsError, match="exists already"):
        with new_directory(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "params" / "_METADATA").read_text() == "new"
    with pytest.raises(KeyError):
        with new_directory(tmp_path / "out", overwrite=True):
            raise KeyError
    assert (tmp_path / "out" / "params" / "_METADATA").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_between_the_two_renamings_brings_the_old_one_back(tmp_path, monkeypatch, error):
    model_at(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise error("now")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error, match="now"):
        with new_directory(tmp_path / "out", overwrite=True) as new:
            model_at(new / "inner")
    assert (tmp_path / "out" / "params" / "_METADATA").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_old_model_with_foreign_files_in_it_is_not_replaced(tmp_path):
    write_arrays(tmp_path / "out" / "params", {"x": lazy(np.arange(3.0))})
    for name in ("notes.txt", "params/notes.txt", "params/d2"):
        (tmp_path / "out" / name).write_text("keep")
        with pytest.raises(FileExistsError, match=f"out holds {name}, which is no part of a model"):
            with new_directory(tmp_path / "out", overwrite=True):
                pass
        assert (tmp_path / "out" / name).read_text() == "keep"
        (tmp_path / "out" / name).unlink()
    with new_directory(tmp_path / "out", overwrite=True) as new:
        (new / "params").mkdir()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["params"]


@pytest.mark.parametrize(
    "name",
    [
        "vocab.json/thesis",
        "model.safetensors/thesis",
        "params/d/thesis",
        "params/checkpoint/d/thesis",
        "params/ocdbt.process_0/thesis",
        "params/ocdbt.process_0/d/notes.txt",
        f"params/d/{'0' * 32}/thesis",
    ],
)
def test_a_foreign_file_under_a_name_of_a_model_is_kept(tmp_path, name):
    write_arrays(tmp_path / "out" / "params", {"x": lazy(np.arange(3.0))})
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("keep")
    with pytest.raises(FileExistsError, match="which is no part of a model"):
        with new_directory(tmp_path / "out", overwrite=True):
            pass
    assert foreign.read_text() == "keep"


def test_two_processes_do_not_write_the_same_destination(tmp_path):
    code = (
        "import sys; from opt_jax.checkpoints.directories import new_directory\n"
        "with new_directory(sys.argv[1]) as new: (new / 'x').write_text('x'); print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    other = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert other.stdin and other.stdout
    assert other.stdout.readline() == "in\n"
    with pytest.raises(FileExistsError, match="in use"):
        with new_directory(tmp_path / "out"):
            pass
    assert (tmp_path / ".out.new" / "new" / "x").exists()  # the other process's file is still there
    other.communicate()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "x").exists()


def test_too_little_space_is_known_beforehand(tmp_path):
    directories.check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OSError, match=re.escape("1,000,000,000,000.0 MB are needed")):
        directories.check_space(tmp_path / "not" / "yet", 10**18)


def test_an_empty_directory_is_taken_and_one_with_a_tokenizer_is_named(tmp_path):
    """As scripts have it: `os.makedirs(out, exist_ok=True)`, then model and tokenizer, in either order."""
    model, tokenizer = OPTForCausalLM.from_pretrained("tiny"), OPTTokenizer.from_pretrained("tiny")
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    tokenizer.save_pretrained(tmp_path / "empty")
    assert OPTTokenizer.from_pretrained(tmp_path / "empty").encode("def f") == tokenizer.encode("def f")
    tokenizer.save_pretrained(tmp_path / "first")
    with pytest.raises(FileExistsError, match="first holds a tokenizer already: save it after the model, or pass"):
        model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "both", tokenizer=tokenizer)


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_a_part_is_read_into_the_buffer(tmp_path, monkeypatch, form):
    """Also before it is transposed: to allocate memory for each part takes longer than to read it."""
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    if form == "orbax":
        to_orbax.convert(open_directory(source), tmp_path / "orbax")
        source = tmp_path / "orbax"
    stored, _ = pretrained.open_parameters(source, OPTConfig.from_hf(TINY))
    cases = [(array, array.load()) for array in stored.values()]
    allocated: list[tuple[int, ...]] = []

    def recording(shape, dtype, buffer=None):
        if buffer is None:
            allocated.append(shape)
        return empty(shape, dtype, buffer)

    for module in ("arrays", "orbax", "formats.stored"):
        monkeypatch.setattr(f"opt_jax.checkpoints.{module}.empty", recording)
    for array, expected in cases:
        buffer = np.zeros(2 * array.nbytes, np.uint8)
        for lazy, values in ((array, expected), (array.T, expected.T)):
            part = lazy.load(None, buffer)
            assert np.shares_memory(part, buffer) and part.flags.c_contiguous
            np.testing.assert_array_equal(part, values)
    assert allocated == []


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_what_is_loaded_has_memory_of_its_own(tmp_path, monkeypatch, form, large):
    """JAX uses the memory that an array was read into, and a program may write to it (donation)."""
    if large:
        monkeypatch.setattr("opt_jax.checkpoints.arrays._HUGE_PAGES_FROM", 1)
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    if form == "orbax":
        OPTForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "orbax")
        source = tmp_path / "orbax"
    stored, _ = pretrained.open_parameters(source, OPTConfig.from_hf(TINY))
    replicated = NamedSharding(Mesh(jax.devices()[:2], "x"), PartitionSpec())
    for path in (names.EMBEDDING, "model.decoder.layers.1.fc1.kernel", "model.decoder.layers.1.fc1.bias"):
        lazy = stored[path]
        expected = lazy.load().copy()
        again = lazy.load()
        assert again.ctypes.data % 64 == 0
        again[...] = 0
        target = jax.ShapeDtypeStruct(lazy.shape, lazy.dtype, sharding=replicated)
        one, two = pretrained.read_array(lazy, target), pretrained.read_array(lazy, target)
        new = jax.jit(lambda x: x + 1, donate_argnums=0)(one)
        assert one.is_deleted()
        for shard in new.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected + 1)
        for shard in two.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected)
        np.testing.assert_array_equal(lazy.load(), expected)
