"""The examples of docs/generation.md run, and its table lists every option."""

import re
import shutil

import pytest
from conftest import REPOSITORY
from support.small_models import first_layers

from opt_jax import OPTTokenizer
from opt_jax.generation.config import FIELDS
from opt_jax.generation.hf_options import INERT, UNSUPPORTED

TEXT = (REPOSITORY / "docs" / "generation.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_examples_run(capsys, tmp_path):
    """With the first layer of "tiny", because the examples compile many programs."""
    first_layers().save_pretrained(tmp_path / "tiny", tokenizer=OPTTokenizer.from_pretrained("tiny"))
    shutil.copy(REPOSITORY / "opt_jax" / "tiny" / "generation_config.json", tmp_path / "tiny")
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) > 6
    names = {}
    for block in blocks:
        block = block.replace('"tiny"', repr(str(tmp_path / "tiny")))
        exec(compile(block, "docs/generation.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "temperature without effect" in printed and "'length'" in printed


def test_every_option_has_an_example():
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    assert [name for name in FIELDS if f"{name}=" not in code] == []


def test_every_option_is_in_the_table():
    table = TEXT.partition("## HF option -> here")[2]
    assert [name for name in (*FIELDS, *INERT, *UNSUPPORTED) if f"`{name}" not in table] == []
