"""`train.py --plan`: compiles the step of a run for TPUs that are not there, and reports its memory and communication.

The program is the one that a pod would run.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from opt_jax.config import OPTConfig
from opt_jax.parallel.hlo import collective_bytes
from opt_jax.parallel.topologies import HBM, compile_program
from opt_jax.system.temporary import write_file
from opt_jax.training.flops import flops_per_token


def hardware_flops(jaxpr: Any, times: int = 1) -> int:
    """FLOPs of the matrix products of a traced function, with recomputation, over all devices.

    Args:
      jaxpr: the traced function.
      times: how often it runs.
    """
    total = 0
    for equation in jaxpr.eqns:
        parameters, inner_times = equation.params, times
        if equation.primitive.name == "dot_general":
            contracted = (equation.invars[0].aval.shape[i] for i in parameters["dimension_numbers"][0][0])
            total += times * 2 * equation.outvars[0].aval.size * math.prod(contracted)
        elif equation.primitive.name == "scan":
            inner_times = times * parameters["length"]
        elif equation.primitive.name == "shard_map":  # shapes inside are those of one device
            inner_times = times * parameters["mesh"].size
        elif equation.primitive.name == "pallas_call":
            inner_times = times * math.prod(n for n in parameters["grid_mapping"].grid if isinstance(n, int))
        for value in parameters.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(item := getattr(item, "jaxpr", item), "eqns"):
                    total += hardware_flops(item, inner_times)
    return total


def compile_step(train_step: Any, state: Any, batch: Any, capacity: int) -> dict[str, Any]:
    """Compile a step and measure the program.

    Args:
      state: the training state as `jax.ShapeDtypeStruct`s.
      batch: a batch as `jax.ShapeDtypeStruct`s.
      capacity: bytes of HBM of a device.

    Returns:
      {"fits", "hbm_bytes_per_chip", "temporary_bytes", "collective_bytes", "hardware_flops", "compile_seconds"}. If the
      compiler refuses a step that does not fit, the bytes are those in its message, and "collective_bytes" is None.
    """
    start = time.perf_counter()
    traced = train_step.trace(state, batch)
    step = compile_program(traced.lower(), "train_step")
    return {
        "hardware_flops": hardware_flops(traced.jaxpr.jaxpr),
        "fits": step.peak <= capacity and step.program is not None,
        "hbm_bytes_per_chip": step.peak,
        "temporary_bytes": step.peak - step.arguments,
        "collective_bytes": None if step.program is None else collective_bytes(step.program),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def largest_that_fits(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of the candidates for which `fits` is true, by bisection; None if there is none.

    The candidates are in ascending order. If one does not fit, none of the later ones does.
    """
    low, high = 0, len(candidates)  # candidates[:low] fit, candidates[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(candidates[middle]) else (low, middle)
    return candidates[low - 1] if low else None


