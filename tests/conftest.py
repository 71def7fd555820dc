"""Set up before jax is imported: a CPU with eight devices, no network, fixed seeds."""

import gc
import os
import random
import signal
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from support import processes

exhaustive = partial(pytest.param, marks=pytest.mark.exhaustive)  # one more case of a kind
FLAGS = ["--xla_force_host_platform_device_count=8"]
assert "jax" not in sys.modules, "tests/conftest.py must be loaded before jax, or its environment has no effect"
# `JAX_PLATFORMS=cuda pytest ...` runs the suite on another device. Tests that need more devices skip.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # LLVM's optimizations and XLA's newer code generator for fusions were two thirds of the suite's time; jaxlib 0.10
    # still has the older generator. With 0, as in `make test-exact`, tests have the code that users have.
    older_generator = version("jaxlib").startswith("0.10.")
    if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0" and older_generator:
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0":
        FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")  # else each program is compiled in up to 32 parts
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for `make test &` in a script; processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

MOST_MAPPINGS = 15_000
REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive", action="store_true", help="run every case of the sweeps, not the seeded sample of each kind"
    )


def pytest_ignore_collect(collection_path, config):
    """The fast part does not import slow files, because importing PyTorch alone takes three seconds."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        parity = "parity" in collection_path.parts
        return True if parity or "\npytestmark = pytest.mark.slow\n" in collection_path.read_text() else None
    return None


def pytest_collection_modifyitems(config, items):
    """Mark all parity tests as slow, and run files with slow tests first.

    With two processes, a slow file at the end would keep one of them waiting for the other.
    """
    for item in items:
        if "parity" in item.path.parts:
            item.add_marker("slow")
        if "compiled" in item.fixturenames:
            item.add_marker(pytest.mark.default_settings("counts compilations"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    # Imported objects stay, so the garbage collector need not traverse them again and again (5 % of all time).
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    if not config.getoption("--exhaustive"):
        left_out = {*_repeated(items), *(item for item in items if item.get_closest_marker("exhaustive"))}
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _repeated(items) -> list:
    """Cases of tests marked `combinations` that can be left out: the others have each value of each parameter."""
    functions, repeated = {}, []
    for item in items:
        if item.get_closest_marker("combinations"):
            functions.setdefault((item.path, item.originalname), []).append(item)
    for cases in functions.values():
        seen = set()
        for item in random.Random(0).sample(cases, len(cases)):
            values = {(name, repr(value)) for name, value in item.callspec.params.items()}
            (repeated.append(item) if values <= seen else seen.update(values))
    return repeated


@pytest.fixture(scope="session")
def sample(pytestconfig):
    """`sample(cases, count)` draws `count` cases with a fixed seed, in their order. With --exhaustive it returns all.

    It is for cases of one kind. If there are several kinds, draw from each.
    """

    def draw(cases, count: int, seed: int = 0) -> list:
        cases = list(cases)
        if pytestconfig.getoption("--exhaustive") or count >= len(cases):
            return cases
        return [cases[i] for i in sorted(random.Random(seed).sample(range(len(cases)), count))]

    return draw


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Drop compiled programs between two files when there are many.

    Each takes a few of the 65,530 memory mappings that Linux allows a process. Without one left, compiling crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def forked_programs(pytestconfig):
    """Tests start Python programs by processes.Popen, but in `make test-exact` and with --exhaustive as users do."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1" and not pytestconfig.getoption("--exhaustive"):
            patch.setattr(subprocess, "Popen", processes.Popen)
        yield


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Each test starts with the same state of the global generators, which the library never uses."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def compiled():
    """Names of the functions that JAX compiles during the test."""
    import jax  # after the environment above is set, and not in every test

    names = []

    def listen(event, duration_secs, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(kwargs["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`../shared/data` beside the repository, with texts and OPT's tokenizer. Tests that need it skip elsewhere."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("../shared/data (WikiText-2, the OPT tokenizer files, ...) is not beside this checkout")
    return path
