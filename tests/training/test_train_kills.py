"""After a kill at any moment, SIGTERM, Ctrl-C or a full disk, the same command goes on, bit for bit."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.processes import environment
from support.training_runs import run_options

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 40

# Imports once, and forks a run for each moment, because starting Python takes seconds.
KILLER = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import train
from opt_jax.parallel import processes
options, place, moments = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
options["data"] = tuple(options["data"])
uninterrupted, killed = place / "uninterrupted", place / "killed"

def fork(output, most_bytes=None):
    if (child := os.fork()) == 0:  # JAX starts its threads in the children only
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 1
        if most_bytes:  # in a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            with processes.last_words("train.py"):
                code = train.main(train.Options(**options, output=str(output))) or 0
        except SystemExit as e:
            code = e.code
            if isinstance(code, str):
                print(code, file=sys.stderr, flush=True)
                code = 1
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return child

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def alive(child):
    return not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)

def lines(output):
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    complete = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\\n")]
    of_time = {"tokens_per_s", "mfu", "memory_bytes", "time", "began"}
    return [{k: v for k, v in line.items() if k not in of_time and not k.endswith("_seconds")} for line in complete]

def saved(output):
    return [int(path.name) for path in (output / "checkpoints").glob("*") if path.name.isdecimal()]

def saving(output):
    return any("tmp" in path.name for path in (output / "checkpoints").glob("*"))

assert status(fork(uninterrupted)) == 0
expected, rng, seen = lines(uninterrupted), random.Random(0), dict(early=0, saving=0, later=0, killed=0)
assert [line["step"] for line in expected] == list(range(1, options["steps"] + 1))
for kind, wanted in moments:
    if kind == "full":
        before = saved(killed)
        assert status(fork(killed, most_bytes=20_000)) == 1
        assert saved(killed) == before
        continue
    child = fork(killed)
    if kind == "early":  # in the first step
        while alive(child) and not (killed / "run.json").exists():
            time.sleep(0.001)
    elif kind == "anywhere":
        time.sleep(3 * rng.random())
    else:
        while alive(child) and len(lines(killed)) < wanted:
            time.sleep(0.001)
    while kind in ("saving", "terminate", "interrupt") and alive(child):
        while alive(child) and not saving(killed):
            pass
        if kind != "saving":
            break
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        if saving(killed):  # still
            break
        os.kill(child, signal.SIGCONT)
    assert alive(child), (kind, lines(killed)[-1:])
    if kind in ("terminate", "interrupt"):
        os.kill(child, signal.SIGTERM if kind == "terminate" else signal.SIGINT)
        assert status(child) == (143 if kind == "terminate" else 130)
        seen[kind] = max(saved(killed))
        assert len(lines(killed)) == seen[kind]
    else:
        os.kill(child, signal.SIGKILL)
        assert status(child) == -signal.SIGKILL
        seen["killed"] += 1
    seen["early"] += not saved(killed)
    seen["saving"] += saving(killed)
    seen["later"] += len(lines(killed)) > 0
    assert lines(killed) == expected[: len(lines(killed))], (kind, lines(killed)[-1])
    if kind == "later":
        with (killed / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "lo')  # a line that was being written
assert status(fork(killed)) == 0
assert lines(killed) == expected
every = options["checkpoint_every"]  # what the stops saved counts among the last two, and may be of any step
kept = sorted({*range(every, options["steps"] + 1, every), seen["terminate"], seen["interrupt"]})[-2:]
assert sorted(saved(killed)) == kept, (saved(killed), kept)
assert len(list((killed / "checkpoints").iterdir())) == 2
assert [os.listdir(output / "best") for output in (uninterrupted, killed)] == [[str(options["steps"])]] * 2
print(json.dumps(seen))
"""


def choose(sample) -> list[tuple[str, float]]:
    """(kind, share of the steps before it) of each interruption.

    There are SIGTERM, Ctrl-C, a full disk, and kills: in the first step, while a checkpoint is written, and later. With
    --exhaustive there are ten kills.
    """
    draw = random.Random(0)
    parts = [(i + draw.random()) / 13 for i in range(13)]
    kinds = dict(early=[0], anywhere=sample([5], 0), saving=sample([1, 3, 9], 1), later=sample([2, 4, 6, 8, 10], 1))
    kinds |= dict(terminate=[7], full=[11], interrupt=[12])
    numbers = [(i, kind) for kind, chosen in kinds.items() for i in chosen]
    return [(kind, parts[i]) for i, kind in sorted(numbers)]


def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path, sample):
    changes = dict(steps=STEPS, batch_size=4, warmup_steps=5, eval_every=20)
    options = run_options(tmp_path, positions=32, mesh="data=1", **changes)
    moments = [(kind, part * STEPS) for kind, part in choose(sample)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(options), str(tmp_path), json.dumps(moments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=500,
        check=False,
    )
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert done.returncode == 0, done.stderr + log[-3000:]
    seen = json.loads(done.stdout)
    count = Counter(kind for kind, _ in moments)
    assert seen["killed"] == len(moments) - 3 and seen["early"] >= 1, seen
    assert seen["saving"] >= count["saving"] and seen["later"] >= count["saving"] + count["later"], seen
    assert re.search(rf"steps [1-9]\d* to {STEPS}", log)  # it went on
    for kind, what in (("terminate", "SIGTERM"), ("interrupt", "Ctrl-C")):
        stopped = re.search(rf"{what}: stopped after step (\d+) of {STEPS}, and saved it", log)
        assert stopped and int(stopped[1]) == seen[kind], seen
    said = r"^train.py: error: .*/(?:checkpoints|best)/\d+: File too large \([\d,]+ bytes are needed\): .*$"
    assert len(re.findall(said, log, re.M)) == 1 and "Traceback" not in log and "loop is closed" not in log, log
