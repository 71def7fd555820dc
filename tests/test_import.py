"""`import opt_jax` loads no heavy packages. (`benchmarks/import_time.py` measures the time.)"""

import subprocess
import sys

import pytest
from support.processes import environment

import opt_jax
from opt_jax import evaluation, generation, parallel

FORBIDDEN = ("torch", "transformers", "grain", "tokenizers", "safetensors", "tyro", "convert")


def loaded_after(statement: str) -> set[str]:
    """The top-level modules in a fresh interpreter after the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=environment(START="fresh")
    )
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import opt_jax")
    assert "opt_jax" in loaded
    assert not loaded.intersection(FORBIDDEN)


@pytest.mark.slow
def test_using_the_model_needs_no_other_framework():
    loaded = loaded_after("from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer, pipeline")
    assert not loaded.intersection({"torch", "transformers", "grain", "tensorflow", "huggingface_hub"})


@pytest.mark.slow
def test_generating_loads_no_kernels_of_other_devices():
    code = "import opt_jax.checkpoints.pretrained, opt_jax.generation.generate\nprint(*sys.modules)"
    loaded = loaded_after(code)
    assert "orbax.checkpoint" in loaded
    assert not {name for name in loaded if name.startswith("jax.experimental.pallas.ops")}


@pytest.mark.parametrize("package", [opt_jax, evaluation, generation, parallel])
def test_every_public_name_resolves(package):
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'everything'"):
        package.everything  # noqa: B018
