"""What training steps wait for: their data, on disks of different speeds, and checkpoints.

Run: `.venv/bin/python -m benchmarks.stalls data` and `.venv/bin/python -m benchmarks.stalls checkpoint`, on a CPU.

- data: `train.py` on an array whose every read takes so many milliseconds longer, with its read-ahead and with a loop
  that reads a batch when it needs it. The table has the share of the time in which the loop waited for data while no
  step was under way (`data_seconds` in metrics.jsonl), from the second step on.
- checkpoint: steps of a 125M, whose state is 1.5 GB, with and without a checkpoint. The loop waits until the state is
  copied; the checkpoint is then written beside the steps, and slows them down. The sum of both, in 5 minutes.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import train
from benchmarks.contestants import machine, spread
from opt_jax.data.tokens import Tokens
from opt_jax.data.windows import Windows
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.options import SMALL
from opt_jax.training.setup import make_setup
from opt_jax.training.step import place_batch

INTERVAL = 300  # seconds from a checkpoint to the next


@contextlib.contextmanager
def reader_without_read_ahead(
    windows: Windows, _rows: Any, first: int, last: int, _workers: int, waiting: Callable
) -> Iterator[Any]:
    """Like `Windows.reader`, but a batch is read when it is needed."""

    def batches() -> Iterator[Callable]:
        for step in range(first, last):
            with waiting():
                ids = windows.rows(step)
            yield lambda rows, ids=ids: windows.as_batch(ids[rows])

    yield batches()


def slow_reads(seconds: float) -> Any:
    """A context in which each read of tokens takes that much longer."""
    read = Tokens.read

    def slow(tokens: Tokens, start: int, length: int) -> np.ndarray:
        time.sleep(seconds)
        return read(tokens, start, length)

    return mock.patch.object(Tokens, "read", slow)


def data_run(directory: Path, milliseconds: float, read_ahead: bool, steps: int) -> tuple[float, float, int]:
    """(seconds of a step, share of the time in which steps waited, number of steps that waited)."""
    options = train.Options(
        data=(str(directory / "ids.npy"),),
        tokenizer="tiny",
        model=str(directory / "config.json"),
        output=str(directory / f"{milliseconds}-{read_ahead}"),
        stop_after=steps,
        eval_every=1000,
        checkpoint_every=1000,
    )
    reader = Windows.reader if read_ahead else reader_without_read_ahead
    with (
        slow_reads(milliseconds / 1000),
        mock.patch.object(Windows, "reader", reader),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        train.main(options)
    text = (Path(options.output) / "metrics.jsonl").read_text()
    first, *lines = (json.loads(line) for line in text.splitlines())
    waits = [line["data_seconds"] for line in lines if "data_seconds" in line]
    total = lines[-1]["time"] - first["time"]
    return total / len(lines), sum(waits) / total, len(waits)


def data(steps: int) -> None:
    columns = ["reads take longer by", "step", "waited for data", f"steps that waited, of {steps - 1}"]
    columns += ["step, without read-ahead", "waited for data"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "config.json").write_text(json.dumps(dataclasses.replace(SMALL, vocab_size=4096).to_hf()))
        np.save(Path(path) / "ids.npy", np.random.default_rng(0).integers(4, 300, 1 << 19).astype(np.uint16))
        for milliseconds in (0, 20, 100):
            ours, share, waits = data_run(Path(path), milliseconds, True, steps)
            other, other_share, _ = data_run(Path(path), milliseconds, False, steps)
            print(
                f"| {milliseconds} ms | {ours * 1000:.0f} ms | {share:.1%} | {waits} | "
                f"{other * 1000:.0f} ms | {other_share:.1%} |",
                flush=True,
            )


def checkpoint(model: str, tokens: int, repeats: int) -> None:
    mesh = make_mesh("data=1", jax.devices()[:1])
    setup = make_setup(train.Options(model=model, batch_size=1, seq_len=tokens), mesh)
    state, train_step = setup.first_state(), setup.make_train_step()
    ids = np.random.default_rng(0).integers(4, 50_000, (1, tokens + 1), np.int32)
    batch = place_batch(lambda rows: {"input_ids": ids[rows, :-1], "labels": ids[rows, 1:]}, 1, 1, mesh)

    def step() -> float:
        nonlocal state
        begin = time.perf_counter()
        with use_mesh(mesh):
            state, measured = train_step(state, batch)
        jax.block_until_ready((state, measured))
        return time.perf_counter() - begin

    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    [step() for _ in range(3)]
    begin = time.perf_counter()
    copies = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    copying = time.perf_counter() - begin
    del copies
    blocked, slower, written, alone = [], [], [], []
    with tempfile.TemporaryDirectory() as path, Checkpoints(path, keep=1) as checkpoints:
        for number in range(1, repeats + 1):
            alone += [step() for _ in range(4)]
            begin = time.perf_counter()
            checkpoints.save(number, state)
            blocked.append(time.perf_counter() - begin)
            beside = []
            while not (Path(path) / str(number)).exists():
                beside.append(step())
            written.append(time.perf_counter() - begin)
            slower.append(sum(beside) - len(beside) * statistics.median(alone))
    cost = statistics.median(blocked) + statistics.median(slower)
    print(f"a state of {nbytes / 1e9:.2f} GB; a plain copy of it takes {copying:.2f} s\n")
    print("| seconds | median | range |\n|---|---|---|")
    print(f"| a step of {tokens} tokens alone | {spread(alone)} |")
    print(f"| the loop waits for a checkpoint | {spread(blocked)} |")
    print(f"| until it is on the disk | {spread(written)} |")
    print(f"| the steps meanwhile take longer by, together | {spread(slower)} |\n")
    print(f"one checkpoint in {INTERVAL // 60} minutes costs {cost:.2f} s, {cost / INTERVAL:.2%} of the time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data", "checkpoint"])
    parser.add_argument("--steps", type=int, default=20, help="of each run on a slow disk")
    parser.add_argument("--model", default="125m")
    parser.add_argument("--tokens", type=int, default=128, help="of a step beside a checkpoint")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints")
    args = parser.parse_args()
    print(machine("jax", "orbax-checkpoint"))
    if args.what == "data":
        data(args.steps)
    else:
        checkpoint(args.model, args.tokens, args.repeats)
