"""`make demo` without the installation: it succeeds, and prints no warning or error."""

import runpy
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from support.processes import environment


@pytest.mark.slow
def test_demo(tmp_path):
    command = [sys.executable, REPOSITORY / "examples" / "demo.py", tmp_path / "demo"]
    run = subprocess.run(command, env=environment(devices=1), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    for expected in (
        "parameters, ",
        "def read_lines(path):",
        "stopped after step 10 of 20",
        "steps 10 to 20",
        "step 20/20",
        "Done in",
    ):
        assert expected in run.stdout, run.stdout


def test_a_directory_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep")
    demo = runpy.run_path(str(REPOSITORY / "examples" / "demo.py"))
    with pytest.raises(SystemExit, match="exists already: name a new directory"):
        demo["main"](str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "keep"
