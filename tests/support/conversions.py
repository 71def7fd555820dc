"""Runs the converter as its users do, and reads what it has written."""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from convert.__main__ import main
from opt_jax.checkpoints import orbax

DATA = Path(__file__).parents[1] / "fixtures"


def load_hf_names(directory: Path) -> dict[str, np.ndarray]:
    """What is on disk under DST, read by plain Orbax, under HF's names and in HF's orientation."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((directory / "params").absolute())
    found = {}
    for path, array in orbax.flatten(tree).items():
        kind = path.rpartition(".")[2]  # not by way of `names`: its mistakes must show
        name = path.removesuffix(kind) + {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(kind, kind)
        found[name] = np.asarray(array).T if kind == "kernel" else np.asarray(array)
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def convert(source: Path, destination: Path, *options: str) -> Path:
    assert main([str(source), str(destination), *options]) == 0
    assert sorted(p.name for p in destination.parent.iterdir() if p.name.startswith(".")) == []
    return destination


def refused(capsys, source: Path, destination: Path, *options: str) -> str:
    """The one line on stderr; nothing is left behind, beside DST either."""
    before = sorted(destination.parent.iterdir())
    capsys.readouterr()
    assert main([str(source), str(destination), *options]) == 1
    assert sorted(destination.parent.iterdir()) == before
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err
