"""`opt-jax generate --plan`: compiles prefill and decoding for TPUs that are not there, and reports what a step needs.

A decode step is as fast as a chip reads its part of the weights and of the cache. So the report compares what a step of
the compiled program reads with what it must read.
"""

import json
import math
import sys
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from opt_jax.config import OPTConfig
from opt_jax.generation import loop
from opt_jax.generation.engines import padded
from opt_jax.generation.loop import FlatModel
from opt_jax.generation.memory import column_bytes
from opt_jax.generation.prompts import batch_bucket, take_prompts
from opt_jax.generation.request import Request, check_request
from opt_jax.model.heads import OPTForCausalLM, named_parameters
from opt_jax.parallel.hlo import Program, collective_bytes, collective_counts
from opt_jax.parallel.mesh import row_groups, use_mesh
from opt_jax.parallel.rules import param_sharding
from opt_jax.parallel.topologies import HBM, HBM_BANDWIDTH, CompiledProgram, compile_program
from opt_jax.system.temporary import write_file


def abstract_model(config: OPTConfig, mesh: Mesh, dtype: str) -> OPTForCausalLM:
    """A model whose parameters are `jax.ShapeDtypeStruct`s with their shardings on the mesh."""
    build = lambda: OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)  # noqa: E731
    model: OPTForCausalLM = nnx.eval_shape(build)
    for path, param in named_parameters(model).items():
        value = param.get_value()
        sharding = param_sharding(path, value.shape, mesh)
        param.set_value(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))
    return model


def compile_generation(
    model: OPTForCausalLM, request: Request, mesh: Mesh
) -> tuple[CompiledProgram, CompiledProgram | None]:
    """Compile what `generate` runs: the prefill, and the loop of decode steps. None: the prefill does not fit."""
    rows = padded(np.arange(request.rows), batch_bucket(request.rows))
    flat = FlatModel.of(model)
    prompts, options = _abstract((take_prompts(request.prompts, rows), request.options_of(rows)))
    how: dict[str, Any] = dict(capacity=request.capacity, do_sample=False, cache_dtype=request.cache_dtype)
    with use_mesh(mesh):
        lowered = loop.begin.lower(flat, prompts, options, **how)
        prefill = compile_program(lowered, "begin")
        if prefill.program is None:
            return prefill, None
        state, _ = lowered.out_info
        state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            prefill.output_shardings[0],
        )
        number = jax.ShapeDtypeStruct((), jnp.int32)
        lowered = loop.advance.lower(flat, state, options, number, number, do_sample=False)
        return prefill, compile_program(lowered, "advance")


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def floor_bytes(model: OPTForCausalLM, mesh: Mesh, rows: int, columns: int, cache_dtype: str | None) -> int:
    """The least number of bytes that a chip reads in a decode step: its part of the weights and of the cache.

    A step looks up one row of the position embeddings for each token, and of the token embeddings if they are not the
    LM head as well.

    Args:
      rows: sequences.
      columns: tokens of each sequence that are in the cache.
    """
    looked_up = ["embed_positions", *(["embed_tokens"] if model.lm_head is not None else [])]
    read = [p.get_value() for path, p in named_parameters(model).items() if path.split(".")[2] not in looked_up]
    heads = math.ceil(rows / row_groups(mesh)) / mesh.shape["tensor"]
    return _on_chip(read) + round(heads * columns * column_bytes(model.config, cache_dtype or model.dtype))


