"""The README and the pages of docs/: examples run, options in commands exist, and so do the targets of links."""

import inspect
import re
import shlex

import pytest
from conftest import REPOSITORY

from opt_jax.cli import COMMANDS
from opt_jax.training.option_checks import check_options
from opt_jax.training.options import parse_options

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
README = (REPOSITORY / "README.md").read_text()
COMMAND_LINES = [
    line.removeprefix("$ ")
    for language, block in re.findall(r"^```(.*)\n((?s:.*?))^```", README.replace("\\\n", " "), re.MULTILINE)
    for line in block.splitlines()
    if not language
]


def anchors(text):
    """The anchors that GitHub gives to headings: lower case, hyphens for blanks, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_something(page):
    for target in re.findall(r"\]\(([^)]*)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("python train.py")])
def test_train_takes_the_options_of_the_readme(line):
    check_options(parse_options(shlex.split(line, comments=True)[2:]))


def test_the_readme_names_commands_that_exist():
    lines = [shlex.split(line, comments=True) for line in COMMAND_LINES if line.startswith("opt-jax ")]
    assert {words[1] for words in lines} == {"convert", "generate"}
    for _, command, *words in lines:
        named = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        assert named <= set(inspect.signature(COMMANDS[command]).parameters)


def run(page, capsys):
    """Run the Python blocks of a page, but for those marked `no-run`, with one small layer for a 125M."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    small = "num_hidden_layers=1, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_attention_heads=2"
    code = code.replace('OPTConfig.preset("125m")', f'dataclasses.replace(OPTConfig.preset("125m"), {small})')
    names = {}
    exec(compile(f"import dataclasses\n{code}", page.name, "exec"), names)
    return names, capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_the_readme_runs(capsys):
    names, printed = run(REPOSITORY / "README.md", capsys)
    assert names["logits"].dtype == "float32" and names["logits"].ndim == 3
    assert printed.startswith("</s>def main():") and len(printed) > 25


@pytest.mark.slow
def test_the_examples_of_modules_run(capsys):
    names, _ = run(REPOSITORY / "docs/modules.md", capsys)
    assert names["out"].logits.dtype == "float32" and len(names["out"].hidden_states) == 2
    assert type(names["gradients"]) is type(names["model"])
