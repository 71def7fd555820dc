"""Programs as XLA compiles them for an NVIDIA H200, for inspection, on a machine without a GPU.

`python -m support.gpu_programs DIRECTORY` writes the optimized HLO of a decode step and of a training step of the 1.3B
with few layers, in bfloat16. It needs JAX's CUDA plug-in: `make .venv/cuda/.installed` puts it into .venv/cuda. XLA has
no GPU on which it could time kernels, so on the card their tiles, and their splits of products, may be others.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from support.decode_loop import arguments

from opt_jax import OPTConfig, OPTForCausalLM
from opt_jax.generation import loop
from opt_jax.parallel.mesh import make_mesh, replicated, use_mesh
from opt_jax.training.options import parse_options
from opt_jax.training.setup import make_setup

# What XLA looks at, from NVIDIA's data sheet and CUDA's programming guide (compute capability 9.0).
H200 = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def h200() -> Any:
    """A mesh of one H200 that is not there."""
    from jax.experimental import topologies

    described = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H200
    )
    return make_mesh("data=1", described.devices[:1])


def decode_step(mesh: Any, layers: int, rows: int) -> str:
    """The optimized HLO of `generate`'s loop. (On a GPU one row is computed as two; see `engines.py`.)"""
    config = OPTConfig.preset("1.3b", num_hidden_layers=layers)
    make = partial(OPTForCausalLM, config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    args, kwargs = arguments("loop.advance", make(), rows)
    here = replicated(mesh)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args)
    with use_mesh(mesh):
        return loop.advance.lower(*args, **kwargs).compile().as_text() or ""


def training_step(mesh: Any, directory: Path, layers: int) -> str:
    """The optimized HLO of train.py's step, with 8 x 2048 tokens."""
    config = directory / "config.json"
    OPTConfig.preset("1.3b", num_hidden_layers=layers, dropout=0.0, attention_dropout=0.0).save_pretrained(directory)
    words = ["--model", str(config), "--dtype", "bfloat16", "--batch-size", "8", "--seq-len", "2048", "--remat", "dots"]
    setup = make_setup(parse_options([*words, "--attention", "cudnn", "--mesh", "data=1"], "train.py"), mesh)
    ids = jax.ShapeDtypeStruct((1, 8, 2048), jnp.int32, sharding=replicated(mesh))
    batch = dict.fromkeys(("input_ids", "labels"), ids)
    with use_mesh(mesh):
        return setup.make_train_step().lower(setup.state, batch).compile().as_text() or ""


if __name__ == "__main__":
    place, gpu = Path(sys.argv[1]), h200()
    for depth in (2, 3):
        (place / f"decode-{depth}.hlo").write_text(decode_step(gpu, depth, 2))
    (place / "train.hlo").write_text(training_step(gpu, place, 2))
