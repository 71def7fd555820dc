"""train.py as one run of two processes with four devices each, over loopback: the same losses, one process lost."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convert.__main__ import main as convert
from opt_jax import OPTConfig, OPTForCausalLM, named_parameters
from opt_jax.training.options import Options

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model's configuration, text, and a cache of what was compiled."""
    place = tmp_path_factory.mktemp("job")
    config = OPTConfig(
        vocab_size=304, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=16, dropout=0.1, init_std=0.05,
    )  # fmt: skip
    (place / "config.json").write_text(json.dumps(config.to_hf()))
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(["def", "self", "x", "(", ")"], k=60))}) for _ in range(40)]
    (place / "text.jsonl").write_text("\n".join(lines) + "\n")
    return place


def command(place: Path, output: str, **changes) -> list[str]:
    options = dict(
        data=place / "text.jsonl", model=place / "config.json", output=place / output, steps=STEPS, batch_size=8,
        warmup_steps=3, learning_rate=6e-4, checkpoint_every=4, eval_every=6, eval_batches=1,
    ) | changes  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [sys.executable, "-W", "error", str(ROOT / "train.py"), *words]


def start(place: Path, words: list[str], devices: int) -> subprocess.Popen:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(place / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | cache | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    return subprocess.Popen(words, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_two(place: Path, output: str, others: dict | None = None, **changes) -> list[subprocess.Popen]:
    """others: what is different for process 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = dict(coordinator_address=f"127.0.0.1:{port}", num_processes=2)
    both = [changes, changes | (others or {})]
    return [start(place, command(place, output, **job, process_id=i, **both[i]), devices=4) for i in range(2)]


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        texts = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def together(*args, **kwargs) -> list[tuple[int, str, str]]:
    done = ends(start_two(*args, **kwargs))
    assert [code for code, *_ in done] == [0, 0], done
    return done


def alone(place: Path, output: str, devices: int = 8, **changes) -> tuple[int, str, str]:
    return ends([start(place, command(place, output, **changes), devices)])[0]


def when_recorded(place: Path, output: str, lines: int, processes: list[subprocess.Popen]) -> None:
    """Wait until so many steps are in metrics.jsonl."""
    path = place / output / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.002)


def lines(place: Path, output: str) -> list[dict]:
    return [json.loads(line) for line in (place / output / "metrics.jsonl").read_text().splitlines()]


def compare(ours: list[dict], theirs: list[dict], rtol: float) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for name in ("loss", "val_loss", "lr"):
        pairs = ([line[name] for line in part if name in line] for part in (ours, theirs))
        np.testing.assert_allclose(*pairs, rtol=rtol, err_msg=name)


@pytest.fixture(scope="module")
def whole(place):
    """The run of one process with eight devices."""
    code, _, error = alone(place, "alone")
    assert code == 0, error
    return lines(place, "alone")


@pytest.fixture(scope="module")
def pair(place):
    together(place, "pair")
    return lines(place, "pair")


def test_two_processes_train_as_one_does(place, whole, pair):
    compare(pair, whole, rtol=1e-5)
    for name in ("", "best", "checkpoints", "model"):  # written by both, read by one
        ours, theirs = (OPTForCausalLM.from_pretrained(place / run / name) for run in ("pair", "alone"))
        for path, param in named_parameters(ours).items():
            other = named_parameters(theirs)[path].get_value()
            np.testing.assert_allclose(param.get_value(), other, rtol=1e-4, atol=1e-6, err_msg=f"{name}: {path}")
    assert convert(["to-hf", str(place / "pair"), str(place / "hf")]) == 0
    assert convert(["verify", str(place / "hf"), "--against", str(place / "pair" / "model")]) == 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(place, pair, victim):
    output = f"killed{victim}"
    processes = start_two(place, output)
    when_recorded(place, output, 6, processes)
    processes[victim].kill()
    done = ends(processes)
    survivor, (code, _, error) = 1 - victim, done[1 - victim]
    said = [line for line in error.splitlines() if line.startswith(f"process {survivor} of 2: ")]
    assert code == 75 and len(said) == 1, done
    assert f"lost process {victim} (its connection was closed)" in said[0] and "in step " in said[0]
    assert done[victim][0] == -signal.SIGKILL

    if victim == 1:  # on two processes again, bit for bit
        assert "steps 4 to 12" in together(place, output)[0][1]
        compare(lines(place, output), pair, rtol=0)
    else:  # on one, with other devices
        code, said, error = alone(place, output, devices=2, mesh="tensor=2")
        assert code == 0 and "steps 4 to 12" in said, error
        compare(lines(place, output), pair, rtol=1e-5)


def test_sigterm_to_one_process_stops_both_at_the_same_step(place, pair):
    processes = start_two(place, "preempted", checkpoint_every=1000)
    when_recorded(place, "preempted", 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    done = ends(processes)
    assert [code for code, *_ in done] == [143, 143], done
    assert "SIGTERM: stopped after step" in done[0][1]
    [saved] = (path.name for path in (place / "preempted" / "checkpoints").iterdir())
    assert int(saved) == len(lines(place, "preempted"))
    together(place, "preempted", checkpoint_every=1000)
    compare(lines(place, "preempted"), pair, rtol=0)


def test_a_silent_process_is_lost_too(place):
    processes = start_two(place, "silent", heartbeat_seconds=3)
    when_recorded(place, "silent", 3, processes)
    processes[1].send_signal(signal.SIGSTOP)
    [(code, _, error)] = ends(processes[:1])
    processes[1].kill()
    processes[1].communicate()
    assert code == 75 and "lost process 1 (nothing heard of it for 3 s)" in error


def test_processes_that_differ_are_told_what_differs(place):
    done = ends(start_two(place, "different", others=dict(seed=1)))
    assert [code for code, *_ in done] == [1, 1]
    for process, (_, _, error) in enumerate(done):
        assert f"train.py: error: process {process}: the processes differ: --seed is 0 on process 0, but 1 on" in error
    assert not (place / "different").exists()


def test_an_error_in_one_process_ends_both(place):
    done = ends(start_two(place, "error", others=dict(data=place / "nowhere.txt")))
    assert [code for code, *_ in done] == [1, 1]
    (place / "here").mkdir()
    (place / "here" / "text.txt").write_text("x" * 9)  # too little


def test_two_processes_start_from_a_checkpoint(place, whole):
    changes = dict(model=place / "alone" / "model", dropout=0.0, steps=2)
    together(place, "tuned", **changes)
    code, _, error = alone(place, "tuned alone", **changes)
    assert code == 0, error
    ours, theirs = lines(place, "tuned"), lines(place, "tuned alone")
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-5)
    assert ours[0]["loss"] < whole[0]["loss"] - 0.1
    assert OPTForCausalLM.from_pretrained(place / "tuned").config.dropout == 0.0


def test_options_of_a_job_may_change_on_resume():
    from opt_jax.training.options import MAY_CHANGE

    assert {"num_processes", "process_id", "coordinator_address", "mesh", "dcn_mesh"} <= MAY_CHANGE
    assert Options().heartbeat_seconds == 30
