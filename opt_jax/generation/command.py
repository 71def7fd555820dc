"""`opt-jax generate --plan`: its options, and what they stand for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from opt_jax.config import OPTConfig
from opt_jax.system.temporary import refuse_links

Integer = Annotated[int | None, tyro.conf.arg(metavar="INT")]


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Options of `opt-jax generate --plan`, which `generate` without --plan does not take."""

    plan: bool = False
    """Generate nothing: compile for a slice of TPUs that need not be there, and print what a (greedy) decode step
    reads and sends. --model may also be a size, such as 6.7b. No weights are read."""
    topology: str | None = None
    """With --plan: the slice, as in v5e:2x4 or v5p:2x2x2 (v4, v5e, v5p, v6e)."""
    mesh: str | None = None
    """With --plan: the mesh, as in tensor=8 or data=2,tensor=4. Default: all chips on tensor."""
    batch_size: Integer = None
    """With --plan: prompts at a time. Default: 1."""
    max_length: Integer = None
    """With --plan: tokens of a prompt and its continuation. Default: the model's context. Of these are
    --max-new-tokens new, by default half."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """With --plan: of weights and computation. Default: bfloat16."""
    cache_dtype: Literal["bfloat16", "float16", "float32", "int8"] | None = None
    """With --plan: of the cache. Default: that of --dtype."""
    plan_output: Annotated[str | None, tyro.conf.arg(metavar="FILE.json")] = None
    """With --plan: also write the numbers to this file, as JSON."""


def check(options: PlanOptions, others: Mapping[str, bool]) -> None:
    """Check the options.

    Args:
      options: those of --plan.
      others: option of `generate` that plays no part in a plan -> whether it was given.

    Raises:
      ValueError: an option is missing, has a bad value, or has no effect.
    """
    changed = [name for name, value in dataclasses.asdict(options).items() if value is not None and name != "plan"]
    if not options.plan:
        if changed:
            raise ValueError(f"{flag(changed[0])} is for --plan: leave it out, or add --plan")
        return
    if unused := [name for name, given in others.items() if given]:
        raise ValueError(f"--plan compiles greedy decoding and runs nothing: leave out {', '.join(unused)}")
    if options.topology is None:
        raise ValueError("--plan needs --topology, the TPU slice to compile for, as in v5e:2x4")
    for name in ("batch_size", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} {value}: must be at least 1")
    if options.plan_output is not None:
        if not Path(options.plan_output).absolute().parent.is_dir():
            raise ValueError(f"--plan-output {options.plan_output}: there is no such directory to write it to")
        refuse_links(options.plan_output)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def plan_generation(name: str, max_new_tokens: int | None, options: PlanOptions) -> None:
    """Print the plan of a model, and write it to --plan-output.

    Raises:
      OSError, ValueError: there is no such model, slice or mesh, or they do not fit each other.
    """
    from opt_jax.parallel.topologies import topology_devices

    assert options.topology is not None
    devices = topology_devices(options.topology)  # before JAX looks for devices

    from opt_jax.generation.plan import make_plan, report
    from opt_jax.parallel.mesh import make_mesh

    config = _config(name)
    mesh = make_mesh(options.mesh or "tensor=-1", devices)
    length = options.max_length or config.max_position_embeddings
    new = length // 2 if max_new_tokens is None else max_new_tokens
    if not 0 < new < length:
        raise ValueError(f"--max-new-tokens {new}: must be at least 1 and less than --max-length {length}")
    plan: dict[str, Any] = {"model": name, "topology": options.topology}
    dtype = options.dtype or "bfloat16"
    plan |= make_plan(config, mesh, options.batch_size or 1, length, new, dtype, options.cache_dtype)
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    report(plan, f"{name} on {options.topology}: {axes}; {plan['batch_size']} x {length} tokens", options.plan_output)


def _config(name: str) -> OPTConfig:
    """The config that --model stands for: a size ("6.7b", "facebook/opt-6.7b"), "tiny", a directory or a hub id."""
    from opt_jax.checkpoints import hub, pretrained

    try:
        return OPTConfig.preset(name)
    except ValueError:
        directory = hub.resolve(name, weights=False)
    if hub.quantization(directory)[2]:
        raise ValueError(f"--plan --model {name}: its weights are quantized, and --plan is for floating point weights")
    return pretrained.read_config(directory)[0]
