"""Checkpoints that change while they are read: a mixture of old and new is never written, loaded or called equal."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hf_files import TINY, hf_weights, write_hf
from support.hf_output import hidden, write
from support.metaseq_files import contents
from support.metaseq_files import write as write_metaseq

import convert.inspect
from convert import metaseq, to_hf, to_orbax
from convert.__main__ import main
from convert.checkpoint import Checkpoint
from convert.source import open_directory
from opt_jax import OPTConfig, OPTForCausalLM
from opt_jax.checkpoints import pretrained

MIXTURE = r"{} has changed while it was read: run again when nothing writes to it$"


def rewrite(file: Path) -> None:
    """Change a byte in place."""
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"?")


def rewrite_at_the_same_time(file: Path) -> None:
    """Change a byte in place, and set the time of the last change back."""
    before = file.stat().st_mtime_ns
    rewrite(file)
    os.utime(file, ns=(before, before))


def rename_over(file: Path) -> None:
    """Replace the file by another of the same size and time."""
    shutil.copy2(file, file.with_name("copy"))
    os.rename(file.with_name("copy"), file)


def remove(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))


def age(directory: Path) -> Path:
    """Set the time of all files to the past, so that a change is sure to have another one."""
    for file in directory.rglob("*"):
        os.utime(file, (1e9, 1e9))
    return directory


def at(directory: Path, form: str) -> Path:
    source = write_hf(directory, TINY, hf_weights(TINY), "safetensors-sharded" if form == "orbax" else form)
    (source / "vocab.json").write_text("{}")
    if form == "orbax":
        to_orbax.convert(open_directory(source), directory.with_name("orbax"))
        source = directory.with_name("orbax")
    return age(source)


def changing(file: Path, change: Callable[[Path], None]) -> Callable[[str, int], None]:
    """A `progress` callback that changes the file after the first part has been read."""
    left = [change]
    return lambda name, nbytes: left.pop()(file) if left else None


CASES = [
    (to_orbax, "safetensors", "model.safetensors", rewrite),
    (to_hf, "safetensors", "model.safetensors", rename_over),
    (to_hf, "safetensors-sharded", "model-00001-of-00002.safetensors", rewrite),
    (to_hf, "safetensors-sharded", "model.safetensors.index.json", rename_over),
    (to_orbax, "bin-sharded", "pytorch_model.bin.index.json", remove),
    (to_hf, "bin", "pytorch_model.bin", rewrite),
    (to_orbax, "safetensors", "config.json", rename_over),
    (to_hf, "safetensors", "model.safetensors", rewrite_at_the_same_time),
    (to_hf, "safetensors", "vocab.json", remove),
    (to_hf, "safetensors", "merges.txt", lambda file: file.write_text("new")),
    (to_hf, "orbax", "params/_METADATA", rewrite),
    (to_orbax, "orbax", "params/manifest.ocdbt", rename_over),
]


@pytest.mark.slow
@pytest.mark.parametrize("converter, form, name, change", CASES)
def test_nothing_is_published(tmp_path, converter, form, name, change):
    source = at(tmp_path / "hf", form)
    opened, progress = open_directory(source), changing(source / name, change)
    with pytest.raises(ValueError, match=MIXTURE.format(source / name)):
        converter.convert(opened, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists() and hidden(tmp_path) == []


@pytest.mark.parametrize("change", [rewrite, rename_over])
def test_metaseq(tmp_path, change):
    files = write_metaseq(tmp_path / "parts", contents(hf_weights(TINY), parts=2, shards=2, flat=True))
    age(tmp_path / "parts")
    opened = metaseq.open_checkpoint(files, config=OPTConfig.from_hf(TINY))
    with pytest.raises(ValueError, match=MIXTURE.format(files[3])):
        to_orbax.convert(opened, tmp_path / "out", progress=changing(files[3], change))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts"]


def test_a_worker_completes_no_file_of_a_mixture(tmp_path):
    source = at(tmp_path / "hf", "safetensors")
    file = source / "model.safetensors"
    options = dict(max_shard_size="1KB", shard_of=(1, 2))
    with pytest.raises(ValueError, match=MIXTURE.format(file)):
        write(source, tmp_path / "out", **options, progress=changing(file, rewrite))
    assert list((tmp_path / ".out.shards").glob("*.safetensors*")) == []


def test_workers_do_not_share_a_destination_across_a_change(tmp_path):
    """Row 7 is not among the rows that the plan hashes, but the time of the file is."""
    source = at(tmp_path / "hf", "safetensors")
    write(source, tmp_path / "out", max_shard_size="1KB", shard_of=(1, 2))
    file = source / "model.safetensors"
    row = hf_weights(TINY)["model.decoder.embed_tokens.weight"][7].tobytes()
    file.write_bytes(file.read_bytes().replace(row, bytes(len(row))))
    with pytest.raises(ValueError, match=r"\.out\.shards was begun with another content"):
        write(source, tmp_path / "out", max_shard_size="1KB", shard_of=(2, 2))


@pytest.mark.parametrize("form, name", [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")])
def test_no_mixture_is_loaded(tmp_path, monkeypatch, form, name):
    file, read = at(tmp_path / "hf", form) / name, pretrained.read_array
    change = changing(file, rename_over)
    monkeypatch.setattr(pretrained, "read_array", lambda *args: [read(*args), change("", 0)][0])
    with pytest.raises(ValueError, match=MIXTURE.format(file)):
        OPTForCausalLM.from_pretrained(tmp_path / "hf")
    OPTForCausalLM.from_pretrained(tmp_path / "hf")


def test_verify_gives_no_verdict_on_a_mixture(tmp_path, monkeypatch, capsys):
    source = at(tmp_path / "hf", "safetensors")
    write(source, tmp_path / "out")
    compare = convert.inspect.compare

    def changing_compare(ours: Checkpoint, theirs: Checkpoint, progress) -> str | None:
        return compare(ours, theirs, changing(source / "model.safetensors", rename_over))

    monkeypatch.setattr(convert.inspect, "compare", changing_compare)
    assert main(["verify", str(tmp_path / "out"), "--against", str(source)]) == 1
    assert "has changed while it was read" in capsys.readouterr().err
