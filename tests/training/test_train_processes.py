"""train.py as one run of two processes with two devices each, over loopback: the same losses, one process lost."""

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.processes import environment

import train
from convert.__main__ import main as convert
from opt_jax import OPTConfig, OPTForCausalLM, named_parameters
from opt_jax.model.heads import OPTForSequenceClassification
from opt_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model's configuration, and text."""
    place = tmp_path_factory.mktemp("job")
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
    return place


def command(place: Path, output: str, script: Path = ROOT / "train.py", **changes) -> list[str]:
    options = (
        dict(
            data=place / "text.jsonl",
            model=place / "config.json",
            output=place / output,
            steps=STEPS,
            batch_size=8,
            warmup_steps=3,
            learning_rate=6e-4,
            checkpoint_every=4,
            eval_every=6,
            eval_batches=1,
        )
        | changes
    )
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    lora = ["-W", "ignore::DeprecationWarning"] if "lora_rank" in changes else []  # qwix uses Flax's old names
    return [sys.executable, "-W", "error", *lora, str(script), *words]


def start(words: list[str], devices: int) -> subprocess.Popen:
    return subprocess.Popen(
        words,
        env=environment(devices, TF_CPP_MIN_LOG_LEVEL="2"),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_two(place: Path, output: str, others: dict | None = None, **changes) -> list[subprocess.Popen]:
    """others: what is different for process 1."""
    job = dict(coordinator_address=free_address(), num_processes=2)
    both = [changes, changes | (others or {})]
    return [start(command(place, output, **job, process_id=i, **both[i]), devices=2) for i in range(2)]


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


def alone(place: Path, output: str, devices: int = 1, **changes) -> list[dict]:
    """The lines of a run of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda spec, _, dcn: make_mesh(spec, jax.devices()[:devices], dcn=dcn))
        words = command(place, output, **changes)
        train.main(train.parse_options([word for word in words if word.startswith("--")]))
    return lines(place, output)


def when(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    while not condition():
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.002)


def recorded(place: Path, output: str) -> int:
    """So many steps are in metrics.jsonl."""
    path = place / output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def lines(place: Path, output: str) -> list[dict]:
    return [json.loads(line) for line in (place / output / "metrics.jsonl").read_text().splitlines()]


def compare(ours: list[dict], theirs: list[dict], rtol: float) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "val_loss", "lr"):
        pairs = ([line[name] for line in part if name in line] for part in (ours, theirs))
        np.testing.assert_allclose(*pairs, rtol=rtol, err_msg=name)


@pytest.fixture(scope="module")
def whole(place):
    return alone(place, "alone")


@pytest.fixture(scope="module")
def of_pair(place, whole) -> dict[str, Any]:
    """Options of the run "pair" of two processes, which starts from a checkpoint (with new weights: test_gcs.py)."""
    options = dict(model=place / "alone" / "model", dropout=0.0)
    together(place, "pair", **options, checkpoint_minutes=1e-5, keep_checkpoints=20)
    return options


def test_two_processes_train_as_one_does(place, whole, of_pair):
    assert (place / "pair" / "checkpoints" / "1").is_dir()  # both agreed that the time was up
    pair = lines(place, "pair")
    assert len(pair) == STEPS and pair[0]["loss"] < whole[0]["loss"] - 0.1
    compare(pair, alone(place, "single", **of_pair), rtol=1e-5)
    for name in ("", "best", "checkpoints", "model"):  # written by both, read by one
        ours, theirs = (OPTForCausalLM.from_pretrained(place / run / name) for run in ("pair", "single"))
        assert ours.config.dropout == 0.0
        for path, param in named_parameters(ours).items():
            other = named_parameters(theirs)[path].get_value()
            # The gradient of k_proj.bias is rounding noise, which Adam amplifies.
            atol = 1e-4 if path.endswith("k_proj.bias") else 1e-6
            np.testing.assert_allclose(param.get_value(), other, rtol=1e-4, atol=atol, err_msg=f"{name}: {path}")
    assert convert(["to-hf", str(place / "pair"), str(place / "hf")]) == 0
    assert convert(["verify", str(place / "hf"), "--against", str(place / "pair" / "model")]) == 0


def test_damage_that_one_process_reads_ends_both_or_both_fall_back(place, of_pair):
    shutil.copytree(place / "pair", place / "damaged")
    shutil.rmtree(place / "damaged" / "model")
    for path in (place / "damaged" / "checkpoints" / "12" / "params" / "ocdbt.process_1" / "d").iterdir():
        content = bytearray(path.read_bytes())
        if len(content) > 2048:  # the shards of the embedding, which process 0 does not read
            content[100] ^= 1
            path.write_bytes(content)
    done = ends(start_two(place, "damaged", **of_pair))
    said = [error.splitlines() for _, _, error in done]
    assert [code for code, *_ in done] == [1, 1], done
    before: Any = None
    for i, why in enumerate(("process 1 failed: see its message", "cannot be read: ")):
        (line,) = [line for line in said[i] if line.startswith("train.py: error: ")]
        assert "checkpoints/12 is damaged: " in line and why in line, line
        before = re.search(r"the one before it, (\d+)$", line)
        assert before, line

    job: dict[str, Any] = dict(coordinator_address=free_address(), num_processes=2)
    words = [[*command(place, "damaged", **of_pair, **job, process_id=i), "--fall-back"] for i in range(2)]
    done = ends([start(each, devices=2) for each in words])
    assert [code for code, *_ in done] == [0, 0] and f"steps {before[1]} to 12" in done[0][1], done
    compare(lines(place, "damaged"), lines(place, "pair"), rtol=0)


def test_a_killed_process_ends_the_other_sigterm_to_one_stops_both_and_the_run_goes_on(place, whole, capsys):
    """A task, with LoRA, three starts of two processes."""
    rows = [f"{word} {word} x" + " self" * i + f"\t{word}" for i in range(20) for word in ("def", "(")]
    (place / "rows.tsv").write_text("\n".join(rows) + "\n")
    changes: dict[str, Any] = dict(
        task="sequence-classification",
        model=place / "alone" / "model",
        dropout=0.1,
        data=place / "rows.tsv",
        lora_rank=2,
        learning_rate=1e-2,
        eval_batches=None,
        steps=40,
        eval_every=20,
    )
    processes = start_two(place, "tuned", **changes, checkpoint_every=5)
    checkpoints = place / "tuned" / "checkpoints"
    when(lambda: (checkpoints / "5").exists() and recorded(place, "tuned") >= 8, processes)
    processes[1].kill()
    (code, _, error), (killed, *_) = ends(processes)
    said = [line for line in error.splitlines() if line.startswith("process 0 of 2: ")]
    assert killed == -signal.SIGKILL and code == 75 and len(said) == 1, error
    assert "lost process 1 (its connection was closed)" in said[0] and re.search(r"in step \d+ since \d\d:", said[0])
    shutil.copytree(place / "tuned", place / "copy")
    before = [json.loads(line) for line in (place / "copy" / "metrics.jsonl").read_text().splitlines()[:8]]

    processes = start_two(place, "tuned", **changes, checkpoint_every=1000)  # on two processes again, bit for bit
    assert processes[0].stdout is not None
    first = next(int(found[1]) for line in processes[0].stdout if (found := re.search(r"steps (\d+) to 40", line)))
    when(lambda: recorded(place, "tuned") > max(first, 8), processes)
    processes[1].send_signal(signal.SIGTERM)
    done = ends(processes)
    assert [code for code, *_ in done] == [143, 143], done
    assert "SIGTERM: stopped after step" in done[0][1]
    assert max(int(path.name) for path in checkpoints.iterdir()) == len(lines(place, "tuned"))
    compare(lines(place, "tuned")[:8], before, rtol=0)

    together(place, "tuned", **changes, checkpoint_every=1000)
    expected = alone(place, "tuned alone", **changes)
    assert len(expected) == 40 and "val_accuracy" in lines(place, "tuned")[-1]
    compare(lines(place, "tuned"), expected, rtol=1e-5)
    models = [OPTForSequenceClassification.from_pretrained(place / run) for run in ("tuned", "tuned alone")]
    for ours, theirs in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    capsys.readouterr()
    moved = alone(place, "copy", devices=2, **changes, mesh="tensor=2")  # on one process, with other devices
    assert re.search("steps [1-9][0-9]* to 40", capsys.readouterr().out)
    compare(moved, expected, rtol=1e-5)


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
    program = "from opt_jax.parallel.processes import start; "
    program += f"start('on', '{free_address()}', 2, {process}, hang_minutes=0.05)"
    [(code, _, error)] = ends([start([sys.executable, "-c", program], devices=1)])
    assert code == 75 and re.fullmatch(rf"process {process}: waited 3 s for the other processes to start: .*\n", error)


JOB = """
import sys, time
from opt_jax.parallel import agreement, processes
seconds = 30 if sys.argv[3] == "error" else 3  # JAX aborts after twice that, which must not come before an error's end
processes.start("on", sys.argv[1], 2, int(sys.argv[2]), heartbeat_seconds=seconds)
with processes.last_words("job"):
    import jax
    from jax.experimental import multihost_utils
    from opt_jax.parallel.mesh import make_mesh
    for dcn, expected in (("data=2", [[0, 0], [1, 1]]), ("fsdp=2", [[0, 1], [0, 1]])):
        mesh = make_mesh("data=2,fsdp=2", dcn=dcn)
        assert [[device.process_index for device in row] for row in mesh.devices[..., 0]] == expected, dcn
    try:
        make_mesh("data=4", dcn="fsdp=2")
        assert False
    except ValueError as error:
        assert "mesh fsdp=1 does not divide over fsdp=2 of the 2 processes" in str(error), error
    assert agreement.from_first(lambda: b"of process 0" if jax.process_index() == 0 else 1 / 0) == b"of process 0"
    try:
        agreement.from_first(lambda: open("/nowhere").read())
    except OSError as error:
        print(error, flush=True)
    processes.reached("the middle")
    if jax.process_index() == 1 and sys.argv[3] == "error":
        raise ValueError("bad file")
    multihost_utils.sync_global_devices("never") if jax.process_index() != int(sys.argv[4]) else time.sleep(1000)
"""


def job(place: Path, what: str, victim: int) -> list[subprocess.Popen]:
    """Two processes that are in the middle of something, the victim sleeping and the other waiting for it."""
    address = free_address()
    words = [[sys.executable, "-c", JOB, address, str(i), what, str(victim)] for i in range(2)]
    return [start(command, devices=2) for command in words]


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


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_silent_process_is_lost(place, sent):
    """Process 0. (Process 1: killed in a run above, silent below.)"""
    processes = job(place, "", 0)
    for process in processes:
        assert process.stdout is not None
        assert any("process 0 failed" in line or "No such file" in line for line in process.stdout)  # both are there
    processes[0].send_signal(sent)
    [(code, _, error)] = ends([processes[1]])
    processes[0].kill()
    ends([processes[0]])
    why = "its connection was closed" if sent == signal.SIGKILL else "nothing heard of it for 3 s"
    assert code == 75 and f"lost process 0 ({why})" in last_line(error, 1)


# Without JAX, which takes seconds to start: both sleep.
WATCHED = """
import importlib.util, sys, threading, time
spec = importlib.util.spec_from_file_location("watchdog", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
process, hang = int(sys.argv[2]), float(sys.argv[3])
watchdog = module.Watchdog(process, 2, seconds=2, hang_minutes=hang, exit_code=75)
if process == 0:
    server, address, token = module.listen("127.0.0.1", 2)
    print(address, token, flush=True)
    threading.Thread(target=watchdog.accept, args=(server, token, stop := threading.Event())).start()
    while not watchdog._peers:
        time.sleep(0.01)
    stop.set()
else:
    assert watchdog.connect(*sys.argv[4:]) is None
watchdog.reached("the middle")
watchdog.start()
print("watched", flush=True)
time.sleep(1000)
"""


def watched(hang_minutes: float) -> list[subprocess.Popen]:
    def begin(process: int, *words: str) -> subprocess.Popen:
        program = [sys.executable, "-c", WATCHED, str(ROOT / "opt_jax" / "parallel" / "watchdog.py"), str(process)]
        return start([*program, str(hang_minutes), *words], devices=1)

    processes = [begin(0)]
    assert processes[0].stdout is not None
    processes.append(begin(1, *processes[0].stdout.readline().split()))
    return processes


def test_a_silent_process_1_is_lost():
    processes = watched(hang_minutes=60)
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "watched\n"
    processes[1].send_signal(signal.SIGSTOP)
    [(code, _, error)] = ends(processes[:1])
    processes[1].kill()
    ends(processes[1:])
    assert code == 75 and "lost process 1 (nothing heard of it for 2 s)" in last_line(error, 0)


def test_a_job_that_stands_still_ends():
    done = ends(watched(hang_minutes=0.05))
    assert [code for code, *_ in done] == [75, 75]
    said = [last_line(error, process) for process, (*_, error) in enumerate(done)]
    assert any("no progress for 0.05 minutes" in line for line in said), said  # the first to end is lost to the other
