"""What is kept in Google Cloud Storage: runs of train.py, converted models, reading both. (A loopback server speaks for
it; docs/training.md says what else it was tried with.)"""

import json
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from support import gcs_server
from support.processes import environment

import train
from convert.__main__ import main as convert_main
from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer, named_parameters
from opt_jax.cli import main as cli
from opt_jax.data.tokenizers import read_tokenizer
from opt_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
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
def place(tmp_path_factory):
    """A directory with a model's configuration, text, and a run on the disk."""
    place = tmp_path_factory.mktemp("gcs")
    config = OPTConfig(
        vocab_size=304,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=16,
        dropout=0.1,
        init_std=0.05,
    )
    (place / "config.json").write_text(json.dumps(config.to_hf()))
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(["def", "self", "x", "(", ")"], k=60))}) for _ in range(40)]
    (place / "text.jsonl").write_text("\n".join(lines) + "\n")
    run(place, place / "run")
    return place


def words(place: Path, output: str | Path, **changes) -> list[str]:
    options = (
        dict(
            data=place / "text.jsonl",
            model=place / "config.json",
            output=output,
            steps=STEPS,
            batch_size=4,
            warmup_steps=3,
            learning_rate=6e-4,
            checkpoint_every=4,
            eval_every=6,
            eval_batches=1,
        )
        | changes
    )
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def run(place: Path, output: str | Path) -> None:
    """In this process, on one of its devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda spec, *_, dcn: make_mesh(spec, jax.devices()[:1], dcn))
        train.main(train.parse_options(words(place, output)))


def start(place: Path, output: str, store: gcs_server.Store, devices: int = 1, **changes) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "train.py", *words(place, output, **changes)]
    settings = environment(devices, **store.environment)
    return subprocess.Popen(command, env=settings, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process: subprocess.Popen, code: int = 0) -> str:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out + err


def losses(text: str) -> dict[int, tuple]:
    lines = map(json.loads, text.splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"], line.get("val_loss")) for line in lines}


def steps_in(store: gcs_server.Store, directory: str) -> set[str]:
    return {name.partition("/")[0] for name in store.names(directory + "/")}


def test_a_run_is_killed_while_it_writes_a_checkpoint_and_goes_on(store, place, here, capsys):
    """The same losses and parameters as on a disk, bit for bit; the same checkpoints are kept."""
    begun = start(place, "gs://bucket/run", store)
    store.wrote = lambda name: begun.kill() if name.startswith("bucket/run/checkpoints/8/optimizer/d/") else None
    end(begun, -signal.SIGKILL)
    store.wrote = lambda name: None
    half = store.names("bucket/run/checkpoints/8/")
    assert "params/_METADATA" in half and "commit_success.txt" not in half
    assert json.loads(store.read("bucket/run/run.json"))["options"]["steps"] == STEPS

    model = OPTForCausalLM.from_pretrained("gs://bucket/run")
    assert model.name_or_path == "gs://bucket/run/checkpoints/4"  # not the one that was never finished
    text, tokenizer = "def self x", read_tokenizer(epath.Path(place / "run" / "tokenizer"))
    ids = tokenizer(text).input_ids
    assert OPTTokenizer.from_pretrained("gs://bucket/run")(text).input_ids.tolist() == ids.tolist()

    capsys.readouterr()
    run(place, "gs://bucket/run")
    out = capsys.readouterr().out
    assert "steps 4 to 12" in out and "opt-jax generate --model gs://bucket/run" in out
    whole = losses((place / "run" / "metrics.jsonl").read_text())
    assert len(whole) == STEPS and losses(store.read("bucket/run/metrics.jsonl").decode()) == whole
    for name in ("checkpoints", "best"):
        assert steps_in(store, f"bucket/run/{name}") == {path.name for path in (place / "run" / name).iterdir()}

    expected = named_parameters(OPTForCausalLM.from_pretrained(place / "run"))
    for name in ("run", "run/best", "run/checkpoints"):
        for path, param in named_parameters(OPTForCausalLM.from_pretrained(f"gs://bucket/{name}")).items():
            np.testing.assert_array_equal(param.get_value(), expected[path].get_value())
    model = OPTForCausalLM.from_pretrained("gs://bucket/run")
    model.save_pretrained("gs://bucket/run/model", overwrite=True)  # over itself, tokenizer included
    assert OPTTokenizer.from_pretrained("gs://bucket/run")(text).input_ids.tolist() == ids.tolist()
    assert cli(["plot", "gs://bucket/run"]) == 1  # there is no place for the picture
    assert cli(["plot", "gs://bucket/run", str(place / "run"), "--output", str(place / "curves.png")]) == 0
    capsys.readouterr()
    run(place, "gs://bucket/run")
    assert "is finished: 12 steps" in capsys.readouterr().out


def test_two_processes_share_a_bucket(store, place, here):
    """Each writes its part of the checkpoints; both are killed, and both go on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def both() -> list[subprocess.Popen]:
        job = dict(coordinator_address=f"127.0.0.1:{port}", num_processes=2, mesh="fsdp=4", batch_size=4)
        return [start(place, "gs://bucket/two", store, devices=2, process_id=i, **job) for i in range(2)]

    begun = both()
    last = "bucket/two/checkpoints/4/commit_success.txt"
    store.wrote = lambda name: [process.kill() for process in begun] if name == last else None
    for process in begun:
        end(process, -signal.SIGKILL)
    store.wrote = lambda name: None
    assert any("ocdbt.process_1/" in name for name in store.names("bucket/two/checkpoints/4/"))
    assert "steps 4 to 12" in [end(process) for process in both()][0]
    found = losses(store.read("bucket/two/metrics.jsonl").decode())
    for step, (loss, *_) in losses((place / "run" / "metrics.jsonl").read_text()).items():
        assert found[step][0] == pytest.approx(loss, rel=1e-5)
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
