"""Run the converter as users do, and read what it has written."""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from convert.__main__ import main
from opt_jax.checkpoints import orbax

DATA = Path(__file__).parents[1] / "fixtures"


def load_hf_names(directory: Path) -> dict[str, np.ndarray]:
    """The arrays of a converted checkpoint, read by plain Orbax: HF name -> array in HF's orientation."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((directory / "params").absolute())
    arrays = {}
    for path, array in orbax.flatten(tree).items():
        kind = path.rpartition(".")[2]  # without `names`, so that its mistakes show
        name = path.removesuffix(kind) + {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(kind, kind)
        arrays[name] = np.asarray(array).T if kind == "kernel" else np.asarray(array)
    return arrays


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


def convert(source: Path | str, destination: Path, *options: str) -> Path:
    assert main([str(source), str(destination), *options]) == 0
    assert sorted(p.name for p in destination.parent.iterdir() if p.name.startswith(".")) == []
    return destination


def refused(capsys, source: Path, destination: Path, *options: str) -> str:
    """Run a conversion that fails and leaves nothing on the disk. Returns its one line on stderr."""
    before = sorted(destination.parent.iterdir())
    capsys.readouterr()
    assert main([str(source), str(destination), *options]) == 1
    assert sorted(destination.parent.iterdir()) == before
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err
