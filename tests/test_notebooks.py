"""The notebooks run with the embedded model, without warnings, and give the outputs that are stored in them.

tests/support/notebooks.py has the rule by which outputs are compared, and stores them (`make notebooks`).
"""

import copy
import importlib
import os
import re

import pytest
from conftest import REPOSITORY

pytest.importorskip("nbclient", reason="nbclient runs the notebooks")
nbformat = pytest.importorskip("nbformat", reason="nbformat reads the notebooks")
pytest.importorskip("PIL", reason="Pillow, which matplotlib needs, makes their pictures small")

from support import notebooks  # noqa: E402 - it imports them

PATHS = sorted((REPOSITORY / "examples").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@pytest.mark.slow
@each_notebook
def test_it_gives_the_outputs_that_it_stores(path, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # Users have one device.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    importlib.import_module("matplotlib.font_manager")  # builds its cache now, because it logs that
    notebook = notebooks.read(path)
    executed = notebooks.execute(notebook, tmp_path)
    warnings = [text for cell in executed.cells for kind, text in notebooks.outputs(cell) if kind == "stderr"]
    assert warnings == []
    assert notebooks.differences(notebook, executed) == [], "run `make notebooks` and look at what changed"


@each_notebook
def test_it_is_stored_with_outputs_and_without_traces_of_a_machine(path):
    text, notebook = path.read_text(), notebooks.read(path)
    assert len(text) < 300_000
    assert notebooks.stored(notebook) == text, "run `make notebooks`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown = [pair for cell in code for pair in notebooks.outputs(cell)]
    assert {"stdout", "image/png+text/plain"} <= {kind for kind, _ in shown}
    assert not {"stderr", "error"} & {kind for kind, _ in shown}
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/| at 0x[0-9a-f]{6}", "".join(x for _, x in shown))


def notebook(*texts, tags=()):
    cells = [nbformat.v4.new_code_cell(outputs=[]) for _ in texts]
    for cell, text in zip(cells, texts, strict=True):
        cell.metadata["tags"] = list(tags)
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.parametrize(
    ("before", "today"),
    [
        ("loss 2.345", "loss 2.401"),
        ("loss 0.00", "loss -0.02"),
        ("71.0%  'a'", " 69.9%   'a'"),
        ("99 % of 200", "98 % of 200"),
        ("3e-07", "2e-07"),
        ("[ 0.1  -0.52]\n", "[ 0.1  -0.5 ]\n"),
        ("[1.   0.5 ]", "[0.99 0.5 ]"),
        ("3,554,688 parameters", "3,554,688 parameters"),
    ],
)
def test_numbers_of_another_processor_are_no_difference(before, today):
    assert notebooks.differences(notebook(before), notebook(today)) == []


@pytest.mark.parametrize(
    ("before", "today"),
    [
        ("loss 2.345", "loss 2.545"),
        ("loss 0.01", "loss 0.04"),
        ("71.0%  'a'", "71.0%  'b'"),
        ("99 % of 200", "99 % of 201"),
        ("1.5", "-1.5"),
        ("3e-07", "3e-06"),
        ("layer 3, head 1", "layer 3, head 2"),
        ("It is layer 3.", "It is layer 4."),
        ("3,554,688 parameters", "3,554,689 parameters"),
        ("it prints", ""),
        ("", "it prints"),
        ("loss 2.345", "loss nan"),
        ("1.0 2.0", "1.0"),
    ],
)
def test_other_outputs_are_a_difference(before, today):
    assert len(notebooks.differences(notebook("x", before), notebook("x", today))) == 1


def test_cells_that_vary_only_keep_the_kinds_of_their_outputs():
    assert notebooks.differences(notebook("1.5 seconds", tags=["varies"]), notebook("20 seconds")) == []
    assert len(notebooks.differences(notebook("1.5 seconds", tags=["varies"]), notebook(""))) == 1


def test_what_is_stored_depends_on_the_cells_alone():
    one = notebook("a", tags=["varies"])
    other = copy.deepcopy(one)
    other.metadata = nbformat.from_dict({"language_info": {"version": "3.11.7"}, "kernelspec": {"name": "mine"}})
    other.cells[0].metadata["execution"] = {"iopub.status.busy": "2026-11-29T21:00:00Z"}
    assert notebooks.stored(other) == notebooks.stored(one)
    assert '"varies"' in notebooks.stored(one)
