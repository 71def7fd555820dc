"""A step of the compiled decode loops reads each weight once, copies no cache, and sends little."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import REPOSITORY
from jax import lax
from support.decode_loop import CONFIG, LAYERS, arguments, make_model
from support.hlo import Program

from opt_jax.generation import beams, loop
from opt_jax.parallel.hlo import COLLECTIVES, Instruction
from opt_jax.parallel.mesh import make_mesh, use_mesh

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one row": dict(rows=1),
    "sampling": dict(
        do_sample=True,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        no_repeat_ngram_size=3,
        bad_words_ids=[[5, 6]],
        stop_token_ids=[[7, 8]],
        logprobs=2,
        num_return_sequences=2,
    ),
    "beams": dict(num_beams=3),
    "beams of one row": dict(num_beams=3, rows=1),
}
HEAD_DIM, WIDTH = CONFIG.head_dim, CONFIG.hidden_size
POSITIONS = CONFIG.max_position_embeddings + 2


def is_cache(dimensions: list[int]) -> bool:
    return len(dimensions) in (3, 4) and dimensions[-1] == HEAD_DIM  # a single row has no axis for rows


def is_weight(dimensions: list[int]) -> bool:
    return len(dimensions) == 2 and WIDTH in dimensions


def dimensions(array: str) -> list[int]:
    return [int(n) for n in array[array.index("[") + 1 : -1].split(",") if n]


def inspect(program: Program, shards: int = 1) -> list[Instruction]:
    """Check the loop that holds the caches. Returns the collectives of a step."""
    loops = [w for w in program.loops() if any(is_cache(dimensions(a)) for a, _ in w.arrays)]
    assert len(loops) == 1
    carried = [(dimensions(array), size) for array, size in loops[0].arrays]
    sizes = [size for shape, size in carried if is_cache(shape) or is_weight(shape)]
    assert len(sizes) == 2 * LAYERS + 6 * LAYERS + 2, "two caches and six weights for each layer, and two tables"
    body, least = loops[0].called["body"], min(sizes)
    assert not program.large_results(body, least), "each step makes an array as large as a cache or a weight"

    for array, readers in program.readers(body, least).items():
        shape = dimensions(array)
        products = [r for r in readers if program.multiplies(r)]
        if is_cache(shape):
            assert len(readers) == 1 and program.is_update(readers[0]), array
        elif shape == [POSITIONS, WIDTH]:
            assert not products, array  # only single rows are read
        elif shape == [CONFIG.vocab_size // shards, WIDTH]:
            assert len(products) == 1, array  # the LM head, beside lookups of rows
        else:
            assert len(readers) == len(products) == 1, array
    return [i for i in program.written_out(body) if i.op.removesuffix("-start") in COLLECTIVES]


def inspect_collectives(sent: list[Instruction]) -> None:
    """As in Megatron, two sums for each layer and one for the embedding. Then each device's best token and logit."""
    kinds = sorted(i.op.removesuffix("-start") for i in sent)
    assert kinds == ["all-gather"] * 2 + ["all-reduce"] * (2 * LAYERS + 1)
    assert all(i.arrays[-1][1] <= 4 * 4 * 4 for i in sent if i.op.startswith("all-gather"))  # rows * devices * bytes


def donated_caches(program: Program) -> int:
    return sum(is_cache(dimensions(array)) for array in program.donated())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_weights_once_and_copies_nothing(kind):
    function = "beams.advance" if kind.startswith("beams") else "loop.advance"
    args, kwargs = arguments(function, make_model(), **KINDS[kind])
    program = Program.compiled((beams.advance if kind.startswith("beams") else loop.advance).lower(*args, **kwargs))
    assert not inspect(program)
    if kind in ("greedy", "one row"):  # at a conditional a GPU waits for the host
        assert "conditional" not in {i.op for i in program.written_out(program.entry)}
    assert donated_caches(program) == 2 * LAYERS
    cache = args[1].cache.k[0]
    assert not program.large_results(program.entry, cache.size * cache.dtype.itemsize)  # no copy around the loop either


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks at code for a CPU")
def test_a_step_on_a_cpu_has_wide_vectors(tmp_path):
    args, kwargs = arguments("loop.advance", make_model(), rows=1)
    loop.advance.lower(*args, **kwargs).compile(compiler_options={"xla_dump_to": str(tmp_path)})
    (options,) = tmp_path.glob("*jit_advance*debug_options")
    assert "xla_cpu_prefer_vector_width: 512" in options.read_text()
    # jaxlib 0.10 also writes its code for LLVM; later ones do not.
    products = [file.read_text() for file in tmp_path.glob("*dot*.ir-no-opt.ll")]
    assert products or jax.__version_info__ >= (0, 11)
    assert all('"prefer-vector-width"="512"' in code for code in products)


