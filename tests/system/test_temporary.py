"""We never remove foreign files, even with the names of temporary ones, and never write through links."""

import fcntl
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from etils import epath
from support.hf_files import TINY, hf_weights, write_hf
from support.hf_output import expected, files_of, read, write
from support.processes import largest_file

from convert.__main__ import main
from opt_jax import OPTTokenizer
from opt_jax.checkpoints.directories import new_directory
from opt_jax.checkpoints.download import _fetch
from opt_jax.data.tokens import write_tokens
from opt_jax.system import temporary
from opt_jax.system.temporary import MARKER, TemporaryPlace, new_file
from opt_jax.training import plot
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.files import begin_run, check_run_directory, write_record


def precious(directory: Path) -> Path:
    """Write a directory that belongs to somebody else."""
    (directory / "sub").mkdir(parents=True)
    (directory / "thesis.tex").write_text("years of work")
    (directory / "sub" / "notes").write_text("more of it")
    return directory


def content(directory: Path) -> dict[str, str | bytes]:
    """Path -> content of the files below, and target of the links."""
    return {
        str(path.relative_to(directory)): f"-> {os.readlink(path)}" if path.is_symlink() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def linked(path: Path) -> None:
    """A link to an existing directory elsewhere."""
    path.symlink_to(precious(path.parent / "precious"))


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def foreign(path: Path) -> None:
    precious(path)


def foreign_by_our_names(path: Path) -> None:
    """A directory with our names inside, but without the marker that makes it ours."""
    for name in ("new", "old"):
        precious(path / name)


def foreign_and_ours(path: Path) -> None:
    (precious(path) / MARKER).touch()


def with_a_linked_marker(path: Path) -> None:
    path.mkdir()
    (path.parent / "file").write_text("keep")
    (path / MARKER).symlink_to(path.parent / "file")


def with_a_link_in_it(path: Path) -> None:
    path.mkdir()
    (path / MARKER).touch()
    for name in ("new", "old", "model.safetensors"):
        (path / name).symlink_to(path.parent)


OBSTACLES = [linked, dangling, foreign, foreign_by_our_names, foreign_and_ours, with_a_linked_marker, with_a_link_in_it]
COMMANDS = {
    ".out.new": [["tiny", "out"], ["tiny", "out", "--overwrite"], ["to-hf", "tiny", "out"]],
    ".out.shards": [["to-hf", "tiny", "out", "--shard-of", "1/2"], ["to-hf", "tiny", "out", "--shard-of", "1/1"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("name", COMMANDS)
def test_the_converter_clears_only_its_own(tmp_path, monkeypatch, capsys, name, obstacle):
    monkeypatch.chdir(tmp_path)
    obstacle(tmp_path / name)
    before = content(tmp_path)
    for command in COMMANDS[name]:
        assert main(command) == 1
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1, error
        assert re.search("is a symbolic link to|which opt-jax did not put there", error), error
    assert content(tmp_path) == before


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_conversion_alone_leaves_foreign_shards_in_peace(tmp_path, obstacle):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    obstacle(tmp_path / ".out.shards")
    before = content(tmp_path)
    assert read(write(source, tmp_path / "out")) == expected(hf_weights(TINY))
    (tmp_path / "out").rename(tmp_path / "x")
    assert content(tmp_path).items() >= before.items() and len(files_of(tmp_path / "x")) == 3


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("obstacle", [linked, dangling])
def test_a_destination_that_is_a_link_is_refused(tmp_path, capsys, obstacle, slash):
    obstacle(tmp_path / "out")
    before = content(tmp_path)
    for command in ([], ["to-hf"]):
        for more in ([], ["--overwrite"]):
            assert main([*command, "tiny", f"{tmp_path / 'out'}{slash}", *more]) == 1
            assert "is a symbolic link to" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="is a symbolic link to"):
        with new_directory(f"{tmp_path / 'out'}{slash}", overwrite=True):
            pass
    assert content(tmp_path) == before


def test_links_to_read_from_and_links_above_are_allowed(tmp_path):
    source = write_hf(tmp_path / "disk" / "hf", TINY, hf_weights(TINY))
    (tmp_path / "data").symlink_to("disk")
    (tmp_path / "linked").mkdir()
    for file in source.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    for name in ("linked", "data/hf"):
        write(tmp_path / name, tmp_path / "data" / f"of-{name[:4]}")
    assert read(tmp_path / "disk" / "of-data") == read(tmp_path / "disk" / "of-link") == expected(hf_weights(TINY))


def test_an_interrupted_removal_leaves_the_marker_until_last(tmp_path, monkeypatch):
    place = TemporaryPlace(tmp_path / "place", "new|old")
    with place.locked():
        (place.path / "new").mkdir()
        (place.path / "old").mkdir()
        (place.path / "new" / "file").touch()
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", lambda *_: (_ for _ in ()).throw(OSError("no")))
            place.remove()
        assert os.listdir(place.path) == [MARKER]
        with pytest.raises(FileExistsError, match="is in use: another process is writing"):
            with place.locked(wait=False):
                pass
    with place.locked(wait=False):
        place.remove()
    assert os.listdir(tmp_path) == []


# Files ----------------------------------------------------------------------------------------------------------------


def write_new(path: Path) -> None:
    with new_file(path) as file:
        file.write(b"new")


def write_array(path: Path) -> None:
    (path.parent / "text.txt").write_text("a text")
    write_tokens([path.parent / "text.txt"], path, OPTTokenizer.from_pretrained("tiny"), "tiny")


def draw(path: Path) -> None:
    (path.parent / "run").mkdir(exist_ok=True)
    (path.parent / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    plot.plot_runs([path.parent / "run"], path)


def test_a_temporary_name_is_not_what_an_error_names(tmp_path):
    path = tmp_path / ("x" * 230)  # the name is allowed, but the longer temporary one is not
    with pytest.raises(OSError, match="choose a shorter name") as error:
        write_new(path)
    assert error.value.filename == str(path)


WRITERS = [write_new, write_array, draw]


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_files_are_not_written_through_links(tmp_path, writer: Callable[[Path], None]):
    (tmp_path / "precious").write_text("keep")
    for name in ("precious", "nowhere"):
        (tmp_path / "out").symlink_to(name)
        with pytest.raises(FileExistsError, match=f"out is a symbolic link to {name}"):
            writer(tmp_path / "out")
        (tmp_path / "out").unlink()
    for name in ("out.tmp", "out.part", f"out.opt-jax-{1:032x}.part"):
        (tmp_path / name).symlink_to("precious")
    writer(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "keep"
    assert (tmp_path / "out").read_bytes() and sum(path.is_symlink() for path in tmp_path.iterdir()) == 3


@pytest.mark.parametrize("writer", WRITERS)
def test_of_unfinished_files_only_our_own_go(tmp_path, writer: Callable[[Path], None]):
    (tmp_path / f"out.opt-jax-{1:032x}.part").write_text("of a process that was killed")
    keep = ["out.tmp", "out.part", "out.opt-jax-1.part", f"about.opt-jax-{1:032x}.part"]
    for name in keep:
        (tmp_path / name).write_text("keep")
    writer(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir() if "part" in path.name or "tmp" in path.name} == {*keep}
    assert {(tmp_path / name).read_text() for name in keep} == {"keep"}


def test_a_file_that_another_process_writes_is_refused(tmp_path):
    with new_file(tmp_path / "out") as file:
        with pytest.raises(FileExistsError, match="another process is writing this file now"):
            write_array(tmp_path / "out")
        file.write(b"ours")
    assert (tmp_path / "out").read_bytes() == b"ours"
    with pytest.raises(KeyError):
        with new_file(tmp_path / "out"):
            raise KeyError
    with pytest.raises(IsADirectoryError):
        write_new(tmp_path)
    assert (tmp_path / "out").read_bytes() == b"ours" and len(files_of(tmp_path)) == 2


@pytest.mark.parametrize("writer", WRITERS)
def test_a_pipe_is_not_replaced(tmp_path, writer: Callable[[Path], None]):
    os.mkfifo(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out is a pipe or a device"):
        writer(tmp_path / "out")
    assert (tmp_path / "out").is_fifo() and [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_two_files_that_begin_in_the_same_moment_see_each_other(tmp_path, monkeypatch):
    """A writer locks the directory from the moment when it looks for others until it has the lock of its file."""

    def is_locked(path: Path) -> bool:
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    looked = []
    look = temporary.unfinished_files
    monkeypatch.setattr(temporary, "unfinished_files", lambda *a: looked.append(is_locked(tmp_path)) or look(*a))
    with new_file(tmp_path / "out"):
        (part,) = look(tmp_path)
        assert looked == [True] and is_locked(part) and not is_locked(tmp_path)
        with pytest.raises(FileExistsError, match="another process is writing this file now"):
            write_new(tmp_path / "out")
        assert part.exists() and not is_locked(tmp_path)


def test_tokenize_keeps_a_foreign_file_beside_its_array(tmp_path):
    (tmp_path / "out.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"out\.json: not what opt-jax tokenize writes"):
        write_array(tmp_path / "out")
    (tmp_path / "out.json").unlink()
    (tmp_path / "out.json").symlink_to("precious")
    with pytest.raises(FileExistsError, match=r"out\.json is a symbolic link"):
        write_array(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "text.txt"]
    (tmp_path / "out.json").unlink()
    write_array(tmp_path / "out")
    write_array(tmp_path / "out")


def test_tokenize_keeps_an_array_that_it_did_not_write(tmp_path):
    (tmp_path / "out").write_text("my own array")
    with pytest.raises(FileExistsError, match=r"out is there already, without the out\.json"):
        write_array(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "my own array" and not (tmp_path / "out.json").exists()
    (tmp_path / f"out.json.opt-jax-{1:032x}.part").write_text("of a process killed between the two files")
    write_array(tmp_path / "out")
    assert (tmp_path / "out.json").exists()


def test_a_tokenizer_is_not_saved_through_links(tmp_path):
    """Files in the hub's cache are links to blobs, which must not be changed."""
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    (tmp_path / "blob").write_text("keep")
    for name in ("vocab.json", "tokenizer.json", "special_tokens_map.json"):
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / name).symlink_to("../blob")
        with pytest.raises(FileExistsError, match=f"{name} is a symbolic link"):
            tokenizer.save_pretrained(tmp_path / "snapshot")
        assert len(list((tmp_path / "snapshot").iterdir())) == 1 and (tmp_path / "blob").read_text() == "keep"
        (tmp_path / "snapshot" / name).unlink()


def test_a_tokenizer_is_saved_as_whole_files(tmp_path):
    """Writing to a pipe would wait for ever. After an error, half of merges.txt would be another tokenizer."""
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(FileExistsError, match="json is a pipe or a device"):
        tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with largest_file(20_000), pytest.raises(OSError, match="File too large .* bytes are needed"):
        tokenizer.save_pretrained(tmp_path / "full")
    assert all(path.stat().st_size < 20_000 for path in (tmp_path / "full").iterdir())
    assert not list((tmp_path / "full").glob("*.part"))


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["checkpoints", "best", "tokenizer", "metrics.jsonl", "run.json", "model", ".model.new"]
)
def test_a_run_directory_holds_no_links_where_a_run_writes(tmp_path, name):
    write_record(epath.Path(tmp_path), {})
    check_run_directory(epath.Path(tmp_path))
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/")
    with pytest.raises(FileExistsError, match=f"{name} is a symbolic link to /"):
        check_run_directory(epath.Path(tmp_path))


@pytest.mark.parametrize("name", ["checkpoints", "best", "tokenizer", "metrics.jsonl", "model"])
def test_a_run_does_not_begin_over_foreign_files(tmp_path, name):
    precious(tmp_path / name)
    with pytest.raises(FileExistsError, match=f"holds {name}, but no run of train.py: choose another --output"):
        check_run_directory(epath.Path(tmp_path))


def test_a_run_begins_beside_foreign_files_and_after_a_kill(tmp_path):
    output = epath.Path(tmp_path)
    (tmp_path / "README").touch()
    check_run_directory(output)
    begin_run(output)
    (tmp_path / "tokenizer").mkdir()  # as a start that was killed before it wrote run.json
    check_run_directory(output)
    begin_run(output)
    write_record(output, {})
    assert sorted(os.listdir(tmp_path)) == ["README", "run.json", "tokenizer"]
    check_run_directory(output)
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="holds model, but no"):  # at the start, and not when training ends
        check_run_directory(output)


@pytest.mark.parametrize("name", ["7", "7.orbax-checkpoint-tmp-1"])
def test_foreign_directories_do_not_count_as_checkpoints(tmp_path, name):
    precious(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="is a symbolic link"):
        Checkpoints(tmp_path / "checkpoints", keep=1)
    (tmp_path / "checkpoints" / name).unlink()
    if name.isdecimal():
        precious(tmp_path / "checkpoints" / name)
        with pytest.raises(FileExistsError, match="is not a checkpoint, but has the name of one"):
            Checkpoints(tmp_path / "checkpoints", keep=1)
    precious(tmp_path / "checkpoints" / "notes")
    if name.isdecimal():
        (tmp_path / "checkpoints" / name).rename(tmp_path / "checkpoints" / "kept")
    before = content(tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep=1):
        assert jax.process_count() == 1
    assert content(tmp_path) == before


def test_a_checkpoint_with_a_foreign_file_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("opt_jax.training.checkpoints._items", lambda state: {"params": state, "optimizer": state})
    state: Any = {"x": jax.numpy.zeros(3)}
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state)
            checkpoints._wait()
            if step == 1:
                precious(tmp_path / "checkpoints" / "1" / "eval")
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "3"]


@pytest.mark.parametrize("link, refused", [("symlink_to", "a symbolic link"), ("hardlink_to", "a hard link")])
def test_a_download_is_not_continued_through_a_link(tmp_path, link, refused):
    file = SimpleNamespace(rfilename="model.safetensors", size=9, lfs=SimpleNamespace(sha256="a" * 64))
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (tmp_path / "precious").write_text("keep")
    getattr(blobs / f"{'a' * 64}.opt-jax.incomplete", link)(tmp_path / "precious")
    with pytest.raises(FileExistsError, match=f"incomplete is {refused}"):
        _fetch("http://localhost:1/", file, blobs, threading.Event())
    assert (tmp_path / "precious").read_text() == "keep"
