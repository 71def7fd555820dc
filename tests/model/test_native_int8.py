"""The compiled products of int8 weights: those of `int8.einsum`, bit by bit, or one line that says why not."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import our_model
from support.small_models import on_mesh

from opt_jax import quantize, use_native_int8
from opt_jax.model import int8, native_int8
from opt_jax.model.quantization import count_int8
from opt_jax.parallel.mesh import make_mesh, use_mesh

IDS = np.array([[4, 5, 6, 7, 8], [3, 9, 17, 5, 11]], np.int32)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """An empty directory for the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        native_int8.register.cache_clear()
        yield
    native_int8.register.cache_clear()


@pytest.fixture(scope="module")
def built(cache):
    compiler = shlex.split(os.environ.get("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C compiler, and there is no {compiler}")
    if not re.search(r"\bavx512_vnni\b", native_cpu()):
        pytest.skip("needs a CPU with AVX-512 VNNI")
    native_int8.build()
    native_int8.register()


def native_cpu() -> str:
    return Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""


def rows(tokens: int, size: int) -> np.ndarray:
    """Normal numbers, and in the last rows an outlier, a zero row, the smallest numbers."""
    x = np.random.default_rng(tokens).standard_normal((tokens, size)).astype(np.float32)
    x[-1, size // 2] = 100
    x[-2:-1] = 0
    x[-3:-2] *= 1e-38
    return x


def matrix(outputs: int, size: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(size).integers(-128, 128, (outputs, size)), jnp.int8)


def einsum(x: jax.Array, weight: jax.Array) -> jax.Array:
    return int8.einsum("tk,nk->tn", x, weight)


# One row and more, with and without an odd one; blocks of 32; vectors of 64; groups of 8 outputs, and parts of them.
SHAPES = [(1, 64, 8), (1, 1, 1), (2, 96, 40), (3, 100, 37), (5, 65, 9), (8, 768, 768), (32, 128, 80), (33, 192, 300)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "size", "outputs"), [*SHAPES, (131, 768, 130)])
def test_products_are_equal_bit_by_bit(built, tokens, size, outputs, dtype):
    x, weight = jnp.asarray(rows(tokens, size), dtype), matrix(outputs, size)
    expected = np.asarray(jax.jit(einsum)(x, weight))
    assert np.abs(expected).max() > 0 and (expected == einsum(x, weight)).all()
    for function in (native_int8.product, jax.jit(native_int8.product)):
        out = function(x, weight)
        assert out.dtype == jnp.float32 and out.shape == (tokens, outputs)
        np.testing.assert_array_equal(np.asarray(out).view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_stay_so_in_their_row(built, value):
    x, weight = rows(5, 64), matrix(16, 64)
    expected = np.asarray(native_int8.product(x, weight))
    x[2, 7] = value
    out = np.asarray(native_int8.product(x, weight))
    assert not np.isfinite(out[2]).any() and not np.isfinite(einsum(jnp.asarray(x), weight)[2]).any()
    np.testing.assert_array_equal(out[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_leading_axes_and_vmap(built):
    x, weight = rows(12, 96).reshape(2, 3, 2, 96), matrix(40, 96)
    expected = jax.jit(einsum)(x.reshape(-1, 96), weight).reshape(2, 3, 2, 40)
    np.testing.assert_array_equal(native_int8.product(x, weight), expected)
    np.testing.assert_array_equal(jax.vmap(native_int8.product, (0, None))(x, weight), expected)


def test_calls_at_the_same_time_do_not_disturb_each_other(built):
    weight, call = matrix(1000, 256), jax.jit(native_int8.product)
    inputs = [jnp.asarray(rows(tokens, 256)) for tokens in (1, 2, 7, 40)] * 20
    expected = [np.asarray(einsum(x, weight)) for x in inputs[:4]]
    with ThreadPoolExecutor(4) as pool:
        for i, out in enumerate(pool.map(lambda x: np.asarray(call(x, weight)), inputs)):
            np.testing.assert_array_equal(out, expected[i % 4])


# Models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "untied"])
def test_all_products_of_a_model_are_compiled_ones(built, name):
    model = quantize(our_model(name))
    native = use_native_int8(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(native), strict=True))

    def calls(model) -> int:
        text = jax.jit(lambda ids: model.forward(ids).logits).lower(IDS).as_text()
        return text.count("custom_call @opt_jax_int8_product")

    # A tied table is looked up and multiplied, an untied one is only looked up.
    assert calls(native) == count_int8(model) - (not model.config.tie_word_embeddings) and calls(model) == 0


def test_a_model_generates_the_same_tokens(built):
    model = quantize(our_model("opt-125m", num_hidden_layers=1))
    native = use_native_int8(model)
    np.testing.assert_allclose(native(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    out, expected = (m.generate(IDS, max_new_tokens=6, eos_token_id=[]).sequences for m in (native, model))
    np.testing.assert_array_equal(out, expected)


def test_what_cannot_use_it_is_refused(built):
    float_model = our_model("opt-125m")
    model = quantize(float_model)
    with pytest.raises(ValueError, match=r"takes a model with int8 weights: use opt_jax.quantize\(model\) first"):
        use_native_int8(float_model)
    mesh = make_mesh("data=8")
    with pytest.raises(ValueError, match="takes a model on one device"):
        use_native_int8(quantize(on_mesh(float_model, mesh)))
    native = use_native_int8(model)
    with use_mesh(mesh), pytest.raises(ValueError, match="is for one device"):
        native.forward(jnp.asarray(IDS))
    with pytest.raises(ValueError, match="no gradients"):
        jax.grad(lambda x: native.forward(inputs_embeds=x).logits.sum())(jnp.ones((1, 4, model.config.embed_dim)))


# Building -----------------------------------------------------------------------------------------------------


def test_a_library_that_is_not_built_is_an_error_that_says_how(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_int8.register.cache_clear()
    with pytest.raises(FileNotFoundError, match="not built yet. Run: python -m opt_jax.model.native_int8"):
        use_native_int8(quantize(our_model("opt-125m")))


@pytest.mark.parametrize("kept", [slice(0), slice(3000), slice(1, None), slice(-32)])
def test_a_damaged_library_is_an_error_that_says_how(built, monkeypatch, tmp_path, kept):
    """Not a bus error, which ends the process without a word."""
    content = native_int8.library_path().read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_int8.library_path().parent.mkdir()
    native_int8.library_path().write_bytes(content[kept])
    native_int8.register.cache_clear()
    with pytest.raises(ValueError, match="damaged. Build it again: python -m opt_jax.model.native_int8"):
        native_int8.register()


def test_errors_of_the_compiler_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failing = f"{sys.executable} -c 'import sys; sys.exit(\"x.c: error: no such target\")'"
    for compiler, message in (
        ("no-such-cc -m64", "no C compiler: no-such-cc was not found. Install gcc, or name one: CC=..."),
        (failing, "cannot compile native_int8.c: x.c: error: no such target"),
        ("'gcc", "No closing quotation"),
    ):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(SystemExit) as ended:
            native_int8.main()
        assert str(ended.value).startswith("native_int8: error: ") and str(ended.value).endswith(message)
        assert "\n" not in str(ended.value)
    assert not list(tmp_path.rglob("*.so*"))


def test_the_source_compiles_without_a_warning(built, tmp_path):
    arguments = ["-Wall", "-Wextra", "-Werror", f"-I{jax.ffi.include_dir()}", "-c", str(native_int8.SOURCE), "-o"]
    compiler = shlex.split(os.environ.get("CC") or "cc")
    subprocess.run([*compiler, *native_int8.FLAGS, *arguments, str(tmp_path / "x.o")], check=True)
