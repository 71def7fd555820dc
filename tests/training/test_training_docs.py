"""The commands in docs/data.md, finetuning.md and training.md: their options exist and may be given together."""

import inspect
import os
import re
import shlex
import subprocess

import pytest
import yaml
from conftest import REPOSITORY

from opt_jax.cli import tokenize
from opt_jax.training.option_checks import check_options
from opt_jax.training.options import parse_options

DOCS = ("data", "finetuning", "training")


def commands(doc, program):
    """The arguments of `program` in the blocks of code of a page. Lines that end in a backslash are joined."""
    text = (REPOSITORY / f"docs/{doc}.md").read_text()
    for _, block in re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(rf"(?:^|bin/)(?:python )?{program} (.*?)(?: & .*)?$", line):
                quoted = "--command" in line  # the quoted command is one word
                yield shlex.split(match[1].rstrip("'") if quoted else match[1].replace(" ...", ""), comments=True)


TRAIN = [(doc, words) for doc in DOCS for words in commands(doc, "train.py") if "--help" not in words]


@pytest.mark.parametrize("doc, words", TRAIN, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_train_takes_these_options(monkeypatch, doc, words):
    options = parse_options(words)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if all extras were installed
    check_options(options)


def test_tokenize_has_these_options():
    words = [word for doc in DOCS for words in commands(doc, "opt-jax tokenize") for word in words]
    named = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert len(named) > 2 and named <= set(inspect.signature(tokenize).parameters)


def test_there_are_such_commands():
    assert {doc for doc, _ in TRAIN} == set(DOCS) and len(TRAIN) > 15


# Launchers ------------------------------------------------------------------------------------------------------------


def launcher(beginning):
    """The block of code in docs/training.md that begins so."""
    text = (REPOSITORY / "docs/training.md").read_text()
    (block,) = re.findall(rf"^```\w*\n({re.escape(beginning)}.*?)^```", text, re.DOTALL | re.MULTILINE)
    return block


def launch(script, tmp_path, codes, **variables):
    """Run a launcher whose programs are not there: training ends with `codes`, one after the other, and then with 0.

    Returns the exit code, the number of times that it was started, and whether SLURM was asked to start the job again.
    """
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    train = 'echo >>starts; code=$(head -n 1 codes); sed -i 1d codes; return "${code:-0}"'
    stubs = f"python() {{ {train}; }}; srun() {{ {train}; }}; scontrol() {{ touch requeued; }}; sleep() {{ :; }}\n"
    environment = os.environ | variables
    done = subprocess.run(["bash", "-c", stubs + script], cwd=tmp_path, env=environment, check=False, timeout=60)
    starts = (tmp_path / "starts").read_text().count("\n")
    return done.returncode, starts, (tmp_path / "requeued").exists()


@pytest.mark.parametrize("codes, starts", [([], 1), ([137, 75, 143, 139], 5), ([1], 1), ([143, 1], 2), ([130], 1)])
def test_the_loop_starts_again_after_what_passes(tmp_path, codes, starts):
    assert launch(launcher("for start in"), tmp_path, codes)[1] == starts


def test_the_loop_has_an_end(tmp_path):
    assert launch(launcher("for start in"), tmp_path, [137] * 200)[1] == 100


@pytest.mark.parametrize("code, again", [(0, False), (1, False), (75, True), (137, True), (143, True), (130, False)])
def test_the_slurm_script_asks_for_another_start_after_what_passes(tmp_path, code, again):
    assert launch(launcher("#!/bin/bash"), tmp_path, [code]) == (code, 1, again)


def test_the_slurm_script_does_not_ask_for_ever(tmp_path):
    assert launch(launcher("#!/bin/bash"), tmp_path, [137], SLURM_RESTART_COUNT="100") == (137, 1, False)


def test_the_job_of_kubernetes_has_limits_that_fit():
    """Kubernetes refuses `backoffLimitPerIndex` with another policy. An error is not started again, as with SLURM."""
    job = yaml.safe_load(launcher("apiVersion: batch/v1"))["spec"]
    assert job["backoffLimitPerIndex"] == 100 and job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}}
    policy = yaml.safe_load(launcher("apiVersion: jobset"))["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
