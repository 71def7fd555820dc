"""The examples of docs/generation.md run, and its table speaks of every option."""

import re

import pytest
from conftest import REPOSITORY

from opt_jax.generation_config import _INERT, _UNSUPPORTED, FIELDS

TEXT = (REPOSITORY / "docs" / "generation.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) > 6
    names = {}
    for block in blocks:
        exec(compile(block, "docs/generation.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "temperature without effect" in printed and "'length'" in printed


def test_every_option_has_an_example():
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    assert [name for name in FIELDS if f"{name}=" not in code] == []


def test_every_option_is_in_the_table():
    table = TEXT.partition("## HF option -> here")[2]
    assert [name for name in (*FIELDS, *_INERT, *_UNSUPPORTED) if f"`{name}" not in table] == []
