"""TPU slices that are not there: their devices, and what a program compiled for them needs.

The compiler for TPUs (libtpu) runs on any Linux machine and knows every slice by name.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from opt_jax.parallel.hlo import Program
from opt_jax.system.messages import one_line

# device_kind -> bytes of HBM that a program may use. Source: the message of libtpu 0.0.42 for a program that does not
# fit. (A device of "TPU v4" is a chip: see `_MEGACORE`.)
HBM = {
    name: int(gib * 2**30)
    for name, gib in {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}.items()
}
# device_kind -> bytes of HBM that a chip reads per second. Source: Google Cloud's page on each generation.
HBM_BANDWIDTH = {"TPU v4": 1.2e12, "TPU v5 lite": 0.819e12, "TPU v5": 2.765e12, "TPU v6 lite": 1.638e12}
# Generation of TPUs -> the name of a slice of n chips in TPU_ACCELERATOR_TYPE, and the chips of a pod (Google Cloud's
# page on each). libtpu itself accepts larger shapes, until the host's memory is used up.
_PODS = {"v4": ("v4-{2n}", 4096), "v5e": ("v5litepod-{n}", 256), "v5p": ("v5p-{2n}", 8960), "v6e": ("v6e-{n}", 256)}
# The two cores of a chip of this generation are one device if libtpu is told so, as JAX's meshes need them to be.
_MEGACORE = {"v4": {"chip_config_name": "megacore"}}


def topology_devices(name: str) -> Sequence[Any]:
    """The devices of a TPU topology such as "v5p:8x8x8". They need not exist. Call this before JAX looks for devices.

    Raises:
      ValueError: libtpu does not know the name, or is not installed.
    """
    parts = re.fullmatch(r"(v\w+):(\d+(?:x\d+)+)", name)
    if parts is None or parts[1] not in _PODS:
        raise ValueError(
            f"--topology {name}: expected a generation ({', '.join(_PODS)}) and a shape in chips, "
            "as in v5e:4x8 or v5p:8x8x8"
        )
    chips, (accelerator, most) = math.prod(map(int, parts[2].split("x"))), _PODS[parts[1]]
    if chips > most:
        raise ValueError(f"--topology {name}: {chips} chips, a pod of {parts[1]} has {most}: choose a smaller shape")
    accelerator = accelerator.replace("{n}", str(chips)).replace("{2n}", str(2 * chips))
    # There is no TPU: libtpu must not ask the cloud's metadata server for one, nor lock out other processes.
    os.environ |= dict(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE=accelerator, TPU_WORKER_HOSTNAMES="localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")
    beside = Path(sys.prefix, "libtpu")  # where `make test` puts it
    if importlib.util.find_spec("libtpu") is None and (beside / "libtpu").is_dir():
        sys.path.append(str(beside))
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("--plan needs libtpu, the compiler for TPUs: pip install 'jax[tpu]' (Linux on x86)")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **_MEGACORE.get(parts[1], {})).devices
    except Exception as error:  # libtpu raises several types; its message says what is wrong
        why, shapes = one_line(error) or type(error).__name__, "2x2, 2x4, 4x4, 4x8, ..."
        if parts[1] in ("v4", "v5p"):
            shapes = "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, ..."
        if "INVALID_ARGUMENT" in why:
            why = f"libtpu knows no such slice ({why}): choose one of {shapes}"
        raise ValueError(f"--topology {name}: {why}") from None


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program compiled for a slice. Sizes are in bytes, of one device.

    If the compiler refuses a program that does not fit, `peak` is what it says is needed, and there is no program.
    """

    peak: int  # the most HBM in use at once
    arguments: int
    program: Program | None
    output_shardings: Any


def compile_program(lowered: Any, name: str) -> CompiledProgram:
    """Compile what `jax.jit(f).lower(...)` returns. `name`: that of the function."""
    with tempfile.TemporaryDirectory() as dump:
        # A dump, because `compiled.as_text()` fails for the programs of large slices.
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": f".*{name}.*"}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"\((\d+(?:\.\d+)?)([MGT])\)", str(error))
            if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
                raise
            size = int(float(needed[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[needed[2]])
            return CompiledProgram(size, 0, None, None)
        memory = compiled.memory_analysis()
        text = next(Path(dump).glob("*.after_optimizations.txt")).read_text(encoding="utf-8")
        return CompiledProgram(
            memory.peak_memory_in_bytes, memory.argument_size_in_bytes, Program(text), compiled.output_shardings
        )