def test_the_layout_of_the_cache_is_pinned_on_tpus_only():
    args, kwargs = arguments("loop.advance", make_model())
    traced = loop.advance.trace(*args, **kwargs)
    for platforms, pinned in ((("cpu",), 0), (("cuda",), 0), (("tpu",), 2 * LAYERS), (("cpu", "tpu"), 2 * LAYERS)):
        lowered = traced.lower(lowering_platforms=platforms).as_text()
        assert lowered.count("@LayoutConstraint") == pinned, platforms


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("inside", [True, False], ids=["use_mesh", "no use_mesh"])
def test_a_step_on_a_mesh_sends_two_sums_for_each_layer(inside):
    mesh = make_mesh("tensor=4", jax.devices()[:4])
    with use_mesh(mesh) if inside else contextlib.nullcontext():
        args, kwargs = arguments("loop.advance", make_model(mesh))
        program = Program.compiled(loop.advance.lower(*args, **kwargs))
    inspect_collectives(inspect(program, shards=4))
    assert donated_caches(program) == 2 * LAYERS


LIBTPU = Path(sys.prefix) / "libtpu"  # outside of the packages, where every `import jax` would load it


@pytest.mark.skipif(not (LIBTPU / "libtpu").is_dir(), reason=f"no libtpu in {LIBTPU}: `make test` installs it (Linux)")
def test_a_step_on_a_tpu_v5e(tmp_path):
    tests = REPOSITORY / "tests"
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join(map(str, [REPOSITORY, tests, LIBTPU])),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        # There is no TPU: do not ask the cloud for its metadata, and do not lock the library.
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    command = [sys.executable, "-m", "support.decode_loop", tmp_path / "decode.hlo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    program = Program((tmp_path / "decode.hlo").read_text())
    inspect_collectives(inspect(program, shards=4))
    assert donated_caches(program) == 2 * LAYERS


# The inspection notices mistakes -------------------------------------------------------------------------------

CACHE = jax.ShapeDtypeStruct((2, 4, 64, 32), jnp.float32)
ROW = jax.ShapeDtypeStruct((2, 4, 1, 32), jnp.float32)
WEIGHTS = jax.ShapeDtypeStruct((3, 128, 128), jnp.float32)
X = jax.ShapeDtypeStruct((2, 128), jnp.float32)
LEAST = 64 * 1024


def repeat(step, *given, donate: bool = True) -> Program:
    """The compiled loop over `state = step(i, state, *others)`."""

    def run(state, *others):
        return lax.fori_loop(0, others[-1], lambda i, s: step(i, s, *others[:-1]), state)

    count = jax.ShapeDtypeStruct((), jnp.int32)
    return Program.compiled(jax.jit(run, donate_argnums=0 if donate else ()).lower(*given, count))


def write(i, cache, row):
    return lax.dynamic_update_slice(cache, row, (0, 0, i, 0))


def bodies(program: Program) -> list[str]:
    return [w.called["body"] for w in program.loops()]


def test_an_update_in_place_is_fine():
    program = repeat(write, CACHE, ROW)
    assert program.donated() == ["f32[2,4,64,32]"]
    assert not program.large_results(program.entry, LEAST)


def test_a_cache_that_is_not_donated_is_seen():
    program = repeat(write, CACHE, ROW, donate=False)
    assert not program.donated()
    assert [i.op for i in program.large_results(program.entry, LEAST)] == ["copy"]


def test_a_cache_that_is_passed_through_a_condition_is_seen():  # https://github.com/jax-ml/jax/issues/38145
    def step(i, cache, row):
        return lax.cond(i % 2 == 0, lambda c: jnp.take(c, jnp.array([1, 0]), axis=0), lambda c: c, write(i, cache, row))

    program = repeat(step, CACHE, ROW)
    assert program.large_results(bodies(program)[0], LEAST)


def test_a_cache_that_is_reordered_or_cast_is_seen():
    for change in (lambda c: c[::-1], lambda c: c * 0.5, lambda c: c.astype(jnp.bfloat16).astype(c.dtype)):
        program = repeat(lambda i, cache, row, change=change: change(write(i, cache, row)), CACHE, ROW)
        assert program.large_results(bodies(program)[0], LEAST)


def test_stacked_weights_are_seen():
    def step(i, x, weights):
        return lax.fori_loop(0, 3, lambda layer, x: jnp.tanh(x @ weights[layer]), x)

    program = repeat(step, X, WEIGHTS)
    (readers,) = program.readers(bodies(program)[1], LEAST).values()
    sliced = program.large_results(bodies(program)[0], LEAST)
    assert sliced or not all(program.multiplies(r) for r in readers)


def test_a_weight_that_is_read_twice_is_seen():
    program = repeat(lambda i, x, w: jnp.tanh(jnp.tanh(x @ w) @ w.T), X, jax.ShapeDtypeStruct((128, 128), jnp.float32))
    (readers,) = program.readers(bodies(program)[0], LEAST).values()
    assert len(readers) == 2 and all(program.multiplies(r) for r in readers)
