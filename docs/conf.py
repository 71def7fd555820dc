"""The documentation site: `make docs` builds it with Sphinx, MyST and the theme of JAX's own pages.

Its pages are the files that GitHub shows: README.md, docs/, CHANGELOG.md, CONTRIBUTING.md, and the notebooks of
examples/ with the outputs stored in them. So the source folder is the repository, and a link means the same in both
places. Only docs/api/ is filled in here, from docstrings.
"""

import inspect
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

# The order of the guides. Those that are not named here come last.
GUIDES = "modules research hook_points generation converting training data finetuning evaluation scaling performance"
# Aliases of types, which Python has replaced by what they stand for; and a default.
ALIASES = {
    "str | type[~typing.Any] | ~numpy.dtype | ~jax._src.typing.SupportsDType": "DTypeLike",
    "~jaxtyping.Int[Array, '...'] | ~numpy.ndarray | list[int] | range | int | None": "Indices",
    "<class 'jax.numpy.float32'>": "jax.numpy.float32",
}
jax.Array.__name__ = jax.Array.__qualname__ = "Array"  # jaxtyping then shows `Float[Array, 'B T']`

project = "opt-jax"
author = "opt-jax authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "examples/*.ipynb"]
exclude_patterns = [  # not even looked through
    path.name for path in REPOSITORY.iterdir() if path.is_dir() and path.name not in ("docs", "examples")
]
highlight_language = "none"
python_maximum_signature_line_length = 110

autodoc_mock_imports = ["lm_eval"]  # the extra `eval`
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_attr_annotations = False
myst_heading_anchors = 4  # the anchors of GitHub
nb_execution_mode = "off"

html_theme = "sphinx_book_theme"
html_title = project
linkcheck_anchors = False
linkcheck_timeout = 30


def add_contents(_app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the table of contents to the first page. In README.md itself GitHub would show it as code."""
    if docname != root_doc:
        return
    names = [path.stem for path in REPOSITORY.glob("docs/*.md")]
    order = [*GUIDES.split(), *sorted(names)]
    parts = {
        "Guides": [f"docs/{name}" for name in sorted(names, key=order.index)],
        "Notebooks": sorted(f"examples/{path.stem}" for path in REPOSITORY.glob("examples/*.ipynb")),
        "Reference": sorted(f"docs/api/{path.stem}" for path in REPOSITORY.glob("docs/api/*.md")),
        "Project": ["CHANGELOG", "CONTRIBUTING"],
    }
    for caption, pages in parts.items():
        source[0] += "\n".join(["\n```{toctree}", f":caption: {caption}", ":hidden:", *pages, "```\n"])


def shorten(
    _app: Sphinx, _what: str, _name: str, obj: Any, _options: Any, arguments: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """A signature with the names of aliases. That of a class is its constructor's, not that of a metaclass."""
    if arguments and arguments.startswith("(*") and inspect.isclass(obj):
        constructor = signature(obj.__init__, bound_method=True)
        arguments = stringify_signature(constructor, show_return_annotation=False, unqualified_typehints=True)
    for long, short in ALIASES.items():
        arguments = arguments and arguments.replace(long, short)
    return arguments, result


def to_rst(_app: Sphinx, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, which is plain text with code in single backticks."""
    text = re.sub(r"`([^`]+)`|([*|])", lambda part: f"``{part[1]}``" if part[1] else f"\\{part[2]}", "\n".join(lines))
    if what == "method":  # many are functions of a model or a class, elsewhere
        text = re.sub(r"^  (model|cls): .*\n(    .*\n)*", "", text, flags=re.MULTILINE)
    elif what in ("attribute", "property"):
        text = "..\n\n" + text  # an empty comment: napoleon takes words before a colon in the first line for a type
    lines[:] = text.split("\n")


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Copy the first page to where web servers look for it."""
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon (500) reads Args and Returns
    app.connect("build-finished", add_index)
