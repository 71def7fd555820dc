"""The examples of docs/research.md run, and the table of docs/hook_points.md is that of the code."""

import re

import numpy as np
import pytest
from conftest import REPOSITORY

from opt_jax.model.hook_points import POINTS

TEXT = (REPOSITORY / "docs" / "research.md").read_text(encoding="utf-8").partition("\n## Probes, steering, neurons")[0]


@pytest.mark.slow
def test_examples_run(capsys, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/research.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith(" name\n(1, 3, 14, 14)\n") and "(6, 3, 1, 14) (6, 1, 14)\n" in printed
    result, parts = names["result"], names["parts"]
    assert result.clean > 0 > result.corrupted and result.restored.shape == (6, 14)
    assert np.abs(parts.total - parts.logits).max() < 1e-5
    # What the page says about head 5.1 and position 7.
    heads, shares = names["heads"].restored[:, 0], np.asarray(parts.heads[:, :, 0, -1])
    assert np.unravel_index(heads.argmax(), heads.shape) == np.unravel_index(shares.argmax(), shares.shape) == (5, 1)
    assert result.restored[:5].argmax(axis=1).tolist() == [7] * 5 and heads.max().round(1) == 0.5
    assert shares.max().round(1) == 3.2 and result.clean.round(1) == 6.0
    assert np.abs(names["gradient"]).max() > 0
    pyplot.close("all")


def test_the_table_has_all_hook_points():
    rows = [f"| `{name}` | [{', '.join(axes)}] | {what} |" for name, (axes, what) in POINTS.items()]
    table = "\n".join(["| point | shape | what it is |", "|---|---|---|", *rows])
    page = (REPOSITORY / "docs" / "hook_points.md").read_text(encoding="utf-8")
    assert table in page, f"write this into docs/hook_points.md:\n{table}"
