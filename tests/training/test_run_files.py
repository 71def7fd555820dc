"""The files of a run directory, local and remote (in memory, through fsspec)."""

import json

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from opt_jax import OPTTokenizer
from opt_jax.checkpoints import directories
from opt_jax.checkpoints.hub import is_remote
from opt_jax.data.tokenizers import read_tokenizer, save_tokenizer
from opt_jax.system.temporary import MARKER, write_file
from opt_jax.training.files import (
    Lines,
    begin_run,
    check_run_directory,
    read_record,
    run_directory,
    write_record,
)
from opt_jax.training.metrics import best_validation, cut_back


class Store(MemoryFileSystem):
    """The file system of `s3://` in these tests. etils reads both gs:// and s3:// through fsspec."""

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
        write_file(directory / "run.json", text.encode())
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
    cut_back(path, 3, pytest.fail)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert best_validation(path) == (3, 1)
    assert best_validation(directory / "no such file") == (None, None)


def lines_of(steps, last: bytes = b"") -> bytes:
    return b"".join(b'{"step": %d, "loss": 2.5, "val_loss": null, "batch": [1, 2]}\n' % step for step in steps) + last


def test_a_damaged_record_is_named_with_what_to_do(directory):
    path, record = directory / "run.json", {"options": {"seed": 0}, "model": {}}
    write_record(directory, record)
    assert read_record(path) == record
    valid = path.read_bytes()
    damaged = (b"", valid[: len(valid) // 2], b"\0" * len(valid), b"\xff" + valid, valid + b"}", b"[" * 100_000)
    foreign = (b"3", b"null", b"[]", b"{}", b'{"options": {}}', b'{"options": {}, "model": null}')
    for content in (*damaged, *foreign):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.json is damaged: not the JSON that train\.py wrote\. ") as error:
            read_record(path)
        assert f"mv {path} {directory / MARKER}" in str(error.value) and "\n" not in str(error.value)
    if not is_remote(directory):
        path.rename(directory / MARKER)
        (directory / "metrics.jsonl").write_bytes(b"")
        check_run_directory(directory)  # the directory still holds a run


@pytest.mark.parametrize(
    "steps, last, missing",
    [
        ([*range(1, 5), *range(6, 9), *range(11, 25)], b"", "no line for 3 of 24 steps (5, 9 to 10): their"),
        (range(1, 23), b"", "no line for 2 of 24 steps (23 to 24): their"),
        (range(1, 24), b'{"step": 24, "lo', "no line for 1 of 24 steps (24): their"),
        (range(1, 24), b"\0" * 99, "no line for 1 of 24 steps (24): their"),
        (range(3, 30), b"", "no line for 2 of 24 steps (1 to 2): their"),
        (range(2, 25, 2), b"", "no line for 12 of 24 steps (1, 3, 5, 7, 9, 11, 13, 15, ...): their"),
        ([], b"", "no line for 24 of 24 steps (1 to 24): their"),
    ],
)
def test_steps_without_a_line_are_named(directory, steps, last, missing):
    path, said = directory / "metrics.jsonl", []
    path.write_bytes(lines_of(steps, last))
    cut_back(path, 24, said.append)
    assert len(said) == 1 and f"{path} has {missing}" in said[0] and "\n" not in said[0]
    assert path.read_bytes() == lines_of(step for step in steps if step <= 24)


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 3, "lo{"step": 4, "loss": 2.5}',
        b"\0" * 40,
        b'{"step": 3, "loss": 2\0}',
        b"",
        b"a note",
        b"[3]",
        b"3",
        b'{"loss": 2.5}',
        b'{"step": "3"}',
        b'{"step": 3.0}',
        b'{"step": true}',
        b'{"step": 0}',
        b'{"step": -3}',
        b'{"step": 3, "loss": "2.5"}',
        b'{"step": 3, "loss": NaN}',
        b'{"step": 3, "loss": {}}',
        b'{"step": 3, "batch": 1}',
        b'{"step": 3, "los\xff": 2.5}',
        b"[" * 100_000,
        b'{"step": 3}\x85',
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": 3, "loss": 1e999}',
        b'{"step": 3, "val_loss": -1e999}',
        b'{"step": ' + b"9" * 400 + b"}",
        b'{"step": 3, "loss": -' + b"9" * 400 + b"}",
        b'{"step": 3, "\xed\xa0\x80": 2.5}',
    ],
)
def test_a_damaged_or_foreign_line_is_named(directory, line):
    path = directory / "metrics.jsonl"
    content = lines_of([1, 2]) + line + b"\n" + lines_of(range(4, 9))
    path.write_bytes(content)
    for read in (lambda: cut_back(path, 4, pytest.fail), lambda: best_validation(path)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:3: not a line that train\.py writes") as error:
            read()
        assert "\n" not in str(error.value)
    assert path.read_bytes() == content
    cut_back(path, 2, pytest.fail)  # lines that are cut off may be damaged
    assert path.read_bytes() == lines_of([1, 2])


@pytest.mark.parametrize("end", [b'{"step": 3}\r{"step": 4}\r', b" " * ((16 << 20) + 1)])
def test_an_end_that_no_kill_leaves_behind_is_named_and_stays(directory, end):
    path = directory / "metrics.jsonl"
    path.write_bytes(lines_of([1, 2]) + end)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3: not a line that train\.py writes"):
        cut_back(path, 4, pytest.fail)
    assert path.read_bytes() == lines_of([1, 2]) + end


def test_lines_of_two_runs_are_named(directory):
    path = directory / "metrics.jsonl"
    path.write_bytes(lines_of([1, 2, 3, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:4: step 2 comes after step 3: mend"):
        cut_back(path, 4, pytest.fail)


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
    save_tokenizer(tokenizer, directory / "tokenizer")
    again = read_tokenizer(directory / "tokenizer")
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
    check_run_directory(directory)  # as after a start that was killed before it wrote run.json
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
    """Models that are replaced are cleared too."""
    out = directory / "out"
    (out / "params").mkdir(parents=True)
    (out / "params" / "_METADATA").write_bytes(b"of another library")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="out holds params, but is not a model directory"):
            with directories.new_directory(out, overwrite):
                pass
    assert (out / "params" / "_METADATA").read_bytes() == b"of another library"

    (out / MARKER).write_bytes(b"")  # left by a process that was killed
    directories.check_destination(out, overwrite=False)
    with pytest.raises(KeyError), directories.new_directory(out) as new:
        assert names(out) == [MARKER]
        (new / "vocab.json").write_bytes(b"{}")
        raise KeyError
    assert names(out) == []

    for overwrite in (False, True):
        with directories.new_directory(out, overwrite) as new:
            assert names(out) == [MARKER]
            (new / "params").mkdir()
            (new / "params" / "_METADATA").write_bytes(b"{}")
            (new / "config.json").write_bytes(b"{}")
        assert names(out) == ["config.json", "params"]
    with pytest.raises(FileExistsError, match="exists already"), directories.new_directory(out):
        pass
    assert names(out) == ["config.json", "params"]
    (out / "params" / "notes").write_bytes(b"keep")
    with (
        pytest.raises(FileExistsError, match="holds params/notes, which is no part"),
        directories.new_directory(out, True),
    ):
        pass
    assert (out / "params" / "notes").read_bytes() == b"keep"
