"""The examples of docs/compression.md run, its commands have options that exist, and its table all methods."""

import dataclasses
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import REPOSITORY

from opt_jax.compression.command import CompressOptions
from opt_jax.compression.recipe import OPTIONS
from opt_jax.evaluation.command import EvalOptions

TEXT = (REPOSITORY / "docs" / "compression.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"opt-jax (?:compress|eval) [^`\n|]*", TEXT)


@pytest.mark.slow
def test_examples_run(tmp_path, monkeypatch):
    shutil.copy(REPOSITORY / "LICENSE", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/compression.md", "exec"), names)
    assert 0 < names["report"]["errors"][0]["fc1"] < 0.1
    ids = names["tokenizer"]("def f(x):", return_tensors="np")["input_ids"]
    packed, floats = (names[name](ids).logits for name in ("model", "floats"))
    np.testing.assert_allclose(packed, floats, atol=1e-3)


def test_options_of_commands_exist():
    assert len(COMMANDS) >= 6
    for line in COMMANDS:
        _, command, *words = shlex.split(line)
        known = {field.name for field in dataclasses.fields(CompressOptions if command == "compress" else EvalOptions)}
        assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= known, line


def test_the_table_has_all_methods_and_options():
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", TEXT, re.MULTILINE)
    assert [method for method, _ in rows] == list(OPTIONS)
    for method, cell in rows:
        mentioned = {name.replace("-", "_") for name in re.findall(r"--([a-z-]+)", cell)}
        described = {*OPTIONS[method]} & {*mentioned, "damping", "alpha", "sparsity", "act_order", "true_sequential"}
        assert described == mentioned, method
