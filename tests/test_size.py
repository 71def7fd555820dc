"""The core can be read in an evening, functions are short, names say what a thing is, ruff formats nearly all files."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

from conftest import REPOSITORY
from test_layers import EXCEPTIONS, arrows, ours

# What to read in order to understand or change OPT here. What these import inside `opt_jax` counts too.
CORE = (
    "opt_jax.config",
    "opt_jax.model.decoder",
    "opt_jax.model.attention",
    "opt_jax.model.cache",
    "opt_jax.model.heads",
    "opt_jax.model.outputs",
    "opt_jax.parallel.rules",
    "opt_jax.generation.loop",
    "opt_jax.generation.sampling",
    "opt_jax.generation.processors",
)
CORE_LINES = 1700
SHORT_FUNCTIONS = ("opt_jax.model.", "opt_jax.parallel.", "opt_jax.generation.")
SHORT, LONG = 60, 100  # lines of a function, in SHORT_FUNCTIONS and elsewhere
LONGER = {"train.main": 120}  # one run, top to bottom
METHOD = 150  # lines of code of a file in opt_jax/research
FORMATTER_SKIPS = 20
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
NO_CODE = {tokenize.COMMENT, *LAYOUT}


def docstring_lines(node: ast.AST) -> range:
    """The lines of the docstring of a module, class or function. Empty for other nodes."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            return range(first.lineno, (first.end_lineno or first.lineno) + 1)
    return range(0)


def code_lines(source: str) -> int:
    """Number of lines that hold code: no blank lines, comments or docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in NO_CODE for line in range(t.start[0], t.end[0] + 1)}
    return len(code.difference(*map(docstring_lines, ast.walk(ast.parse(source)))))


def core() -> list[str]:
    """The modules of the core, and those that they import."""
    graph, names, waiting = arrows(ours()), set(), list(CORE)
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += [other for other in graph[name] if (name, other) not in EXCEPTIONS]
    return sorted(names)


def path(module: str) -> str:
    return module.replace(".", "/") + ".py"


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, int]]:
    """(dotted name, lines without the docstring) of all functions in a file, also of nested ones."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{name}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield inside, child.end_lineno - child.lineno + 1 - len(docstring_lines(child))  # type: ignore[reportOptionalOperand]
            yield from functions(child, inside)
        else:
            yield from functions(child, name)


def test_lines_of_code_are_counted():
    source = '''
"""A module.

Of three lines."""
import os  # counts


def f():
    """Not counted."""
    # not counted
    return [
        "two of three",
    ]


class C:
    """Not counted."""

    x = """counts,
    twice"""
'''
    assert code_lines(source) == 8
    assert dict(functions(ast.parse(source), "m")) == {"m.f": 5}


def test_the_core_is_within_its_budget():
    lines = {name: code_lines((REPOSITORY / path(name)).read_text(encoding="utf-8")) for name in core()}
    assert len(lines) > len(CORE)
    total = sum(lines.values())
    table = "\n".join(f"{count:5} {name}" for name, count in lines.items())
    assert total <= CORE_LINES, f"the core has {total} lines of code, {total - CORE_LINES} too many:\n{table}"


def test_contributing_lists_the_core():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("\n## The core\n")[2].partition("\n## ")[0]
    items = "".join(re.findall(r"^\d+\. .*$", section, re.MULTILINE))
    assert sorted(re.findall(r"`(opt_jax/[\w/]+\.py)`", items)) == sorted(map(path, core()))


def test_functions_are_short():
    longest = {}
    for module, tree in ours().items():
        limit = SHORT if module.startswith(SHORT_FUNCTIONS) else LONG
        longest |= {name: (n, m) for name, n in functions(tree, module) if n > (m := LONGER.get(name, limit))}
    assert len(dict(functions(ours()["opt_jax.model.heads"], ""))) > 15
    assert not longest, "".join(f"\n{name} has {n} lines, more than {m}" for name, (n, m) in longest.items())


def test_each_research_method_is_short_and_names_its_paper():
    files = {file.stem: file.read_text(encoding="utf-8") for file in REPOSITORY.glob("opt_jax/research/*.py")}
    lines = {name: code_lines(source) for name, source in files.items()}
    assert len(lines) > 10 and max(lines.values()) < METHOD, f"{METHOD} lines of code or more: {lines}"
    no_methods = {"__init__", "activations", "collect", "figures"}
    for name in files.keys() - no_methods:
        assert re.search(r"https://[^\s)]+", ast.get_docstring(ast.parse(files[name])) or ""), name


VAGUE = set("whole describe fingerprint found own made nothing some several spare first_part".split())


def identifiers(tree: ast.AST) -> set[str]:
    names = (getattr(node, key, None) for node in ast.walk(tree) for key in ("name", "id", "arg", "attr"))
    return {name.strip("_").lower() for name in names if isinstance(name, str)}


def test_names_say_what_a_thing_is():
    assert identifiers(ast.parse("def f(whole):\n    _FOUND = whole.own")) == {"f", "whole", "found", "own"}
    files = [file for folder in ("tests", "benchmarks", "examples") for file in REPOSITORY.glob(f"{folder}/**/*.py")]
    trees = ours() | {str(file): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    assert len(trees) > 200
    vague = {name: names for name, tree in trees.items() if (names := identifiers(tree) & VAGUE)}
    assert not vague, vague


def test_ruff_formats_nearly_everything():
    folders = ("opt_jax", "convert", "tests", "benchmarks", "examples")
    files = [*REPOSITORY.glob("*.py"), *(file for folder in folders for file in REPOSITORY.glob(f"{folder}/**/*.py"))]
    skips = [file for file in files for _ in re.findall(r"#\s*fmt:\s*(?:skip|off)", file.read_text(encoding="utf-8"))]
    assert len(files) > 200
    assert len(skips) <= FORMATTER_SKIPS, sorted(map(str, set(skips)))