def make_plan(
    train_step: Any, abstract: Any, shardings: Any, mesh: Any, config: OPTConfig, options: Any, seq_len: int
) -> dict[str, Any]:
    """The plan of a run: its step compiled for its mesh of TPUs, also with other micro-batches to find the largest.

    Args:
      abstract, shardings: of the training state.
      mesh: a mesh of `topologies.topology_devices`.

    Returns:
      What `report` shows and `--plan-output` contains. Sizes are in bytes; names say if they are of one chip.
    """
    capacity = HBM[mesh.devices.flat[0].device_kind]
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = options.batch_size // shards  # sequences per step of one group of chips along `tensor`

    def compile_at(micro: int) -> dict[str, Any]:
        ids = jax.ShapeDtypeStruct((rows // micro, micro * shards, seq_len), jnp.int32)
        names = ["input_ids", "labels", *(["segment_ids"] if options.pack == "segments" else [])]
        what = f"the step with {micro} sequences at a time, on {mesh.size} chips"
        print(f"compiling {what} (up to some minutes) ...", file=sys.stderr, flush=True)
        plan = compile_step(train_step, abstract, dict.fromkeys(names, ids), capacity)
        result = f"{plan['hbm_bytes_per_chip'] / 1e9:,.1f} of {capacity / 1e9:,.1f} GB a chip"
        print(f"  {plan['compile_seconds']:.0f} s: {result}", file=sys.stderr, flush=True)
        return plan

    asked = rows // options.accumulate
    measured = {asked: compile_at(asked)}

    def fits(micro: int) -> bool:
        # A smaller micro-batch than one that fits also fits. A larger one than one that does not fit does not fit.
        if micro not in measured and measured[asked]["fits"] != (micro > asked):
            return measured[asked]["fits"]
        measured[micro] = measured.get(micro) or compile_at(micro)
        return measured[micro]["fits"]

    largest = largest_that_fits([n for n in range(1, rows + 1) if rows % n == 0], fits)
    on_chip = lambda tree, where: sum(  # noqa: E731
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(where), strict=True)
    )
    parameters = sum(x.size for x in jax.tree.leaves(abstract.model))
    tokens = options.batch_size * seq_len
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    if largest is None:
        advice = "not even one fits: more chips, a larger fsdp= or tensor= in --mesh, or --remat full"
    elif not measured[asked]["fits"]:
        advice = f"sequences at a time per {axes.split(' x ')[-1]}: use --accumulate {rows // largest}"
    else:
        advice = f"sequences at a time per group of tensor={mesh.shape['tensor']}: --accumulate {rows // largest}"
    return {
        "title": f"{options.model} on {options.topology}: {axes}; {options.batch_size} x {seq_len} tokens a step, "
        f"{asked} sequences at a time per group of tensor={mesh.shape['tensor']}",
        "model": options.model,
        "topology": options.topology,
        "mesh": dict(mesh.shape),
        **measured[asked],
        "hbm_capacity_bytes": capacity,
        "parameter_bytes_per_chip": on_chip(abstract.model, shardings.model),
        "optimizer_bytes_per_chip": on_chip(abstract.opt_state, shardings.opt_state),
        "parameters": parameters,
        "tokens": tokens,
        "model_flops": round(flops_per_token(config, parameters, seq_len) * tokens),
        "floor_bytes": floor_bytes(config, parameters, mesh, options.accumulate, asked, seq_len),
        "micro_batch": asked,
        "largest_micro_batch": largest,
        "advice": advice,
    }


def floor_bytes(config: OPTConfig, parameters: int, mesh: Any, micro_batches: int, rows: int, seq_len: int) -> int:
    """The least number of bytes that a device sends in a step with full rematerialisation.

    For each micro-batch these are three passes over the weights in bfloat16 along `fsdp` (gathered twice, their
    gradients scattered), and 11 gathers or scatters of the activations of each layer along `tensor`.

    Args:
      micro_batches: number of micro-batches in a step.
      rows: sequences in a micro-batch of one group of chips along `tensor`.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    weights = 3 * 2 * parameters / tensor * (fsdp - 1) / fsdp
    activations = 11 * config.num_hidden_layers * 2 * rows * seq_len * config.hidden_size * (tensor - 1) / tensor
    return round(micro_batches * (weights + activations))


def report(plan: dict[str, Any], output: str | None) -> None:
    """Print the plan as a table. If `output` is the path of a file, also write it there as JSON."""
    table = Table(title=plan["title"], show_header=False, title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("how much", justify="right", no_wrap=True)
    table.add_column("remark")
    gigabytes = lambda size: f"{size / 1e9:,.1f} GB"  # noqa: E731
    capacity, peak = plan["hbm_capacity_bytes"], plan["hbm_bytes_per_chip"]
    table.add_row("parameters, per chip", gigabytes(plan["parameter_bytes_per_chip"]), "float32")
    table.add_row("optimizer, per chip", gigabytes(plan["optimizer_bytes_per_chip"]), "two moments, float32")
    table.add_row("activations and temporaries", gigabytes(plan["temporary_bytes"]), "with gradients")
    table.add_row("peak", gigabytes(peak), f"of {gigabytes(capacity)} HBM")
    table.add_row("headroom", gigabytes(capacity - peak), "fits" if plan["fits"] else "DOES NOT FIT")
    table.add_section()
    teraflops = lambda flops: f"{flops / 1e12:,.0f} TFLOP"  # noqa: E731
    table.add_row("FLOPs per step, model", teraflops(plan["model_flops"]), "6N + attention, all chips")
    share = plan["hardware_flops"] / plan["model_flops"]
    table.add_row("FLOPs per step, hardware", teraflops(plan["hardware_flops"]), f"{share:.2f} x, with recomputation")
    if plan["collective_bytes"] is not None:
        table.add_section()
        for kind, size in plan["collective_bytes"].items():
            table.add_row(f"sent: {kind}", gigabytes(size), "per chip and step")
        table.add_row(
            "sent: total",
            gigabytes(sum(plan["collective_bytes"].values())),
            f"floor {gigabytes(plan['floor_bytes'])} (remat full, bfloat16 gradients)",
        )
    table.add_section()
    table.add_row("compilation", f"{plan['compile_seconds']:.0f} s", "on this machine")
    table.add_row("largest micro-batch", str(plan["largest_micro_batch"] or "none"), plan["advice"])
    Console().print(table)
    if output is not None:
        write_file(output, json.dumps(plan, indent=2).encode() + b"\n")
