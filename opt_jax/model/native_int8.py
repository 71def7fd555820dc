"""Products of int8 weights by compiled C, for CPUs with AVX-512 VNNI, which XLA's own products leave half idle.

`python -m opt_jax.model.native_int8` compiles `native_int8.c`, once for a machine and a version of JAX. Models use it
after `use_native_int8`, and the results are those of `int8.einsum`, bit by bit.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8

from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.quantization import Int8Embed, Int8Linear
from opt_jax.system.temporary import write_file

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
COMMAND = "python -m opt_jax.model.native_int8"
_TARGET, _DIGEST_BYTES = "opt_jax_int8_product", 32


def use_native_int8(model: OPTForCausalLM) -> OPTForCausalLM:
    """A copy of the model whose products of int8 weights run in compiled C. The results are the same, bit by bit.

    The arrays are shared with `model`, which does not change. It needs a CPU with AVX-512 VNNI (`avx512_vnni` in
    /proc/cpuinfo), and `python -m opt_jax.model.native_int8`, once, with a C compiler.

    Args:
      model: a model that `quantize` returned, or one that was saved and loaded.

    Raises:
      ValueError: a model without int8 weights, on a mesh or on an accelerator; a CPU without AVX-512 VNNI; the built C
        part is damaged.
      FileNotFoundError: the C part is not built.
    """
    model = nnx.clone(model)
    modules: list[Any] = [node for _, node in nnx.iter_graph(model) if isinstance(node, Int8Linear | Int8Embed)]
    if not modules:
        raise ValueError("use_native_int8 takes a model with int8 weights: use opt_jax.quantize(model) first")
    for module in modules:
        sharding = getattr(module.weight.get_value(), "sharding", None)  # abstract arrays have none
        devices: set[Any] = set() if sharding is None else sharding.device_set
        if len(devices) > 1:
            raise ValueError("use_native_int8 takes a model on one device: load it without mesh")
        if (platforms := {device.platform for device in devices}) - {"cpu"}:
            raise ValueError(f"use_native_int8 is for CPUs, and this model is on a {platforms.pop()}: leave it out")
    register()
    for module in modules:
        module.product = product
    return model


@jax.custom_jvp
def product(x: Float[Array, "*B K"], weight: Int8[Array, "N K"]) -> Float32[Array, "*B N"]:
    """`int8.einsum("...k,nk->...n", x, weight)`, after `register`."""
    if jax.sharding.get_abstract_mesh().size > 1:
        raise ValueError("use_native_int8 is for one device: on a mesh, use the model that it was given")
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    result = jax.ShapeDtypeStruct((rows.shape[0], weight.shape[0]), jnp.float32)
    out = jax.ffi.ffi_call(_TARGET, result, vmap_method="sequential")(rows, weight)
    return out.reshape(*x.shape[:-1], weight.shape[0])


@product.defjvp
def _(_primals: Any, _tangents: Any):
    raise ValueError("int8 weights have no gradients: train the model that was quantized")


@functools.cache
def register() -> None:
    """Load the library and make its product known to XLA, once in a process. For errors see `use_native_int8`."""
    path = library_path()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not built yet. Run: {COMMAND}")
    content = path.read_bytes()
    if _signed(content[:-_DIGEST_BYTES]) != content:  # to load a truncated library would end the process
        raise ValueError(f"{path}: damaged. Build it again: {COMMAND}")
    library = ctypes.CDLL(str(path))
    if not library.opt_jax_int8_supported():
        raise ValueError("use_native_int8 needs a CPU with AVX-512 VNNI, and this one has none: leave it out")
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.opt_jax_int8_product), platform="cpu")


def library_path() -> Path:
    """Where the library is, or would be: a name that tells its source, JAX's version and the kind of machine."""
    machine = platform.system(), platform.machine()
    parts = (SOURCE.read_text(encoding="utf-8"), *FLAGS, "sha256", jax.__version__, *machine)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "opt-jax" / f"native_int8-{digest}.so"


def build() -> Path:
    """Compile the library with `CC`, or cc. It appears complete or not at all.

    Returns:
      Its path.

    Raises:
      RuntimeError: no x86-64 processor; no compiler, or one that fails.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(f"the C part is for x86-64 processors, and this one is {platform.machine()}")
    compiler, path = shlex.split(os.environ.get("CC") or "cc"), library_path()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, path.name)
        arguments = [*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(output)]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        except OSError:
            raise RuntimeError(
                f"no C compiler: {compiler[0]} was not found. Install gcc, or name one: CC=..."
            ) from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
            raise RuntimeError(f"{compiler[0]} cannot compile {SOURCE.name}: {lines[0]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, _signed(output.read_bytes()))
    return path


def _signed(library: bytes) -> bytes:
    """The library with a digest behind it, which loading ignores."""
    return library + hashlib.sha256(library).digest()


def main() -> None:
    try:
        print(f"Built {build()}. opt_jax.use_native_int8(model) uses it.")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"native_int8: error: {error}")


if __name__ == "__main__":
    main()
