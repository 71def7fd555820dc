"""A training run that is interrupted again and again, and started again each time, as a launcher would.

Run: `.venv/bin/python -m benchmarks.endurance --kills 1000 --processes 2` (a night). It trains a small OPT with
`train.py` in processes of this machine, on the CPU, once without interruptions and once with them. In the end the
metrics of every step must be equal, bit for bit. It prints what was done, and the time from each kill to the first new
step. `--cache` gives the process JAX's persistent compilation cache. Runs of several CPUs do not use it.

The interruptions, at random moments, each of one process of the run:

- kill: SIGKILL. The others find out and end (exit code 75).
- stop: SIGSTOP, so that it is there but silent. A run of one process goes on a second later. In a run of more, the
  others end, and the silent one is killed.
- term: SIGTERM, as of a preemption. All save a checkpoint and end (143).
- disk: no process can write a file of more than a few KB, as on a full disk. The run ends with an error (1).
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.contestants import machine

ROOT = Path(__file__).parents[1]
KINDS = ("kill", "stop", "term", "disk")
_SMALL = 20_000  # bytes of a file on the "full disk"; a checkpoint needs more
_TIME = ("tokens_per_s", "mfu", "memory_bytes", "time", "began")
# The exit codes after each kind of interruption, but for that of a process which was killed. 0: the run had finished;
# 75: another process was lost; 1: an error.
_ENDS = {"kill": (0, 75), "stop": (0, 75), "term": (0, 143), "disk": (0, 75, 1)}
_LONGEST = 600  # seconds without a new step


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of train.py: its directory, and how it is started."""

    directory: Path
    data: Path
    steps: int
    processes: int
    cache: Path | None

    def start(self) -> list[subprocess.Popen]:
        """Start all processes, with their messages in a file."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "train.py", "--output", str(self.directory), "--data", str(self.data)]
        command += ["--steps", str(self.steps), "--batch-size", "8", "--seq-len", "64", "--checkpoint-every", "10"]
        command += ["--warmup-steps", "10", "--eval-every", "50", "--eval-batches", "2", "--log-every", "1000"]
        settings = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if self.cache is not None:
            limits = {"MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "0"}
            settings["JAX_COMPILATION_CACHE_DIR"] = str(self.cache)
            settings |= {f"JAX_PERSISTENT_CACHE_{name}": value for name, value in limits.items()}
        started = []
        for i in range(self.processes):
            job = ["--coordinator-address", address, "--num-processes", str(self.processes), "--process-id", str(i)]
            job += ["--heartbeat-seconds", "10"]
            with open(self.directory.with_suffix(".log"), "a", encoding="utf-8") as log:
                words = command + (job if self.processes > 1 else [])
                started.append(
                    subprocess.Popen(words, cwd=ROOT, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT)
                )
        return started

    def done(self) -> int:
        """The number of steps in metrics.jsonl."""
        path = self.directory / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def lines(self) -> list[dict]:
        """The metrics of each step, without times."""
        lines = map(json.loads, (self.directory / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if k not in _TIME and not k.endswith("_seconds")} for line in lines]


def ended(run: Run, started: list[subprocess.Popen], limit: float, frozen: int | None = None) -> list[int]:
    """The exit codes. The process `frozen` is not waited for, but killed when the others have ended.

    If another one has not ended after `limit` seconds, all are killed, and this program ends.
    """
    end = time.monotonic() + limit
    while running := [i for i, each in enumerate(started) if each.poll() is None and i != frozen]:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    for process in started:
        process.kill()
    if running:
        sys.exit(f"process {running[0]} did not end in {limit:.0f} s: see {run.directory.with_suffix('.log')}")
    return [process.wait() for process in started]


def interrupt(run: Run, started: list[subprocess.Popen], kind: str, victim: int) -> list[int]:
    """Do one interruption, and wait until all processes have ended. Returns their exit codes."""
    process = started[victim]
    if kind == "kill":
        process.kill()
    elif kind == "term":
        process.send_signal(signal.SIGTERM)
    elif kind == "disk":
        for each in started:
            resource.prlimit(each.pid, resource.RLIMIT_FSIZE, (_SMALL, _SMALL))
    else:
        process.send_signal(signal.SIGSTOP)
        if run.processes == 1:
            time.sleep(1)
            process.send_signal(signal.SIGCONT)
            return []
    return ended(run, started, 180, victim if kind == "stop" else None)


def endure(run: Run, kills: int, kinds: list[str], seed: int, longest_wait: float) -> tuple[Counter, dict]:
    """Run to the last step with `kills` interruptions. Returns their number by kind, and seconds to the next step."""
    rng, count, waits = random.Random(seed), Counter(), {kind: [] for kind in kinds}
    started, stopped = run.start(), None
    while True:
        before, begin = run.done(), time.monotonic()
        # A start counts once it has written a line; then the next interruption waits a random time.
        while run.done() <= before and any(process.poll() is None for process in started):
            if time.monotonic() - begin > _LONGEST:
                for process in started:
                    process.kill()
                sys.exit(f"no step in {_LONGEST} s: see {run.directory.with_suffix('.log')}")
            time.sleep(0.01)
        if stopped is not None:
            kind, moment = stopped
            waits[kind].append(time.monotonic() - moment)
        if sum(count.values()) < kills:
            time.sleep(rng.random() * longest_wait)
        else:
            ended(run, started, 24 * 3600)
        if all(process.poll() is not None for process in started):
            codes = [process.returncode for process in started]
            if codes == [0] * run.processes:
                return count, waits
            sys.exit(f"ended with {codes} by itself: see {run.directory.with_suffix('.log')}")
        kind, stopped = rng.choice(kinds), None
        moment = time.monotonic()
        victim = rng.randrange(run.processes)
        codes = interrupt(run, started, kind, victim)
        killed = victim if kind in ("kill", "stop") else None
        if any(
            code not in _ENDS[kind] and not (i == killed and code == -signal.SIGKILL) for i, code in enumerate(codes)
        ):
            sys.exit(f"{kind}: exit codes {codes}: see {run.directory.with_suffix('.log')}")
        count[kind] += 1
        if codes:
            if all(code == 0 for code in codes):  # it had finished
                return count, waits
            stopped = kind, moment
            started = run.start()
        print(f"{sum(count.values())} of {kills} interruptions, step {run.done()}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: 30 for each interruption")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--wait", type=float, default=5.0, help="the longest time from a new step to an interruption")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--directory", type=Path, help="is kept; default: a temporary one, kept after a failure")
    options = parser.parse_args()
    if options.cache and options.processes > 1:
        parser.error("--cache without effect: runs of several processes on CPUs do not use it; leave it out")
    steps = options.steps or 30 * options.kills
    place = options.directory or Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    if any(place.iterdir()):
        sys.exit(f"--directory {place}: holds files already, perhaps of another run: name a new one")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["def", "return", "self", "x", "(", ")", "\n"], k=300)) for _ in range(400)]
    (place / "text.txt").write_text("\n\n".join(texts))
    cache = place / "cache" if options.cache else None
    uninterrupted, broken = (
        Run(place / name, place / "text.txt", steps, options.processes, cache) for name in ("whole", "interrupted")
    )
    if ended(uninterrupted, uninterrupted.start(), 24 * 3600) != [0] * options.processes:
        sys.exit(f"the run without interruptions failed: see {place / 'whole.log'}")
    begin = time.monotonic()
    count, waits = endure(broken, options.kills, options.kinds, options.seed, options.wait)
    seconds = time.monotonic() - begin
    equal = broken.lines() == uninterrupted.lines()
    print(f"\n{machine('jax')}\n")
    print(f"{steps} steps, {options.processes} processes, {seconds / 60:.1f} minutes, {dict(count)}")
    print("| | interruptions | seconds to the next step, median | range |\n|---|---|---|---|")
    for kind, times in waits.items():
        if times:
            spread = f"{min(times):.1f}-{max(times):.1f}"
            print(f"| {kind} | {count[kind]} | {statistics.median(times):.1f} | {spread} |")
    print(f"metrics equal to the run without interruptions, bit for bit: {'yes' if equal else 'NO'}")
    if equal and options.directory is None:  # otherwise the messages name its logs
        shutil.rmtree(place)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
