"""Runs of train.py and converted models in Google Cloud Storage.

A loopback server stands for it. docs/training.md says with what else it was tried.
"""

import json
import re
import signal
import subprocess
from collections.abc import Iterable

import numpy as np
import pytest
from etils import epath
from support import gcs_server
from support.processes import outcomes, start
from support.training_runs import command_line, metrics, run_here, run_options, start_two

from convert.__main__ import main as convert_main
from opt_jax import OPTForCausalLM, OPTTokenizer, named_parameters
from opt_jax.cli import main as cli
from opt_jax.data.tokenizers import read_tokenizer

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def store():
    with gcs_server.serve() as store:
        yield store


@pytest.fixture
def here(store, monkeypatch):
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of all runs, without `output`."""
    return run_options(tmp_path_factory.mktemp("inputs"), steps=STEPS, batch_size=4)


@pytest.fixture(scope="module")
def on_disk(options, tmp_path_factory):
    """A finished run on the disk."""
    output = tmp_path_factory.mktemp("runs") / "run"
    run_here(options, output)
    return output


def end(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for a program, and check its exit code. Returns what it has printed."""
    [(returned, out, err)] = outcomes([process])
    assert returned == code, err
    return out + err


def losses(lines: Iterable[dict]) -> dict[int, tuple]:
    return {line["step"]: (line["loss"], line["grad_norm"], line.get("val_loss")) for line in lines}


def metrics_in(store: gcs_server.Store, directory: str) -> list[dict]:
    return [json.loads(line) for line in store.read(f"{directory}/metrics.jsonl").decode().splitlines()]


def steps_in(store: gcs_server.Store, directory: str) -> set[str]:
    return {name.partition("/")[0] for name in store.names(directory + "/")}


def test_a_run_is_killed_while_it_writes_a_checkpoint_and_goes_on(store, options, on_disk, here, capsys, tmp_path):
    """It ends with the losses, parameters and checkpoints of the same run on a disk, bit for bit."""
    begun = start(command_line(options, "gs://bucket/run"), **store.environment)
    store.wrote = lambda name: begun.kill() if name.startswith("bucket/run/checkpoints/8/optimizer/d/") else None
    end(begun, -signal.SIGKILL)
    store.wrote = lambda name: None
    half = store.names("bucket/run/checkpoints/8/")
    assert "params/_METADATA" in half and "commit_success.txt" not in half
    assert json.loads(store.read("bucket/run/run.json"))["options"]["steps"] == STEPS

    model = OPTForCausalLM.from_pretrained("gs://bucket/run")
    assert model.name_or_path == "gs://bucket/run/checkpoints/4"  # the newest one is incomplete
    text, tokenizer = "def self x", read_tokenizer(epath.Path(on_disk / "tokenizer"))
    ids = tokenizer(text).input_ids
    assert OPTTokenizer.from_pretrained("gs://bucket/run")(text).input_ids.tolist() == ids.tolist()

    capsys.readouterr()
    run_here(options, "gs://bucket/run")
    out = capsys.readouterr().out
    assert "steps 4 to 12" in out and "opt-jax generate --model gs://bucket/run" in out
    expected_losses = losses(metrics(on_disk))
    assert len(expected_losses) == STEPS and losses(metrics_in(store, "bucket/run")) == expected_losses
    for name in ("checkpoints", "best"):
        assert steps_in(store, f"bucket/run/{name}") == {path.name for path in (on_disk / name).iterdir()}

    expected = named_parameters(OPTForCausalLM.from_pretrained(on_disk))
    for name in ("run", "run/best", "run/checkpoints"):
        for path, param in named_parameters(OPTForCausalLM.from_pretrained(f"gs://bucket/{name}")).items():
            np.testing.assert_array_equal(param.get_value(), expected[path].get_value())
    model = OPTForCausalLM.from_pretrained("gs://bucket/run")
    model.save_pretrained("gs://bucket/run/model", overwrite=True)  # onto itself, with the tokenizer
    assert OPTTokenizer.from_pretrained("gs://bucket/run")(text).input_ids.tolist() == ids.tolist()
    assert cli(["plot", "gs://bucket/run"]) == 1  # a picture cannot be written to a store
    assert cli(["plot", "gs://bucket/run", str(on_disk), "--output", str(tmp_path / "curves.png")]) == 0
    capsys.readouterr()
    run_here(options, "gs://bucket/run")
    assert "is finished: 12 steps" in capsys.readouterr().out


def test_two_processes_share_a_bucket(store, options, on_disk, here):
    """Each writes its part of the checkpoints. Both are killed, and go on."""

    def start_job():
        return start_two(options | dict(mesh="fsdp=4"), "gs://bucket/two", **store.environment)

    begun = start_job()
    last = "bucket/two/checkpoints/4/commit_success.txt"
    store.wrote = lambda name: [process.kill() for process in begun] if name == last else None
    for process in begun:
        end(process, -signal.SIGKILL)
    store.wrote = lambda name: None
    assert any("ocdbt.process_1/" in name for name in store.names("bucket/two/checkpoints/4/"))
    assert "steps 4 to 12" in [end(process) for process in start_job()][0]
    of_two = losses(metrics_in(store, "bucket/two"))
    for step, (loss, *_) in losses(metrics(on_disk)).items():
        assert of_two[step][0] == pytest.approx(loss, rel=1e-5)
    assert convert_main(["verify", "gs://bucket/two", "--against", "gs://bucket/two/checkpoints"]) == 0


def test_converting(store, here, tmp_path, capsys, monkeypatch):
    def convert(*words: str, code: int = 0) -> str:
        assert convert_main([*words, "--quiet"] if "inspect" not in words else words) == code
        return "".join(capsys.readouterr())

    assert re.search(r"^gs://bucket/tiny: 3,554,688 parameters", convert("tiny", "gs://bucket/tiny"), re.MULTILINE)
    assert "the same 100 tensors" in convert("verify", "gs://bucket/tiny", "--against", "tiny")
    assert "exists already: choose another name" in convert("tiny", "gs://bucket/tiny", code=1)
    assert "is not a model directory" in convert("tiny", "gs://bucket", "--overwrite", code=1)
    before = store.objects["bucket/tiny/config.json"].generation
    convert("tiny", "gs://bucket/tiny", "--overwrite")
    assert store.objects["bucket/tiny/config.json"].generation > before
    convert("to-hf", "gs://bucket/tiny", str(tmp_path / "hf"))
    convert("verify", str(tmp_path / "hf"), "--against", "tiny")
    assert "form is written to disks only" in convert("to-hf", "tiny", "gs://bucket/hf", code=2)
    assert "no directory 'gs://bucket/nothing'" in convert("inspect", "gs://bucket/nothing", code=1)
    for file in (tmp_path / "hf").iterdir():
        store.objects[f"bucket/hf/{file.name}"] = gcs_server.Object(1, file.read_bytes())
    assert "gs://bucket/hf is not an Orbax directory" in convert("inspect", "gs://bucket/hf", code=1)

    def broken(*_):
        raise OSError("the network is gone")

    monkeypatch.setattr("convert.to_orbax.check_written", broken)
    assert "the network is gone" in convert("tiny", "gs://bucket/three", code=1)
    assert not store.names("bucket/three")
