"""train.py as one run of two processes with four devices each, over loopback: the same losses, one process lost."""

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from processes import environment

from convert.__main__ import main as convert
from opt_jax import OPTConfig, OPTForCausalLM, named_parameters
from opt_jax.model import OPTForSequenceClassification

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


def command(place: Path, output: str, script: Path = ROOT / "train.py", **changes) -> list[str]:
    options = dict(
        data=place / "text.jsonl", model=place / "config.json", output=place / output, steps=STEPS, batch_size=8,
        warmup_steps=3, learning_rate=6e-4, checkpoint_every=4, eval_every=6, eval_batches=1,
    ) | changes  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    lora = ["-W", "ignore::DeprecationWarning"] if "lora_rank" in changes else []  # qwix uses Flax's old names
    return [sys.executable, "-W", "error", *lora, str(script), *words]


def start(place: Path, words: list[str], devices: int) -> subprocess.Popen:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(place / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        words, env=environment(devices, TF_CPP_MIN_LOG_LEVEL="2", **cache), cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_two(place: Path, output: str, others: dict | None = None, **changes) -> list[subprocess.Popen]:
    """others: what is different for process 1."""
    job = dict(coordinator_address=free_address(), num_processes=2)
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
    together(place, "pair", checkpoint_minutes=1e-5, keep_checkpoints=20)
    assert (place / "pair" / "checkpoints" / "1").is_dir()  # both agreed that the time was up
    return lines(place, "pair")


def test_two_processes_train_as_one_does(place, whole, pair):
    compare(pair, whole, rtol=1e-5)
    for name in ("", "best", "checkpoints", "model"):  # written by both, read by one
        ours, theirs = (OPTForCausalLM.from_pretrained(place / run / name) for run in ("pair", "alone"))
        for path, param in named_parameters(ours).items():
            other = named_parameters(theirs)[path].get_value()
            # The gradient of k_proj.bias is rounding noise, which Adam makes as large as any other.
            atol = 2 * sum(line["lr"] for line in whole) if path.endswith("k_proj.bias") else 1e-6
            np.testing.assert_allclose(param.get_value(), other, rtol=1e-4, atol=atol, err_msg=f"{name}: {path}")
    assert convert(["to-hf", str(place / "pair"), str(place / "hf")]) == 0
    assert convert(["verify", str(place / "hf"), "--against", str(place / "pair" / "model")]) == 0


def test_a_killed_process_ends_the_other_and_the_run_goes_on(place, pair):
    processes = start_two(place, "killed")
    when_recorded(place, "killed", 6, processes)
    processes[1].kill()
    (code, _, error), (killed, *_) = ends(processes)
    said = [line for line in error.splitlines() if line.startswith("process 0 of 2: ")]
    assert killed == -signal.SIGKILL and code == 75 and len(said) == 1, error
    assert "lost process 1 (its connection was closed)" in said[0] and re.search(r"in step \d+ since \d\d:", said[0])

    shutil.copytree(place / "killed", place / "copy")
    assert "steps 4 to 12" in together(place, "killed")[0][1]  # on two processes again, bit for bit
    compare(lines(place, "killed"), pair, rtol=0)
    code, said, error = alone(place, "copy", devices=2, mesh="tensor=2")  # on one, with other devices
    assert code == 0 and "steps 4 to 12" in said, error
    compare(lines(place, "copy"), pair, rtol=1e-5)


@pytest.mark.parametrize("task", [False, True])
def test_two_processes_start_from_a_checkpoint_and_sigterm_to_one_stops_both(place, whole, task):
    output = f"tuned {task}"
    changes: dict[str, Any] = dict(model=place / "alone" / "model", dropout=0.0, checkpoint_every=1000)
    if task:
        rows = [f"{word} {word} x" + " self" * i + f"\t{word}" for i in range(20) for word in ("def", "(")]
        (place / "rows.tsv").write_text("\n".join(rows) + "\n")
        changes |= dict(task="sequence-classification", data=place / "rows.tsv", lora_rank=2, learning_rate=1e-2)
        changes |= dict(eval_batches=None)
    processes = start_two(place, output, **changes)
    when_recorded(place, output, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    done = ends(processes)
    assert [code for code, *_ in done] == [143, 143], done
    assert "SIGTERM: stopped after step" in done[0][1]
    [saved] = (path.name for path in (place / output / "checkpoints").iterdir())
    assert int(saved) == len(lines(place, output))

    together(place, output, **changes)
    code, _, error = alone(place, f"{output} alone", **changes)
    assert code == 0, error
    compare(lines(place, output), lines(place, f"{output} alone"), rtol=1e-5)
    if task:
        models = [OPTForSequenceClassification.from_pretrained(place / run) for run in (output, f"{output} alone")]
        for ours, theirs in zip(*map(jax.tree.leaves, models), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert {"val_accuracy"} < lines(place, output)[-1].keys()
    else:
        assert lines(place, output)[0]["loss"] < whole[0]["loss"] - 0.1
        assert OPTForCausalLM.from_pretrained(place / output).config.dropout == 0.0


def test_processes_that_differ_are_told_what_differs(place):
    done = ends(start_two(place, "different", others=dict(seed=1)))
    assert [code for code, *_ in done] == [1, 1]
    for process, (_, _, error) in enumerate(done):
        assert f"train.py: error: process {process}: the processes differ: --seed is 0 on process 0, but 1 on" in error
    assert not (place / "different").exists()


def test_processes_of_different_code_are_told_so(place):
    (place / "train.py").write_text((ROOT / "train.py").read_text() + "# changed\n")
    done = ends(start_two(place, "different", others=dict(script=place / "train.py")))
    assert [code for code, *_ in done] == [1, 1]
    for process, (_, _, error) in enumerate(done):
        assert f"train.py: error: process {process}: the processes differ: source train.py is " in error
    assert not (place / "different").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_does_not_wait_for_ever_for_the_others_to_start(place, process):
    program = f"from opt_jax.distributed import start; start('on', '{free_address()}', 2, {process}, hang_minutes=0.05)"
    [(code, _, error)] = ends([start(place, [sys.executable, "-c", program], devices=1)])
    assert code == 75 and re.fullmatch(rf"process {process}: waited 3 s for the other processes to start: .*\n", error)


JOB = """
import sys, time
from opt_jax import distributed
minutes = 0.5 if sys.argv[3] == "hang" else 60
distributed.start("on", sys.argv[1], 2, int(sys.argv[2]), heartbeat_seconds=3, hang_minutes=minutes)
with distributed.last_words("job"):
    import jax
    from jax.experimental import multihost_utils
    from opt_jax.sharding import make_mesh
    for dcn, processes in (("data=2", [[0, 0], [1, 1]]), ("fsdp=2", [[0, 1], [0, 1]])):
        mesh = make_mesh("data=2,fsdp=2", dcn=dcn)
        assert [[device.process_index for device in row] for row in mesh.devices[..., 0]] == processes, dcn
    try:
        make_mesh("data=4", dcn="fsdp=2")
        assert False
    except ValueError as error:
        assert "mesh fsdp=1 does not divide over fsdp=2 of the 2 processes" in str(error), error
    assert distributed.from_first(lambda: b"of process 0" if jax.process_index() == 0 else 1 / 0) == b"of process 0"
    try:
        distributed.from_first(lambda: open("/nowhere").read())
    except OSError as error:
        print(error, flush=True)
    distributed.reached("the middle")
    if jax.process_index() == 1 and sys.argv[3] == "error":
        raise ValueError("bad file")
    multihost_utils.sync_global_devices("never") if jax.process_index() != int(sys.argv[4]) else time.sleep(1000)
"""


def job(place: Path, what: str, victim: int) -> list[subprocess.Popen]:
    """Two processes that are in the middle of something, the victim sleeping and the other waiting for it."""
    address = free_address()
    words = [[sys.executable, "-c", JOB, address, str(i), what, str(victim)] for i in range(2)]
    return [start(place, command, devices=2) for command in words]


def last_line(error: str, process: int) -> str:
    [said] = [line for line in error.splitlines() if line.startswith(f"process {process} of 2: ")]
    assert " UTC, in the middle since " in said
    return said


def test_an_error_in_one_process_ends_both(place):
    first, second = ends(job(place, "error", 1))
    assert first[0] == second[0] == 1
    assert "No such file" in first[1] and "process 0 failed: see its message" in second[1]
    assert "job: error: process 1: bad file\n" in second[2]
    assert "process 1 failed: see its message" in last_line(first[2], 0)


@pytest.mark.parametrize("victim, sent", [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP)])
def test_a_dead_or_silent_process_is_lost(place, victim, sent):
    processes = job(place, "", victim)
    for process in processes:
        assert process.stdout is not None
        assert any("process 0 failed" in line or "No such file" in line for line in process.stdout)  # both are there
    processes[victim].send_signal(sent)
    survivor = 1 - victim
    [(code, _, error)] = ends([processes[survivor]])
    processes[victim].kill()
    ends([processes[victim]])
    why = "its connection was closed" if sent == signal.SIGKILL else "nothing heard of it for 3 s"
    assert code == 75 and f"lost process {victim} ({why})" in last_line(error, survivor)


def test_a_job_that_stands_still_ends(place):
    """Both are alive, but one sleeps and the other waits for it."""
    done = ends(job(place, "hang", 0))
    assert [code for code, *_ in done] == [75, 75]
    said = [last_line(error, process) for process, (*_, error) in enumerate(done)]
    assert any("no progress for 0.5 minutes" in line for line in said), said  # the first to end is lost to the other
