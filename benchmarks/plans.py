"""`train.py --plan` of the nine sizes, each on slices of TPU v5e, v5p and v6e: the tables of docs/scaling.md.

Run: `.venv/bin/python -m benchmarks.plans [SIZE ...] [--generations v5p]`, on a Linux machine with libtpu; minutes for
each plan. With the paper's batch, sequences of 2048, full rematerialisation, bfloat16 gradients, no dropout.

With --decode: `opt-jax generate --plan` of 1.3B to 175B, 8 rows with 2048 columns in the cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from opt_jax import OPTConfig
from opt_jax.training.recipes import SEQ_LEN, recipe_options

REPOSITORY = Path(__file__).resolve().parents[1]
# Size -> for each generation (topology, mesh).
SLICES = {
    "125m": ("v5e:2x4 fsdp=8", "v5p:2x2x1 fsdp=4", "v6e:2x2 fsdp=4"),
    "350m": ("v5e:4x4 fsdp=16", "v5p:2x2x2 fsdp=8", "v6e:2x4 fsdp=8"),
    "1.3b": ("v5e:4x8 fsdp=32", "v5p:2x2x4 fsdp=16", "v6e:4x4 fsdp=16"),
    "2.7b": ("v5e:8x8 fsdp=64", "v5p:2x4x4 fsdp=32", "v6e:4x8 fsdp=32"),
    "6.7b": ("v5e:8x16 fsdp=128", "v5p:4x4x4 fsdp=64", "v6e:8x8 fsdp=64"),
    "13b": ("v5e:16x16 fsdp=256", "v5p:4x4x8 fsdp=128", "v6e:8x16 fsdp=128"),
    "30b": ("v5e:16x16 fsdp=64,tensor=4", "v5p:4x8x8 fsdp=256", "v6e:16x16 fsdp=256"),
    "66b": ("v5e:16x16 fsdp=32,tensor=8", "v5p:8x8x8 fsdp=128,tensor=4", "v6e:16x16 fsdp=64,tensor=4"),
    "175b": ("v5e:16x16 fsdp=16,tensor=16", "v5p:8x8x8 fsdp=64,tensor=8", "v6e:16x16 fsdp=32,tensor=8"),
}
GENERATIONS = ("v5e", "v5p", "v6e")
# The smallest slices on which the heads divide; at least four chips.
DECODE_SLICES = {
    "1.3b": ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
    "2.7b": ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
    "6.7b": ("v5e:2x4", "v5p:2x2x1", "v6e:2x2"),
    "13b": ("v5e:2x4", "v5p:2x2x1", "v6e:2x2"),
    "30b": ("v5e:2x4", "v5p:2x2x1", "v6e:2x4"),
    "66b": ("v5e:4x4 fsdp=2,tensor=8", "v5p:2x2x1", "v6e:2x4"),
    "175b": ("v5e:4x8", "v5p:2x2x2", "v6e:4x4"),
}


def likely_micro_batch(size: str, topology: str, fsdp: int, tensor: int) -> int:
    """A micro-batch that probably fits, and is not much smaller than possible. Each attempt compiles for minutes."""
    config, rows = OPTConfig.preset(size), recipe_options(f"opt-{size}")["batch_size"] // fsdp
    width, depth = config.hidden_size, config.num_hidden_layers
    weights = 12 * width**2  # of a layer
    state = 16 * (weights * depth / (fsdp * tensor) + 50272 * width / tensor / fsdp)
    once = 2**31 + 8 * weights / tensor + 10 * 50272 * width / tensor
    room = 0.9 * 2**30 * {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}[topology[:3]] - state - once
    kept = 2 * SEQ_LEN * width * depth / tensor  # of a sequence: the input of every layer
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * kept <= room))


def plan(size: str, topology: str, mesh: str, micro_batch: int | None) -> dict:
    """What `train.py --plan` writes. `micro_batch`: sequences at a time for each group of chips that share them."""
    sizes = {name: int(count) for name, count in (axis.split("=") for axis in mesh.split(","))}
    rows = recipe_options(f"opt-{size}")["batch_size"] // sizes["fsdp"]
    micro_batch = micro_batch or likely_micro_batch(size, topology, sizes["fsdp"], sizes.get("tensor", 1))
    words = (
        f"--recipe opt-{size} --dropout 0 --remat full --grad-dtype bfloat16 --mesh {mesh} --plan --topology {topology}"
    )
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "plan.json"
        command = [sys.executable, str(REPOSITORY / "train.py"), *words.split(), "--plan-output", str(output)]
        command += ["--accumulate", str(max(1, rows // micro_batch))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{size} on {topology}: {done.stderr.strip() or done.stdout.strip()}")
        return json.loads(output.read_text(encoding="utf-8"))


def decode_plan(size: str, topology: str, mesh: str) -> dict:
    """What `opt-jax generate --plan` writes. Prompts are short, because a long prefill compiles for minutes."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "plan.json"
        words = f"generate --plan --model {size} --topology {topology} --mesh {mesh} --batch-size 8 --max-length 2048"
        command = [sys.executable, "-m", "opt_jax", *words.split(), "--max-new-tokens", str(2048 - 16)]
        done = subprocess.run(
            [*command, "--plan-output", str(output)], capture_output=True, text=True, check=False, cwd=REPOSITORY
        )
        if done.returncode:
            sys.exit(f"{size} on {topology}: {done.stderr.strip() or done.stdout.strip()}")
        return json.loads(output.read_text(encoding="utf-8"))


