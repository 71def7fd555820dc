"""`opt-jax plot`: curves of runs as a PNG."""

import builtins
import json
import re

import pytest
from support.processes import largest_file

from opt_jax.cli import main

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(directory, steps=30, bad=()):
    directory.mkdir()
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 5 / step, "lr": 1e-3, "grad_norm": 1 + 1 / step, "tokens_per_s": 100.0 + step}
        line |= {"val_loss": 6 / step} if step % 10 == 0 else {}
        line |= {"loss": None, "grad_norm": None, "skipped": 1} if step in bad else {}
        lines.append(json.dumps(line) + "\n")
    (directory / "metrics.jsonl").write_text("".join(lines) + '{"step": 99, "lo')  # a line that is being written
    return directory


def curves(monkeypatch):
    """A dict {panel: {label: (x, y)}} that is filled when a figure is saved."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = {}
    save = figure.Figure.savefig

    def look(self, *args, **kwargs):
        for axes in self.axes:
            drawn[axes.get_title()] = {
                line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
            }
            for right in axes.child_axes:
                drawn[right.get_ylabel()] = right.yaxis.get_major_formatter()(2.0, 0)
        save(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", look)
    return drawn


def test_one_run_is_drawn_into_its_directory(tmp_path, capsys, monkeypatch):
    drawn = curves(monkeypatch)
    run = make_run(tmp_path / "run")
    assert main(["plot", str(run)]) == 0
    assert (run / "curves.png").read_bytes().startswith(PNG)
    assert capsys.readouterr().out == f"{run / 'curves.png'}\n"
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "metrics.jsonl"]
    assert drawn.pop("perplexity") == "7.39"  # at the height of loss 2
    assert drawn.keys() == {"loss", "learning rate", "gradient norm", "tokens/s"}
    steps = list(range(1, 31))
    assert drawn["loss"] == {
        "run": (steps, [5 / step for step in steps]),
        "run, validation": ([10, 20, 30], [6 / step for step in (10, 20, 30)]),
    }
    assert drawn["learning rate"] == {"run": (steps, [1e-3] * 30)}
    assert drawn["gradient norm"]["run"][1][:2] == [2.0, 1.5] and drawn["tokens/s"]["run"][1][0] == 101.0


def test_several_runs_with_gaps_to_a_named_file(tmp_path, monkeypatch):
    drawn = curves(monkeypatch)
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=5, bad=(2, 3))]
    assert main(["plot", *map(str, runs), "--output", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
    x, y = drawn["loss"]["b"]
    assert x == [1, 2, 3, 4, 5] and y[0] == 5 and y[1] != y[1] and y[2] != y[2] and y[3] == 1.25
    assert "b, validation" not in drawn["loss"] and "a, validation" in drawn["loss"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no metrics.jsonl in .*run: is it the --output of a training run[?]"),
        ("", "metrics.jsonl is empty: no step was done yet"),
        ('{"step": 1, "lo', "metrics.jsonl is empty"),
        ('{"step": 1, "loss": 2.0}\n[3]\n', "metrics.jsonl:2: not a line that train.py writes"),
        ('{"loss": 2.0}\n', "metrics.jsonl:1: not a line that train.py writes"),
    ],
)
def test_bad_runs_are_one_clear_error(tmp_path, capsys, content, message):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    assert main(["plot", str(run)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("opt-jax: error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (run / "curves.png").exists()


def test_a_file_that_is_no_picture_is_not_replaced(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["plot", str(run), "--output", str(run / "metrics.jsonl")]) == 1
    assert "metrics.jsonl is there already, and is not a PNG: move it elsewhere" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before and len(list(run.iterdir())) == 1
    for content in (b"", PNG + b"an older one"):
        (tmp_path / "c.png").write_bytes(content)
        assert main(["plot", str(run), "--output", str(tmp_path / "c.png")]) == 0
        assert len((tmp_path / "c.png").read_bytes()) > 1000


def test_a_full_disk_names_the_bytes_needed(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    with largest_file(1000):
        assert main(["plot", str(run)]) == 1
    said = capsys.readouterr().err
    assert re.search(r"curves.png: File too large \([\d,]{5,} bytes are needed\): ", said), said
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_no_run_and_no_matplotlib(tmp_path, capsys, monkeypatch):
    assert main(["plot"]) == 1
    assert capsys.readouterr().err == "opt-jax: error: no run: name its directory, as in opt-jax plot runs/small\n"
    run = make_run(tmp_path / "run")
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["plot", str(run)]) == 1
    assert "plot needs the package matplotlib" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_names_of_runs_are_shown_as_they_are(tmp_path, monkeypatch):
    drawn = curves(monkeypatch)
    run = make_run(tmp_path / r"a$\frac$b")
    monkeypatch.chdir(run)
    for name in (str(run), "."):
        assert main(["plot", name]) == 0
        assert list(drawn["learning rate"]) == [r"a\$\frac\$b"]
