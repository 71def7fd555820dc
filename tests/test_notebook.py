"""The notebook runs with the embedded model, prints no warnings, and has the outputs that its text mentions."""

import importlib
import json

import pytest
from conftest import REPOSITORY

nbclient = pytest.importorskip("nbclient", reason="nbclient runs the notebook")
nbformat = pytest.importorskip("nbformat", reason="nbformat reads the notebook")

NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    importlib.import_module("matplotlib.font_manager")  # builds its cache now, because it logs that
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output.output_type == "stream")
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert "logits: (1, " in printed and "loss " in printed and "def is_empty(self):" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot"


def test_quickstart_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert cells and not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
