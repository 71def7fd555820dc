"""The kernels of a decode step and of a training step on an NVIDIA H200, compiled here. Needs JAX's CUDA plug-in.

`make .venv/cuda/.installed && .venv/bin/pytest tests/test_gpu_programs.py` (2.8 GB on disk; no GPU needed).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from support.hlo import Program

CUDA = Path(sys.prefix) / "cuda"  # outside of the packages, where every `import jax` would load it
KERNELS = {"fusion", "custom-call", "copy", "reduce", "sort", "scatter", "dot", "transpose"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CUDA / "jax_plugins").is_dir(), reason=f"no CUDA plug-in in {CUDA}: see CONTRIBUTING"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The optimized programs by name."""
    place, tests = tmp_path_factory.mktemp("gpu"), REPOSITORY / "tests"
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join(map(str, [REPOSITORY, tests, tests / "parity", CUDA])),
        JAX_PLATFORMS="cpu",
        JAX_DISABLE_MOST_OPTIMIZATIONS="0",
        XLA_FLAGS="",
    )
    command = [sys.executable, "-m", "support.gpu_programs", place]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {path.stem: Program(path.read_text()) for path in place.glob("*.hlo")}


def kernels(program, computation):
    return [i for i in program.written_out(computation) if i.op in KERNELS]


def loop_bodies(program):
    return [each.called["body"] for each in program.loops()]


def test_a_decode_step_has_eleven_kernels_for_each_layer(programs):
    """Two LayerNorms, four products, two cache updates, attention, two residual sums. Nothing is copied."""
    counts = []
    for depth in (2, 3):
        (body,) = loop_bodies(programs[f"decode-{depth}"])
        kernels_of_step = kernels(programs[f"decode-{depth}"], body)
        assert not [i for i in kernels_of_step if i.op == "copy"]
        counts.append(len(kernels_of_step))
    print(f"decode step of the 1.3B: {counts[1] - counts[0]} kernels a layer, {3 * counts[0] - 2 * counts[1]} beside")
    assert counts[1] - counts[0] <= 11
    assert 3 * counts[0] - 2 * counts[1] <= 14


def test_a_training_step(programs):
    """Of the loops over layers, forward and backward, attention is one kernel each."""
    program = programs["train"]
    loops = [kernels(program, body) for body in loop_bodies(program)]
    forward, backward = (loop for loop in loops if any("dot_product_attention" in i.name for i in loop))
    print(f"training step of the 1.3B: {len(forward)} kernels a layer forward, {len(backward)} backward")
    for part in (forward, backward):
        assert sum("dot_product_attention" in i.name for i in part) == 1
        assert not [i for i in part if i.op == "copy"]
    assert len(forward) <= 38 and len(backward) <= 74