def _on_chip(arrays: Any) -> int:
    """Bytes of a chip's part of the arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def step_numbers(program: Program, cache_bytes: int) -> dict[str, Any]:
    """What one step of the compiled decode loop reads, copies and sends.

    Args:
      program: the compiled `loop.advance`.
      cache_bytes: bytes of a chip's part of the keys of one layer, without their scales. Only arrays of that size count
        as copies.

    Returns:
      "copies" and "copied_bytes" are of one step: arrays that it writes anew instead of updating them. "call_copies"
      and "call_copied_bytes" are those around the loop, in another layout for example: `generate` has one call, and
      `stream` one for each token.
    """
    decode = max(program.loops(), key=lambda loop: sum(size for _, size in loop.arrays))
    body, entry = decode.called["body"], program.computations[program.entry]
    copies = program.large_results(body, cache_bytes)
    around = [i for i in program.large_results(program.entry, 2**20) if i.name in entry and i.op == "copy"]
    return {
        "read_bytes": program.bytes_read(body),
        "copies": Counter(i.arrays[0][0] for i in copies),
        "copied_bytes": sum(i.hbm_bytes for i in copies),
        "call_copies": Counter(i.arrays[0][0] for i in around),
        "call_copied_bytes": sum(i.hbm_bytes for i in around),
        "collectives": collective_counts(program, body),
        "collective_bytes": collective_bytes(program, body),
    }


def make_plan(
    config: OPTConfig, mesh: Mesh, rows: int, max_length: int, max_new_tokens: int, dtype: str, cache_dtype: str | None
) -> dict[str, Any]:
    """The plan of a call of `generate`, greedy, with prompts of equal length.

    Args:
      config: the model.
      mesh: a mesh of `topologies.topology_devices`.
      rows: prompts.
      max_length: tokens of a prompt and its continuation.
      max_new_tokens: of the continuation.
      dtype: of the weights and the computation.
      cache_dtype: of the cache; None: `dtype`.

    Returns:
      What `report` shows and `--plan-output` contains. Sizes are in bytes, of one chip.

    Raises:
      ValueError: as from `generate` and `param_sharding`.
    """
    start, device = time.perf_counter(), mesh.devices.flat[0].device_kind
    model = abstract_model(config, mesh, dtype)
    ids = np.full((rows, max_length - max_new_tokens), config.vocab_size - 1)
    given = dict(max_new_tokens=max_new_tokens, cache_dtype=cache_dtype)
    request = check_request(model, ids, np.ones_like(ids), options=given)
    print(f"compiling for {mesh.size} chips (up to some minutes) ...", file=sys.stderr, flush=True)
    prefill, decode = compile_generation(model, request, mesh)
    peak = max(prefill.peak, 0 if decode is None else decode.peak)
    columns = request.prompts.mask.shape[1] + request.capacity
    padded_rows = batch_bucket(rows)
    cache = padded_rows * columns * request.column_bytes // row_groups(mesh) // mesh.shape["tensor"]
    fits = decode is not None and decode.program is not None and peak <= HBM[device]
    plan = {
        "mesh": dict(mesh.shape),
        "batch_size": rows,
        "prompt_length": ids.shape[1],
        "max_length": max_length,
        "cache_rows": padded_rows,
        "cache_columns": columns,
        "dtype": dtype,
        "cache_dtype": cache_dtype or dtype,
        "fits": fits,
        "hbm_capacity_bytes": HBM[device],
        "hbm_bytes_per_chip": peak,
        "parameter_bytes_per_chip": _on_chip(model),
        "cache_bytes_per_chip": cache,
        "prefill_peak_bytes": prefill.peak,
        "floor_bytes": floor_bytes(model, mesh, rows, max_length, cache_dtype),
    }
    if decode is not None and decode.program is not None:
        width = config.hidden_size * np.dtype(cache_dtype or dtype).itemsize
        step = step_numbers(decode.program, padded_rows * columns * width // row_groups(mesh) // mesh.shape["tensor"])
        plan |= step | {
            "decode_peak_bytes": decode.peak,
            "read_ratio": round(step["read_bytes"] / plan["floor_bytes"], 3),
            "milliseconds": round((step["read_bytes"] + step["copied_bytes"]) / HBM_BANDWIDTH[device] * 1e3, 3),
        }
    return plan | {"compile_seconds": round(time.perf_counter() - start, 1)}


def report(plan: dict[str, Any], title: str, output: str | None) -> None:
    """Print the plan as a table. If `output` is the path of a file, also write it there as JSON."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("how much", justify="right", no_wrap=True)
    table.add_column("remark")
    gigabytes = lambda size: f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"  # noqa: E731
    capacity, peak = plan["hbm_capacity_bytes"], plan["hbm_bytes_per_chip"]
    table.add_row("weights, per chip", gigabytes(plan["parameter_bytes_per_chip"]), plan["dtype"])
    cache = f"{plan['cache_rows']} rows of {plan['cache_columns']} columns, {plan['cache_dtype']}"
    table.add_row("cache, per chip", gigabytes(plan["cache_bytes_per_chip"]), cache)
    table.add_row("peak of the prefill", gigabytes(plan["prefill_peak_bytes"]), f"{plan['prompt_length']} tokens a row")
    if "read_bytes" in plan:
        table.add_row("peak of decoding", gigabytes(plan["decode_peak_bytes"]), "")
    table.add_row("headroom", gigabytes(capacity - peak), "fits" if plan["fits"] else "DOES NOT FIT")
    if "read_bytes" in plan:
        table.add_section()
        table.add_row("a step must read", gigabytes(plan["floor_bytes"]), "weights, and the cache of these tokens")
        table.add_row("a step reads", gigabytes(plan["read_bytes"]), f"{plan['read_ratio']:.2f} x as much")
        for name, what in (("copies", "a step writes anew"), ("call_copies", "copied in each call")):
            arrays = ", ".join(f"{count} x {array}" for array, count in plan[name].items())
            table.add_row(what, gigabytes(plan[name.replace("copies", "copied_bytes")]), arrays or "nothing large")
        table.add_row("a step takes", f"{plan['milliseconds']:.2f} ms", "for these bytes, at the chip's bandwidth")
        table.add_section()
        for kind, count in plan["collectives"].items():
            size = plan["collective_bytes"][kind]
            table.add_row(f"sent: {kind}", gigabytes(size), f"{count} a step")
    table.add_section()
    table.add_row("compilation", f"{plan['compile_seconds']:.0f} s", "on this machine")
    Console().print(table)
    if output is not None:
        write_file(output, json.dumps(plan, indent=2).encode() + b"\n")
