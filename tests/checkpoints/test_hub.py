"""From a model's name to its directory, without a hub; with one: test_download.py."""

import json
import os
from pathlib import Path

import pytest
from etils import epath

from convert.__main__ import main as convert
from opt_jax import OPTTokenizer
from opt_jax.checkpoints import hub
from opt_jax.checkpoints.directories import new_directory
from opt_jax.cli import main
from opt_jax.training.files import run_directory


def test_directories(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/model") == Path("org/model")  # a directory comes before the hub
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org") == tmp_path / "org"
    with pytest.raises(ValueError, match="revision='main' is for models on the hub"):
        hub.resolve(tmp_path, revision="main")
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="is a file; give the directory"):
        hub.resolve(tmp_path / "model.safetensors")


def test_home_is_where_is_written_and_where_is_read(tmp_path, monkeypatch):
    """`~` is expanded here: a shell leaves that of --output=~/x alone, and a program has no shell."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    OPTTokenizer.from_pretrained("tiny").save_pretrained("~/saved")
    OPTTokenizer.from_pretrained("~/saved")
    with new_directory("~/model") as new:
        (new / "config.json").write_text("{}")
    assert hub.resolve("~/model") == tmp_path / "home" / "model"
    assert run_directory("~/run") == epath.Path(tmp_path / "home" / "run")
    (tmp_path / "a.txt").write_text("text\n")
    assert main(["tokenize", "a.txt", "--output=~/a.npy"]) == 0
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["a.npy", "a.npy.json", "model", "saved"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "home"]


def test_places_that_nobody_has_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text\n")
    for name in ("~nobody-of-this-name/x", "gs://bucket/x"):
        for write in (OPTTokenizer.from_pretrained("tiny").save_pretrained, hub.disk_path):
            with pytest.raises(ValueError, match=f"{name}: (no user of this name|this can only be written to a disk)"):
                write(name)
        assert main(["tokenize", "a.txt", f"--output={name}.npy"]) == 1
        assert f"error: {name}.npy: " in capsys.readouterr().err
    assert convert(["~nobody-of-this-name/x", "out"]) == convert(["tiny", "~nobody-of-this-name/x"]) == 1
    assert capsys.readouterr().err.count("error: ~nobody-of-this-name/x: no user") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_empty_name_is_not_the_current_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "a.pt").write_text("a checkpoint")
    monkeypatch.chdir(tmp_path)
    for command, words in (
        (convert, ["metaseq", "", "out"]),
        (convert, ["tiny", ""]),
        (convert, ["inspect", ""]),
        (main, ["tokenize", "", "--output", "out.npy"]),
        (main, ["tokenize", "a.txt", "--output", ""]),
        (main, ["generate", "x", "--model", ""]),
        (main, ["plot", ""]),
    ):
        assert command(words) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.endswith("the name is empty\n"), (words, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.txt"]


def test_run_directory_of_train_stands_for_its_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path / "model"


def make_run(run: Path, *steps: str) -> Path:
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"options": {}, "model": {"model_type": "opt", "vocab_size": 48}}))
    for step in steps:
        (run / "checkpoints" / step / "params").mkdir(parents=True)
        (run / "checkpoints" / step / "params" / "_METADATA").write_text("{}")
    return run


def test_unfinished_run_stands_for_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="run is a training run without a checkpoint yet: none in .*checkpoint"):
        hub.resolve(run)
    make_run(tmp_path / "other", "900", "1000", "2000.orbax-checkpoint-tmp-1", "tmp.3000")
    (tmp_path / "other" / "checkpoints" / "5000").mkdir()  # without parameters
    newest = tmp_path / "other" / "checkpoints" / "1000"
    assert hub.resolve(tmp_path / "other") == newest  # by number, not by name
    assert hub.resolve(newest.parent / "900") == newest.parent / "900"
    (tmp_path / "other" / "model").mkdir()
    (tmp_path / "other" / "model" / "config.json").write_text("{}")
    assert hub.resolve(tmp_path / "other") == tmp_path / "other" / "model"


def test_config_and_companions_of_a_run(tmp_path, monkeypatch):
    step = make_run(tmp_path / "run", "5") / "checkpoints" / "5"
    expected = {"model_type": "opt", "vocab_size": 48, "architectures": ["OPTForCausalLM"]}
    assert hub.read_config(step) == expected
    assert hub.companion_directories(step) == (step, tmp_path / "run" / "tokenizer")
    monkeypatch.chdir(step)
    assert hub.read_config(".") == expected
    assert hub.companion_directories(".") == (Path("."), tmp_path / "run" / "tokenizer")
    for content, message in (("{", "is not valid JSON"), ("{}", "has no object 'model'"), ("[]", "holds a list")):
        (tmp_path / "run" / "run.json").write_text(content)
        with pytest.raises(ValueError, match=f"run.json {message}"):
            hub.read_config(step)
    (step / "config.json").write_text('{"a": 1}')  # the step's own config.json wins
    assert hub.read_config(step) == {"a": 1}
    assert hub.companion_directories(step) == (step,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"\xff", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"3", "config.json holds a int, not a JSON object"),
    ],
)
def test_read_config(tmp_path, content, message):
    with pytest.raises(FileNotFoundError, match="no OPT configuration at .*config.json"):
        hub.read_config(tmp_path)
    assert hub.companion_directories(tmp_path) == (tmp_path,)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        hub.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 48, "other": [1]}')
    assert hub.read_config(tmp_path) == {"vocab_size": 48, "other": [1]}


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "../x/y", "a/b/c", "~/nowhere", "", "a b", "a/../b"])
def test_names_that_are_not_on_the_hub_either(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        hub.resolve(name, cache_dir=tmp_path)


def test_is_orbax(tmp_path):
    assert not hub.is_orbax(tmp_path)
    (tmp_path / "params").mkdir()
    assert not hub.is_orbax(tmp_path)
    (tmp_path / "params" / "_METADATA").write_text("{}")
    assert hub.is_orbax(tmp_path)


@pytest.mark.parametrize("kind", ["broken link", "pipe", "directory"])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
)
def test_a_name_that_is_read_and_is_no_file_is_not_passed_over(tmp_path, name, kind):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"other weights")
    hub.resolve(tmp_path)
    path = tmp_path / name
    if kind == "broken link":
        path.symlink_to("../blobs/gone")
    else:
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(ValueError, match=f"{name} is (not a regular file|a link to ../blobs/gone, which is gone)"):
        hub.resolve(tmp_path)
    if name == "model.safetensors":  # a cache whose weights were deleted still has its tokenizer
        hub.resolve(tmp_path, weights=False)


def test_links_to_files_are_read(tmp_path):
    (tmp_path / "blob").write_text("{}")
    for name in ("config.json", "vocab.json", "model.safetensors"):
        (tmp_path / name).symlink_to("blob")
    assert hub.resolve(tmp_path) == tmp_path


def test_a_damaged_newest_checkpoint_is_not_passed_over(tmp_path):
    run = make_run(tmp_path / "run", "4", "8")
    (run / "checkpoints" / "12").mkdir()  # left by a process that was killed while it removed it
    (run / "checkpoints" / "16.orbax-checkpoint-tmp").mkdir()
    assert hub.resolve(run) == run / "checkpoints" / "8"
    (run / "checkpoints" / "8" / "params" / "_METADATA").unlink()
    with pytest.raises(ValueError, match=r"checkpoints/8 is damaged, .*or take the one before it, .*checkpoints/4"):
        hub.resolve(run)
