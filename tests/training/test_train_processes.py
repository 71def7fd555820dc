"""train.py as one run of two processes with two devices each: losses, kills, and processes that are lost."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from support.processes import free_address, outcomes, start
from support.training_runs import SCRIPT, metrics, run_here, run_options, start_two

from convert.__main__ import main as convert
from opt_jax import OPTForCausalLM, named_parameters
from opt_jax.model.heads import OPTForSequenceClassification

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory for runs and their data."""
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def options(place):
    return run_options(place, steps=STEPS)


def together(options: dict[str, Any], output: Path) -> list[dict]:
    """The metrics of a run of two processes."""
    done = outcomes(start_two(options, output))
    assert [code for code, *_ in done] == [0, 0], done
    return metrics(output)


def alone(options: dict[str, Any], output: Path, devices: int = 1) -> list[dict]:
    """The metrics of a run of this process."""
    run_here(options, output, devices)
    return metrics(output)


def when(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    while not condition():
        assert all(process.poll() is None for process in processes), outcomes(processes)
        time.sleep(0.002)


def recorded(output: Path) -> int:
    """The number of steps in metrics.jsonl."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare(ours: list[dict], theirs: list[dict], rtol: float) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "val_loss", "lr"):
        pairs = ([line[name] for line in part if name in line] for part in (ours, theirs))
        np.testing.assert_allclose(*pairs, rtol=rtol, err_msg=name)


@pytest.fixture(scope="module")
def of_one_process(options, place) -> list[dict]:
    """The metrics of the run "alone", from new weights."""
    return alone(options, place / "alone")


@pytest.fixture(scope="module")
def of_pair(options, place, of_one_process) -> dict[str, Any]:
    """Options of the run "pair" of two processes, which starts from a checkpoint (with new weights: test_gcs.py)."""
    options = options | dict(model=str(place / "alone" / "model"), dropout=0.0)
    together(options | dict(checkpoint_minutes=1e-5, keep_checkpoints=20), place / "pair")
    return options


def test_two_processes_train_as_one_does(place, of_one_process, of_pair):
    assert (place / "pair" / "checkpoints" / "1").is_dir()  # both agreed to save after so many minutes
    pair = metrics(place / "pair")
    assert len(pair) == STEPS and pair[0]["loss"] < of_one_process[0]["loss"] - 0.1
    compare(pair, alone(of_pair, place / "single"), rtol=1e-5)
    for name in ("", "best", "checkpoints", "model"):  # both have written it, one process reads it
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
        if len(content) > 2048:  # shards of the embedding that process 0 does not read
            content[100] ^= 1
            path.write_bytes(content)
    done = outcomes(start_two(of_pair, place / "damaged"))
    said = [error.splitlines() for _, _, error in done]
    assert [code for code, *_ in done] == [1, 1], done
    before: Any = None
    for i, why in enumerate(("process 1 failed: see its message", "cannot be read: ")):
        (line,) = [line for line in said[i] if line.startswith("train.py: error: ")]
        assert "checkpoints/12 is damaged: " in line and why in line, line
        before = re.search(r"the one before it, (\d+)$", line)
        assert before, line

    done = outcomes(start_two(of_pair | dict(fall_back=True), place / "damaged"))
    assert [code for code, *_ in done] == [0, 0] and f"steps {before[1]} to 12" in done[0][1], done
    compare(metrics(place / "damaged"), metrics(place / "pair"), rtol=0)


def test_a_killed_process_ends_the_other_sigterm_to_one_stops_both_and_the_run_goes_on(
    place, options, of_one_process, capsys
):
    """A fine-tuning task with LoRA, in three starts of two processes."""
    rows = [f"{word} {word} x" + " self" * i + f"\t{word}" for i in range(20) for word in ("def", "(")]
    (place / "rows.tsv").write_text("\n".join(rows) + "\n")
    options = options | dict(
        task="sequence-classification",
        model=str(place / "alone" / "model"),
        dropout=0.1,
        data=(str(place / "rows.tsv"),),
        lora_rank=2,
        learning_rate=1e-2,
        eval_batches=None,
        steps=40,
        eval_every=20,
    )
    tuned, rare = place / "tuned", options | dict(checkpoint_every=1000)
    processes = start_two(options | dict(checkpoint_every=5), tuned)
    checkpoints = tuned / "checkpoints"
    when(lambda: (checkpoints / "5").exists() and recorded(tuned) >= 8, processes)
    processes[1].kill()
    (code, _, error), (killed, *_) = outcomes(processes)
    said = [line for line in error.splitlines() if line.startswith("process 0 of 2: ")]
    assert killed == -signal.SIGKILL and code == 75 and len(said) == 1, error
    assert "lost process 1 (its connection was closed)" in said[0] and re.search(r"in step \d+ since \d\d:", said[0])
    shutil.copytree(tuned, place / "copy")
    before = metrics(place / "copy")[:8]

    processes = start_two(rare, tuned)  # on two processes again, bit for bit
    assert processes[0].stdout is not None
    first = next(int(match[1]) for line in processes[0].stdout if (match := re.search(r"steps (\d+) to 40", line)))
    when(lambda: recorded(tuned) > max(first, 8), processes)
    processes[1].send_signal(signal.SIGTERM)
    done = outcomes(processes)
    assert [code for code, *_ in done] == [143, 143], done
    assert "SIGTERM: stopped after step" in done[0][1]
    assert max(int(path.name) for path in checkpoints.iterdir()) == len(metrics(tuned))
    compare(metrics(tuned)[:8], before, rtol=0)

    of_two = together(rare, tuned)
    expected = alone(options, place / "tuned alone")
    assert len(expected) == 40 and "val_accuracy" in of_two[-1]
    compare(of_two, expected, rtol=1e-5)
    models = [OPTForSequenceClassification.from_pretrained(place / run) for run in ("tuned", "tuned alone")]
    for ours, theirs in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    capsys.readouterr()
    moved = alone(options | dict(mesh="tensor=2"), place / "copy", devices=2)  # on one process, with other devices
    assert re.search("steps [1-9][0-9]* to 40", capsys.readouterr().out)
    compare(moved, expected, rtol=1e-5)


def test_processes_that_differ_are_told_what_differs(place, options):
    done = outcomes(start_two(options, place / "different", others=dict(seed=1)))
    assert [code for code, *_ in done] == [1, 1]
    for process, (_, _, error) in enumerate(done):
        assert f"train.py: error: process {process}: the processes differ: --seed is 0 on process 0, but 1 on" in error
    assert not (place / "different").exists()


def test_processes_of_different_code_are_told_so(place, options):
    (place / "train.py").write_text(SCRIPT.read_text() + "# changed\n")
    done = outcomes(start_two(options, place / "different", script=place / "train.py"))
    assert [code for code, *_ in done] == [1, 1]
    for process, (_, _, error) in enumerate(done):
        assert f"train.py: error: process {process}: the processes differ: source train.py is " in error
    assert not (place / "different").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_does_not_wait_for_ever_for_the_others_to_start(place, process):
    program = "from opt_jax.parallel.processes import start; "
    program += f"start('on', '{free_address()}', 2, {process}, hang_minutes=0.05)"
    [(code, _, error)] = outcomes([start([sys.executable, "-c", program], devices=1)])
    assert code == 75 and re.fullmatch(rf"process {process}: waited 3 s for the other processes to start: .*\n", error)


JOB = """
import sys, time
from opt_jax.parallel import agreement, processes
seconds = 30 if "error" in sys.argv[3] else 3  # JAX aborts after twice that, which must not come before an error's end
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
    if sys.argv[3] == "an error in both, later in 1":
        time.sleep(4 * jax.process_index())
        raise ValueError("bad file")
    multihost_utils.sync_global_devices("never") if jax.process_index() != int(sys.argv[4]) else time.sleep(1000)
"""


def job(place: Path, what: str, victim: int, log: str = "&2") -> list[subprocess.Popen]:
    """Start two processes, with their messages in `log`: the victim sleeps, and the other waits for it."""
    address, shell = free_address(), ["sh", "-c", f'exec "$@" 2>{log}', "sh"]
    words = [[*shell, sys.executable, "-c", JOB, address, str(i), what, str(victim)] for i in range(2)]
    return [start(command, devices=2) for command in words]


def last_line(error: str, process: int) -> str:
    [said] = [line for line in error.splitlines() if line.startswith(f"process {process} of 2: ")]
    assert " UTC, in the middle since " in said
    return said


def test_an_error_in_one_process_ends_both(place):
    first, second = outcomes(job(place, "error", 1))
    assert first[0] == second[0] == 1
    assert "No such file" in first[1] and "process 0 failed: see its message" in second[1]
    assert "job: error: process 1: bad file\n" in second[2]
    assert "process 1 failed: see its message" in last_line(first[2], 0)


def test_each_process_can_report_its_error_before_process_0_ends(place):
    """JAX aborts the processes that outlive process 0, which therefore waits for them."""
    done = outcomes(job(place, "an error in both, later in 1", 1))
    assert [code for code, *_ in done] == [1, 1]
    for process, (_, _, error) in enumerate(done):
        assert f"job: error: process {process}: bad file\n" in error


WRITING = """
import resource, sys
from opt_jax.parallel import processes
with processes.last_words("job"):
    processes.start("on", sys.argv[1], 2, int(sys.argv[2]), hang_minutes=1)
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from opt_jax.parallel.mesh import batch_sharding, make_mesh, replicated
    from opt_jax.training import checkpoints
    from opt_jax.training.step import TrainState
    checkpoints._AFTER_ERROR_SECONDS = 2
    mesh = make_mesh("fsdp=2")
    put = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    rows, whole = batch_sharding(mesh), replicated(mesh)
    model, moments = {"w": put(np.ones(40_000), rows)}, {"m": put(np.ones(40_000), rows)}
    state = TrainState(put(np.asarray(1), whole), model, moments, put(np.asarray(False), whole))
    with checkpoints.Checkpoints(sys.argv[3], keep=1) as writing:
        if jax.process_index() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as on a full disk
        writing.save(1, state)
        if jax.process_index() == 0:
            raise OSError("no room for the metrics")
        multihost_utils.sync_global_devices("the next step")
"""


def test_an_error_is_not_held_up_by_a_checkpoint_that_is_never_complete(place):
    address = free_address()
    words = [[sys.executable, "-c", WRITING, address, str(i), str(place / "never-complete")] for i in range(2)]
    done = outcomes([start(command) for command in words])
    assert [code for code, *_ in done] == [1, 1], done
    assert "job: error: process 0: no room for the metrics\n" in done[0][2]
    assert f"{place / 'never-complete' / '1'} was not complete after 2 s: the next start uses" in done[0][2]
    assert not (place / "never-complete" / "1").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("what", ["error", "an error in both, later in 1"])
def test_an_error_ends_both_though_nobody_can_write_it_down(place, what):
    assert [code for code, *_ in outcomes(job(place, what, 1, log="/dev/full"))] == [1, 1]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_silent_process_is_lost(place, sent):
    """Process 0 is the one. Process 1 is killed in a run above, and silent below."""
    processes = job(place, "", 0)
    for process in processes:
        assert process.stdout is not None
        assert any("process 0 failed" in line or "No such file" in line for line in process.stdout)  # both have started
    processes[0].send_signal(sent)
    [(code, _, error)] = outcomes([processes[1]])
    processes[0].kill()
    outcomes([processes[0]])
    why = "its connection was closed" if sent == signal.SIGKILL else "nothing heard of it for 3 s"
    assert code == 75 and f"lost process 0 ({why})" in last_line(error, 1)


# Two sleeping processes without JAX, which takes seconds to start.
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
        program = [
            sys.executable,
            "-c",
            WATCHED,
            str(REPOSITORY / "opt_jax" / "parallel" / "watchdog.py"),
            str(process),
        ]
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
    [(code, _, error)] = outcomes(processes[:1])
    processes[1].kill()
    outcomes(processes[1:])
    assert code == 75 and "lost process 1 (nothing heard of it for 2 s)" in last_line(error, 0)


def test_a_job_that_stands_still_ends():
    done = outcomes(watched(hang_minutes=0.05))
    assert [code for code, *_ in done] == [75, 75]
    said = [last_line(error, process) for process, (*_, error) in enumerate(done)]
    assert any("no progress for 0.05 minutes" in line for line in said), said  # the other reports the first one as lost
