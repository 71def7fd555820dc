"""Imports point one way: no file imports a room above its own, and no files import each other in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import REPOSITORY

# A room may import the rooms before it.
ROOMS = (
    "opt_jax.system",
    "opt_jax.config",
    "opt_jax.parallel",
    "opt_jax.model",
    "opt_jax.checkpoints",
    "opt_jax.generation",
    "opt_jax.text",
    "opt_jax.interface",
    "opt_jax.data",
    "opt_jax.training",
    "opt_jax.evaluation",
    "opt_jax.research",
    "opt_jax.compression",
    "opt_jax.cli",
    "opt_jax.__main__",
    "convert",
    "train",
)
EXCEPTIONS = {
    # Base classes with the methods that hand over to the rooms above, so that `model.generate(...)` and
    # `OPTConfig.from_hf(...)` work. `interface.py` names the functions, and imports them when they are looked up.
    ("opt_jax.config", "opt_jax.interface"): "from_hf, to_hf, from_pretrained, save_pretrained",
    ("opt_jax.model.heads", "opt_jax.interface"): "from_pretrained, save_pretrained, generate, ...",
    ("opt_jax.model.outputs", "opt_jax.interface"): "what to write for past_key_values",
}


def module(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST, modules: dict[str, ast.AST], package: str) -> Iterator[str]:
    """Our modules that a file imports, at its top and in functions, but not under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            home = ".".join([*([package] if node.level else []), *([node.module] if node.module else [])])
            names = [f"{home}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else home for name in names if home in modules)
        else:
            yield from imported(node, modules, package)


def arrows(modules: dict[str, ast.AST]) -> dict[str, set[str]]:
    """Module -> modules that it imports, without the root package, which loads its names on first use."""
    return {
        name: set(imported(tree, modules, name.rpartition(".")[0])) - {name, "opt_jax"}
        for name, tree in modules.items()
    }


def room(name: str) -> int:
    return next(i for i, prefix in enumerate(ROOMS) if name == prefix or name.startswith(prefix + "."))


def upwards(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    return {(a, b) for a, others in graph.items() for b in others if a != "opt_jax" and room(b) > room(a)}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, ignoring EXCEPTIONS, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        way = next(
            (
                way
                for other in sorted(graph[name])
                if (name, other) not in EXCEPTIONS and (way := visit(other, [*path, name]))
            ),
            [],
        )
        done.add(name)
        return way

    return next((way for name in sorted(graph) if (way := visit(name, []))), [])


def ours() -> dict[str, ast.AST]:
    paths = [*REPOSITORY.glob("opt_jax/**/*.py"), *REPOSITORY.glob("convert/*.py"), REPOSITORY / "train.py"]
    return {module(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_no_import_goes_up():
    assert upwards(arrows(ours())) == set(EXCEPTIONS)


def test_no_imports_in_a_circle():
    graph = arrows(ours())
    assert len(graph) > 80 and not circle(graph)


def test_an_arrow_in_a_function_and_a_circle_are_seen():
    modules = ours()
    modules["opt_jax.model.cache"] = ast.parse("def f():\n    from opt_jax.generation import loop")
    graph = arrows(modules)
    assert ("opt_jax.model.cache", "opt_jax.generation.loop") in upwards(graph)
    assert {"opt_jax.model.cache", "opt_jax.generation.loop"} <= set(circle(graph))
