"""The examples in docs/research.md, "Probes, steering, neurons", run and show what the text says."""

import re

import numpy as np
import pytest
from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs/research.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Probes, steering, neurons")[2]


@pytest.mark.slow
def test_examples_run(monkeypatch, tmp_path, capsys):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    names = {}
    assert "```python" in SECTION
    for block in re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL):
        exec(compile(block, "docs/research.md", "exec"), names)
    plt.close("all")
    first, third = names["trained"].values()
    assert abs(first.accuracy - first.majority) < 0.01
    assert third.accuracy > first.accuracy + 0.05 and third.accuracy > third.majority + 0.1
    losses = [float(line) for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"\d+\.\d+", line)]
    assert len(losses) == 4 and max(losses[:3]) < losses[3] - 1 and np.isclose(losses[0], losses[2], atol=1e-3)
    assert names["statistics"].dead.mean() < 0.9
