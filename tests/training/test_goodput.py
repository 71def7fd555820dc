"""Where the time of a run goes. tests/training/test_train_script.py has the lines of a real run."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from opt_jax.training import goodput
from opt_jax.training.metrics import Metrics, cut_back
from opt_jax.training.plot import plot_runs

SPENT = {f"{name}_seconds" for name in goodput.ACTIVITIES}
# Two starts. The first is killed after step 3, of which nothing is left: its checkpoint was that of step 2.
LINES = [
    {"step": 1, "time": 130.0, "began": 100.0, "start_seconds": 10.0, "compile_seconds": 15.0, "data_seconds": 1.0},
    {"step": 2, "time": 140.0, "validation_seconds": 2.0},
    {"step": 3, "time": 190.0, "began": 160.0, "start_seconds": 8.0, "restore_seconds": 4.0, "compile_seconds": 9.0},
    {"step": 4, "time": 200.0, "checkpoint_seconds": 3.0},
]


def test_sum():
    """Each second is in a step, in one activity, or between two starts."""
    result = goodput.goodput(LINES)
    assert result is not None
    lost = dict(start=18, restore=4, compile=24, data=1, validation=2, checkpoint=3, restarts=20)
    assert result.lost == lost
    assert result.total == 100 and result.steps == 100 - sum(lost.values()) and result.share == 0.28
    assert str(result) == (
        "goodput 28.0% of 0:01:40 h (start 18.0%, restore 4.0%, compile 24.0%, data 1.0%, validation 2.0%, "
        "checkpoint 3.0%, restarts 20.0%)"
    )


def test_runs_of_before_count_from_their_next_start():
    old = [{"step": 1, "step_seconds": 5.0}, {"step": 2, "step_seconds": 5.0}]
    assert goodput.goodput(old) is None and goodput.goodput([]) is None
    assert goodput.goodput([*old, *LINES[2:]]) == goodput.goodput(LINES[2:])


def test_null_is_as_good_as_nothing():
    """Tables of other programs have a null where a line has no value."""
    names = {name for line in LINES for name in line}
    assert goodput.goodput(dict.fromkeys(names) | line for line in LINES) == goodput.goodput(LINES)


def test_a_clock_that_is_set_back():
    lines = [LINES[0], {"step": 2, "time": 50.0}, {"step": 3, "time": 60.0}]
    result = goodput.goodput(lines)
    assert result is not None and result.total == 40 and result.steps == 14


def test_seconds_are_in_the_lines(tmp_path):
    """Of a batch that was waited for, of a validation and of a checkpoint; each once."""
    goodput.end()
    path, measured = tmp_path / "metrics.jsonl", dict(loss=1.0, lr=1.0, grad_norm=1.0, skipped=False)
    logged: list[dict] = []
    logger: Any = SimpleNamespace(write=logged.append, close=lambda: None)
    with Metrics(path, start=0, steps=2, tokens_per_step=1, log_every=9, loggers=[logger]) as metrics:
        with goodput.spend("data"):
            time.sleep(0.2)
        for step in (1, 2):
            metrics.record(step, measured, (lambda: time.sleep(0.1)) if step == 2 else None)
            with goodput.spend("checkpoint"):
                time.sleep(0.15)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["data_seconds"] >= 0.2 and "checkpoint_seconds" not in first and "validation_seconds" not in first
    assert "began" not in second and second["checkpoint_seconds"] >= 0.15 and second["validation_seconds"] >= 0.1
    assert first["time"] - first["began"] >= 0.2 + first["start_seconds"]
    for line, numbers in zip((first, second), logged, strict=True):  # TensorBoard would draw the clock as a curve
        assert numbers == {name: value for name, value in line.items() if name not in ("time", "began")}
    assert second["time"] - first["time"] >= sum(v for k, v in second.items() if k in SPENT)
    summary = metrics.goodput()
    assert summary is not None and summary.startswith("goodput ")
    assert goodput.take() == {}


def start_of_a_run(path, step, steps):
    """What train.py does with the metrics in a start that begins at `step`."""
    cut_back(path, step, pytest.fail)
    measured = dict(loss=1.0, lr=1.0, grad_norm=1.0, skipped=False)
    with Metrics(path, start=step, steps=step + steps, tokens_per_step=1, log_every=9) as metrics:
        for i in range(steps):
            metrics.record(step + i + 1, measured)
    return metrics


def test_starts_of_which_no_step_is_left_count(tmp_path):
    """A run that is killed before its first checkpoint begins again with an empty file."""
    path = tmp_path / "metrics.jsonl"
    first = start_of_a_run(path, 0, 1)
    (line,) = map(json.loads, path.read_text().splitlines())
    for _ in range(2):
        time.sleep(0.1)
        start_of_a_run(path, 0, 1)
    (last,) = map(json.loads, path.read_text().splitlines())
    assert last["began"] == line["began"]
    assert last["restarts_seconds"] >= 0.1 and last["start_seconds"] >= 0.1  # a start begins when the last one ends
    result = goodput.goodput([last])
    assert result is not None and result.total == pytest.approx(last["time"] - line["began"])
    assert sum(result.lost.values()) <= result.total and str(first.goodput()).count("restarts") == 1
    start_of_a_run(tmp_path / "another.jsonl", 0, 1)
    assert "restarts_seconds" not in json.loads((tmp_path / "another.jsonl").read_text())


def test_a_start_without_a_step_is_no_checkpoint(tmp_path):
    """A run that is killed while it exports its model, and is started again an hour later."""
    path = tmp_path / "metrics.jsonl"
    hour_ago = time.time() - 3600
    goodput.end()
    path.write_text(json.dumps({"step": 1, "time": hour_ago, "began": hour_ago - 3600}) + "\n")
    summary = start_of_a_run(path, 1, 0).goodput()
    assert summary is not None and summary.startswith("goodput 50.0% of 2:00:0") and "restarts 50.0%" in summary
    assert "checkpoint" not in summary


def test_the_picture_names_it(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda figure, file, **_: (drawn.append(figure), file.write(b"")))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line | {"loss": 1.0}) + "\n" for line in LINES))
    plot_runs([tmp_path], tmp_path / "curves.png")
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == [f"{tmp_path.name}, goodput 28%"]
