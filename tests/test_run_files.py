"""The files of a run directory, here and on a file system that is not this machine's (in memory, by way of fsspec)."""

import json

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from opt_jax import OPTTokenizer, storage
from opt_jax.hub import is_remote
from opt_jax.temporary import MARKER
from opt_jax.training import data
from opt_jax.training.files import (
    Lines,
    begin_run,
    check_run_directory,
    run_directory,
    write_record,
    write_text,
)
from opt_jax.training.metrics import best_validation, cut_back


class Store(MemoryFileSystem):
    """What `s3://` stands for in these tests. (For gs:// and s3:// alike, etils goes by way of fsspec.)"""

    protocol = "s3"
    store = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("s3://"))


@pytest.fixture(params=["local", "s3://bucket/run"])
def directory(request, tmp_path):
    fsspec.register_implementation("s3", Store, clobber=True)
    Store.store.clear()
    Store.pseudo_dirs[:] = [""]
    path = run_directory(str(tmp_path / "run") if request.param == "local" else request.param)
    assert is_remote(path) == (request.param != "local")
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_text_is_replaced_as_a_whole(directory):
    for text in ("one\n", "zwei ü\n"):
        write_text(directory / "run.json", text)
        assert (directory / "run.json").read_bytes().decode() == text
    assert [path.name for path in directory.iterdir()] == ["run.json"]


def test_lines_are_appended_and_cut_back(directory):
    path = directory / "metrics.jsonl"
    for steps in (range(1, 4), range(4, 7)):  # two starts
        lines = Lines(path)
        for step in steps:
            lines.write(json.dumps({"step": step, "val_loss": abs(step - 4)}) + "\n")
        lines.flush()
        assert len(path.read_text().splitlines()) == steps[-1]
        lines.close()
    assert best_validation(path) == (4, 0)
    cut_back(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert best_validation(path) == (3, 1)
    assert best_validation(directory / "nothing") == (None, None)


def test_a_remote_file_is_not_written_for_every_line(directory):
    lines = Lines(directory / "metrics.jsonl")
    lines.write("one\n")
    assert (directory / "metrics.jsonl").exists() != is_remote(directory)
    lines.close()
    assert (directory / "metrics.jsonl").read_text() == "one\n"


def test_the_tokenizer_comes_back(directory):
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "added_tokens.json").write_bytes(b"of a start that was killed")
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    data.save_tokenizer(tokenizer, directory / "tokenizer")
    again = data.read_tokenizer(directory / "tokenizer")
    text = "A photo of a cat, naïvely"
    assert again(text, return_tensors=None).input_ids == tokenizer(text, return_tensors=None).input_ids


def test_places_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="nowhere://x/y: nowhere:// cannot be used here"):
        run_directory("nowhere://x/y")
    assert run_directory("runs/small") == epath.Path("runs/small")


def test_a_run_is_known_by_what_it_writes(directory):
    check_run_directory(directory)
    begin_run(directory)
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.json").write_bytes(b"{}")
    check_run_directory(directory)  # of a start that was killed before it had written run.json
    write_record(directory, {})
    assert sorted(path.name for path in directory.iterdir()) == ["run.json", "tokenizer"]
    check_run_directory(directory)
    (directory / "run.json").unlink()
    with pytest.raises(FileExistsError, match="holds tokenizer, but no run of train.py"):
        check_run_directory(directory)


def names(directory: epath.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


@pytest.mark.parametrize("directory", ["s3://bucket/models"], indirect=True)
def test_in_a_store_only_what_is_marked_is_cleared(directory):
    """And models that are replaced."""
    out = directory / "out"
    (out / "params").mkdir(parents=True)
    (out / "params" / "_METADATA").write_bytes(b"of another library")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="out holds params, but is not a model directory"):
            with storage.new_directory(out, overwrite):
                pass
    assert (out / "params" / "_METADATA").read_bytes() == b"of another library"

    (out / MARKER).write_bytes(b"")  # of a process that was killed
    storage.check_destination(out, overwrite=False)
    with pytest.raises(KeyError), storage.new_directory(out) as new:
        assert names(out) == [MARKER]
        (new / "vocab.json").write_bytes(b"{}")
        raise KeyError
    assert names(out) == []

    for overwrite in (False, True):
        with storage.new_directory(out, overwrite) as new:
            assert names(out) == [MARKER]
            (new / "params").mkdir()
            (new / "params" / "_METADATA").write_bytes(b"{}")
            (new / "config.json").write_bytes(b"{}")
        assert names(out) == ["config.json", "params"]
    with pytest.raises(FileExistsError, match="exists already"), storage.new_directory(out):
        pass
    assert names(out) == ["config.json", "params"]
    (out / "params" / "notes").write_bytes(b"keep")
    with pytest.raises(FileExistsError, match="holds params/notes, which is no part"), storage.new_directory(out, True):
        pass
    assert (out / "params" / "notes").read_bytes() == b"keep"
