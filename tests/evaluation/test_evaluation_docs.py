"""The examples of docs/evaluation.md run, but for those marked `no-run`. Those marked `data` need ../shared/data."""

import re
import shlex

import pytest
from conftest import REPOSITORY

from opt_jax.cli import main

BLOCKS = re.findall(r"```(sh|python) ?([a-z-]*)\n(.*?)```", (REPOSITORY / "docs/evaluation.md").read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("language, kind, code", [block for block in BLOCKS if block[1] != "no-run"])
def test_examples_run(request, monkeypatch, tmp_path, capsys, language, kind, code):
    if kind == "data":
        request.getfixturevalue("shared_data")
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    if language == "python":
        exec(compile(code, "docs/evaluation.md", "exec"), {})
    else:
        for line in code.splitlines():
            assert main(shlex.split(line)[1:]) == 0
    assert len(capsys.readouterr().out) > 20


def test_what_is_not_run_can_be_read():
    """The options in its commands exist."""
    lines = [code for language, kind, code in BLOCKS if language == "sh"]
    named = set(re.findall(r"--([a-z-]+)", "".join(lines)))
    from opt_jax.evaluation.command import EvalOptions

    assert len(lines) >= 5 and named <= {name.replace("_", "-") for name in EvalOptions.__dataclass_fields__}
