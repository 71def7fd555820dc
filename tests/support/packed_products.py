"""Products with packed matrices, compiled for a TPU v5e or an NVIDIA H200 that is not there.

`python -m support.packed_products tpu|cuda DIRECTORY` writes the optimized HLO of products with a matrix [4096, 16384].
Needs `libtpu`, or JAX's CUDA plug-in, on PYTHONPATH.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from support.gpu_programs import h200

from opt_jax.model.packing import product

# (rows, bits) that must read packed words only. A TPU takes integers that cross words apart first.
CASES = {
    "tpu": [(rows, bits) for rows in (1, 8) for bits in (2, 4, 8)],
    "cuda": [(rows, bits) for rows in (1, 2, 8) for bits in (3, 4, 8)],
}


def compiled(device: Any, rows: int, bits: int) -> str:
    """The optimized HLO of a product in bfloat16, in groups of 128."""
    shapes = {
        "x": ((rows, 4096), jnp.bfloat16),
        "qweight": ((4096 * bits // 32, 16384), jnp.uint32),
        "scales": ((32, 16384), jnp.float32),
        "zeros": ((32, 16384), jnp.uint8),
    }
    place = SingleDeviceSharding(device)
    given = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes.values())
    return jax.jit(product, static_argnums=4).lower(*given, bits).compile().as_text() or ""


if __name__ == "__main__":
    from jax.experimental import topologies

    platform, directory = sys.argv[1], Path(sys.argv[2])
    if platform == "tpu":
        chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    else:
        chip = h200().devices.flat[0]
    for case in [*CASES[platform], (64, 4)]:
        (directory / "{}-{}.hlo".format(*case)).write_text(compiled(chip, *case))