def decode_table(sizes: list[str], generations: list[str]) -> None:
    columns = (
        "size",
        "slice",
        "mesh",
        "weights, GB/chip",
        "cache, GB/chip",
        "peak, GB/chip",
        "of",
        "must read, GB",
        "reads, GB",
        "ratio",
        "writes anew, GB",
        "copied in each call, GB",
        "all-reduces",
        "sent, MB",
        "ms",
    )
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for size in sizes:
        for generation in generations:
            topology, _, mesh = DECODE_SLICES[size][GENERATIONS.index(generation)].partition(" ")
            planned = decode_plan(size, topology, mesh or "tensor=-1")
            axes = ",".join(f"{axis}={count}" for axis, count in planned["mesh"].items() if count > 1)
            names = ("parameter_bytes_per_chip", "cache_bytes_per_chip", "hbm_bytes_per_chip", "hbm_capacity_bytes")
            sizes_read = ("floor_bytes", "read_bytes", "read_ratio", "copied_bytes", "call_copied_bytes")
            cells = [size, topology, axes, *(f"{planned[name] / 1e9:.1f}" for name in names)]
            if "read_bytes" in planned:
                cells += [f"{planned[n]:.3f}" if n == "read_ratio" else f"{planned[n] / 1e9:.2f}" for n in sizes_read]
                cells += [str(planned["collectives"].get("all-reduce", 0))]
                cells += [f"{sum(planned['collective_bytes'].values()) / 1e6:.1f}", f"{planned['milliseconds']:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(SLICES)} (default: all)")
    parser.add_argument("--generations", nargs="+", choices=GENERATIONS, default=GENERATIONS)
    parser.add_argument("--micro-batch", type=int, help="default: by an estimate")
    parser.add_argument("--decode", action="store_true", help="plans of generation, not of training")
    options = parser.parse_args()
    slices = DECODE_SLICES if options.decode else SLICES
    if unknown := [size for size in options.sizes if size not in slices]:
        parser.error(f"{unknown[0]}: the sizes are {', '.join(slices)}")
    if options.decode and options.micro_batch is not None:
        parser.error("--micro-batch is for training: leave it out with --decode")
    if options.decode:
        decode_table(options.sizes or list(DECODE_SLICES), list(options.generations))
        return
    columns = (
        "size",
        "slice",
        "chips",
        "mesh",
        "sequences at a time",
        "state, GB/chip",
        "peak, GB/chip",
        "of",
        "sent, GB/chip",
        "floor, GB/chip",
        "model PFLOP",
        "x hardware",
        "most sequences",
    )
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for size in options.sizes or SLICES:
        for generation in options.generations:
            topology, mesh = SLICES[size][GENERATIONS.index(generation)].split()
            planned = plan(size, topology, mesh, options.micro_batch)
            chips = 1
            for count in planned["mesh"].values():
                chips *= count
            state = (planned["parameter_bytes_per_chip"] + planned["optimizer_bytes_per_chip"]) / 1e9
            sent = (
                "" if planned["collective_bytes"] is None else f"{sum(planned['collective_bytes'].values()) / 1e9:,.0f}"
            )
            print(
                f"| {size} | {topology} | {chips} | {mesh} | {planned['micro_batch']} | {state:.1f} "
                f"| {planned['hbm_bytes_per_chip'] / 1e9:.1f}{'' if planned['fits'] else ' (does not fit)'} "
                f"| {planned['hbm_capacity_bytes'] / 1e9:.1f} | {sent} | {planned['floor_bytes'] / 1e9:,.0f} "
                f"| {planned['model_flops'] / 1e15:,.0f} | {planned['hardware_flops'] / planned['model_flops']:.2f} "
                f"| {planned['largest_micro_batch'] or 'none'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
