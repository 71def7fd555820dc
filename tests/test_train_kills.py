"""Whatever ends a run, the same command goes on as if nothing had happened: kills at any moment, SIGTERM."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

from opt_jax import OPTConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

# Imports once, then forks a run per moment: most of the time would go into starting Python otherwise.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import train
options, place, moments = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
options["data"] = tuple(options["data"])
whole, killed = place / "whole", place / "killed"

def fork(output):
    if (child := os.fork()) == 0:  # JAX starts its threads in the children only
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 1
        try:
            code = train.main(train.Options(**options, output=str(output))) or 0
        except SystemExit as e:
            code = e.code
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
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\\n")]
    return [{k: line[k] for k in ("step", "loss", "grad_norm", "lr", "val_loss") if k in line} for line in found]

def saving(output):
    return any("tmp" in path.name for path in (output / "checkpoints").glob("*"))

assert status(fork(whole)) == 0
expected, rng, seen = lines(whole), random.Random(0), dict(saving=0, later=0, terminated=0, killed=0)
assert [line["step"] for line in expected] == list(range(1, options["steps"] + 1))
for i in range(moments):
    child = fork(killed)
    if i not in (0, 5):  # behind some step; these two anywhere
        wanted = options["steps"] * (i + rng.random()) / (moments + 1)
        while alive(child) and len(lines(killed)) < wanted:
            time.sleep(0.001)
    else:
        time.sleep(3 * rng.random())
    while i % 2 and alive(child) and not saving(killed):
        pass
    assert alive(child), (i, lines(killed)[-1:])
    if i == 7:
        os.kill(child, signal.SIGTERM)
        assert status(child) == 143
        seen["terminated"] += max(int(p.name) for p in (killed / "checkpoints").iterdir()) == len(lines(killed))
    else:
        os.kill(child, signal.SIGKILL)
        assert status(child) == -signal.SIGKILL
        seen["killed"] += 1
    seen["saving"] += saving(killed)
    seen["later"] += len(lines(killed)) > 0
    assert lines(killed) == expected[: len(lines(killed))], (i, lines(killed)[-1])
assert status(fork(killed)) == 0
assert lines(killed) == expected
for name in ("checkpoints", "best"):
    names = [sorted(path.name for path in (output / name).iterdir()) for output in (whole, killed)]
    assert names[0] == names[1], names
print(json.dumps(seen))
"""


def test_killed_at_ten_moments_it_goes_on_bit_for_bit(tmp_path):
    """Ten times SIGKILL, and once, between them, SIGTERM."""
    config = OPTConfig(
        vocab_size=304, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=32, dropout=0.1, init_std=0.05,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["def", "return", "self", "x", "(", ")"], k=60)) for _ in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = dict(
        data=[str(tmp_path / "text.jsonl")], model=str(tmp_path / "config.json"), mesh="data=1", steps=100,
        batch_size=4, warmup_steps=5, learning_rate=6e-4, checkpoint_every=3, eval_every=10, eval_batches=1,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(options), str(tmp_path), "11"],
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=500, check=False,
    )  # fmt: skip
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert done.returncode == 0, done.stderr + log[-3000:]
    seen = json.loads(done.stdout)
    assert seen["saving"] >= 3 and seen["later"] >= 7 and seen["terminated"] == 1 and seen["killed"] == 10, seen
    assert re.search(r"SIGTERM: stopped after step \d+ of 100, and saved it", log)
