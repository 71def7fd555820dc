"""The documentation site: it builds without a warning, lacks no public name, and a broken link fails it."""

import ast
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import zlib

import pytest
from conftest import REPOSITORY

import opt_jax

MAKEFILE = (REPOSITORY / "Makefile").read_text()
WORKFLOWS = sorted(REPOSITORY.glob(".github/workflows/*.yml"))
PAGES = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]
NOTEBOOKS = sorted(REPOSITORY.glob("examples/*.ipynb"))


def build(source, output):
    """The result of what `make docs` runs, in other folders."""
    pytest.importorskip("sphinx")
    (options,) = re.findall("^SPHINX = (.*)$", MAKEFILE, re.MULTILINE)
    assert ".venv/bin/python $(SPHINX) -d build/doctrees . build/docs" in MAKEFILE
    line = [sys.executable, *options.split(), "-d", str(output / "doctrees"), ".", str(output / "docs")]
    return subprocess.run(line, cwd=source, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    output = tmp_path_factory.mktemp("site")
    result = build(REPOSITORY, output)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return output / "docs"


def imported(code):
    """The names that code imports from this package, such as `opt_jax.research.lens`."""
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))  # of notebooks
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "opt_jax":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def public_names():
    packages = [
        opt_jax,
        *(importlib.import_module(m.name) for m in pkgutil.iter_modules(opt_jax.__path__, "opt_jax.") if m.ispkg),
    ]
    yield from (f"{package.__name__}.{name}" for package in packages for name in getattr(package, "__all__", ()))
    for page in PAGES:
        for block in re.findall(r"^```python.*?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield from imported(block)
    for notebook in NOTEBOOKS:
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield from imported("".join(cell["source"]))


@pytest.mark.slow
def test_every_public_name_has_an_entry(site):
    # An inventory, which other sites link by: four lines about it, then a compressed list of names.
    entries = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    listed = {line.split()[0] for line in entries.splitlines() if " py:" in line}
    missing = sorted({*public_names()} - listed)
    assert not missing, f"add these to a page of docs/api/: {missing}"


@pytest.mark.slow
def test_the_first_page_leads_to_all_pages(site):
    first = (site / "index.html").read_text()
    pages = [*PAGES[1:], *REPOSITORY.glob("docs/api/*.md"), *NOTEBOOKS, REPOSITORY / "CHANGELOG.md"]
    for page in pages:
        link = page.relative_to(REPOSITORY).with_suffix(".html")
        assert (site / link).exists() and f'href="{link}"' in first, link


@pytest.mark.slow
def test_annotations_are_readable(site):
    page = re.sub("<[^>]*>", "", (site / "docs/api/opt_jax.html").read_text())
    assert "input_ids: Int[Array, 'B T'] | None = None" in page
    assert "jaxlib" not in page and "SupportsDType" not in page


@pytest.mark.slow
def test_a_broken_link_fails_the_build(tmp_path):
    """Also between the folders, to an anchor, and from a notebook."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "examples").mkdir()
    shutil.copy(REPOSITORY / "docs/conf.py", tmp_path / "docs")
    for name in ("README", "CHANGELOG", "CONTRIBUTING", "docs/page"):
        (tmp_path / f"{name}.md").write_text("# A page\n\n## A part\n")
    cell = {
        "cell_type": "markdown",
        "metadata": {},
        "source": ["# N\n\n[fine](../README.md#a-part) [x](../docs/none.md)"],
    }
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (tmp_path / "examples/notebook.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "docs/page.md").write_text(
        "# A page\n\n[a](../README.md#a-part) [b](gone.md) [c](../README.md#no-part)\n"
    )
    result = build(tmp_path, tmp_path / "out")
    assert result.returncode != 0
    assert len(re.findall("WARNING", result.stderr)) == 3, result.stderr
    for target in ("gone.md", "no-part", "../docs/none.md"):
        assert target in result.stderr, result.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_exists(workflow):
    text = workflow.read_text()
    for command in re.findall(r"^ *- run: (.*)$", text, re.MULTILINE):
        program, *arguments = command.split()
        if program == "make":
            assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in arguments), command
        else:
            assert program == "python" or (REPOSITORY / program).exists(), command
    for folder in re.findall(r"^ *path: (.*)$", text, re.MULTILINE):
        assert re.search(rf"^\t.* {folder}$", MAKEFILE, re.MULTILINE), folder
