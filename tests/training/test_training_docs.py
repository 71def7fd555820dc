"""The commands in docs/data.md, finetuning.md and training.md: their options exist and may be given together."""

import inspect
import re
import shlex

import pytest
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
