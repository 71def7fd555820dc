"""What compression costs in accuracy, and what a layer of the 6.7B's shape takes.

Run: `.venv/bin/python -m benchmarks.compression` (`--only table`, `layers` or `products` for one of them). Table: the
embedded model, or `--model`, calibrated with 128 windows of `--calibration` (default: packages of Python's standard
library) and measured on 40 windows of `--data` (default: the sources of optax). KL: from the model's next-token
distributions, in nats per token. MB: all arrays on disk. s: of `compress`, compilation included. Layers: two layers of
the 6.7B's shape with random weights by GPTQ, in a process of its own, with the most memory that it had. Products:
those of a few rows with a matrix of random weights, each kind in a process of its own, in alternation, the best of all
rounds. A round goes through copies of the matrix, at most 10, so that large matrices are read from memory.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.contestants import Contestant, close, machine
from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.orbax import open_stored, write_arrays
from opt_jax.checkpoints.pretrained import expected_shapes
from opt_jax.compression import compress
from opt_jax.compression.grid import Grid, round_to_nearest
from opt_jax.data.files import stdlib_files
from opt_jax.evaluation.command import read_ids
from opt_jax.model import int8
from opt_jax.model.packed import PackedLinear
from opt_jax.model.quantization import Int8Linear

WINDOWS = 40  # that are measured
FROM_MEMORY = 300_000_000  # bytes of all copies of a matrix, more than caches hold
CALIBRATED = dict(samples=128, seed=0)
ROWS: dict[str, dict[str, Any]] = {
    "rtn, 8 bits": dict(method="rtn", bits=8),
    "smoothquant, W8A8": dict(method="smoothquant"),
    "rtn, 4 bits": dict(method="rtn", bits=4),
    "gptq, 4 bits": dict(method="gptq", bits=4),
    "rtn, 4 bits, groups of 64": dict(method="rtn", bits=4, group_size=64),
    "awq, 4 bits, groups of 64": dict(method="awq", bits=4, group_size=64),
    "gptq, 4 bits, groups of 64": dict(method="gptq", bits=4, group_size=64),
    "gptq, 4 bits, groups of 64, act-order": dict(method="gptq", bits=4, group_size=64, act_order=True),
    "rtn, 3 bits": dict(method="rtn", bits=3),
    "gptq, 3 bits": dict(method="gptq", bits=3),
    "gptq, 3 bits, true-sequential": dict(method="gptq", bits=3, true_sequential=True),
    "rtn, 3 bits, groups of 64": dict(method="rtn", bits=3, group_size=64),
    "awq, 3 bits, groups of 64": dict(method="awq", bits=3, group_size=64),
    "gptq, 3 bits, groups of 64": dict(method="gptq", bits=3, group_size=64),
    "gptq, 3 bits, groups of 64, act-order": dict(method="gptq", bits=3, group_size=64, act_order=True),
    "magnitude, 50 %": dict(method="magnitude", sparsity=0.5),
    "wanda, 50 %": dict(method="wanda", sparsity=0.5),
    "sparsegpt, 50 %": dict(method="sparsegpt", sparsity=0.5),
    "magnitude, 2:4": dict(method="magnitude", sparsity="2:4"),
    "wanda, 2:4": dict(method="wanda", sparsity="2:4"),
    "sparsegpt, 2:4": dict(method="sparsegpt", sparsity="2:4"),
    "sparsegpt, 50 %, and 4 bits": dict(method="sparsegpt", sparsity=0.5, bits=4),
}


@jax.jit
def logprobs(model: OPTForCausalLM, ids: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model.forward(ids).logits[:, :-1], axis=-1)


@jax.jit
def sums(out: jax.Array, expected: jax.Array, ids: jax.Array) -> jax.Array:
    """(KL of `expected`, negative log-likelihood), summed over the tokens of windows that have one before them."""
    nll = -jnp.take_along_axis(out, ids[:, 1:, None], axis=-1)
    return jnp.stack([(jnp.exp(expected) * (expected - out)).sum(), nll.sum()])


def measure(model: OPTForCausalLM, expected: list[jax.Array], batches: list[np.ndarray]) -> tuple[float, float]:
    """(KL, perplexity). `expected`: the log-probabilities of the model that was compressed."""
    pairs = zip(expected, batches, strict=True)
    totals = np.stack([sums(logprobs(model, ids), row, ids) for row, ids in pairs]).sum(axis=0, dtype=np.float64)
    kl, nll = totals / sum(ids[:, 1:].size for ids in batches)
    return float(kl), float(np.exp(nll))


def table(name: str, calibration: list[str], data: list[str], only: str) -> None:
    tokenizer, model = OPTTokenizer.from_pretrained(name), OPTForCausalLM.from_pretrained(name)
    length = min(2048, model.config.max_position_embeddings)
    ids, _ = read_ids(data, tokenizer)
    count = min(WINDOWS, len(ids) // length) // 4 * 4
    batches = np.split(ids[: count * length].reshape(count, length), count // 4)
    expected = [logprobs(model, batch) for batch in batches]
    measured, calibrating = (", ".join(Path(source).name for source in sources) for sources in (data, calibration))
    print(f"{name}: {count} windows of {length} tokens of {measured}, calibrated with {calibrating}\n")
    print("| | perplexity | KL, nats/token | MB | s |\n|---|---|---|---|---|")
    _, perplexity = measure(model, expected, batches)
    arrays = jax.tree.leaves(OPTForCausalLM.from_pretrained(name, dtype="auto"))
    stored, dtype = sum(array.nbytes for array in arrays) / 1e6, arrays[0].dtype
    print(f"| {dtype} | {perplexity:.3f} | | {stored:.2f} | |", flush=True)
    for row, options in ROWS.items():
        if only not in row:
            continue
        samples: dict[str, Any] = dict(calibration=calibration, **CALIBRATED)
        if options["method"] in ("rtn", "magnitude"):
            samples = {}
        with tempfile.TemporaryDirectory() as place:
            begin = time.perf_counter()
            compress(name, Path(place) / "model", **options, **samples)
            seconds = time.perf_counter() - begin
            nbytes = sum(array.nbytes for array in open_stored(Path(place) / "model" / "params").values())
            kl, perplexity = measure(OPTForCausalLM.from_pretrained(Path(place) / "model"), expected, batches)
        print(f"| {row} | {perplexity:.3f} | {kl:.2e} | {nbytes / 1e6:.2f} | {seconds:.1f} |", flush=True)


def write_random(directory: Path, config: OPTConfig) -> None:
    """A model directory in float16 with weights of normal(0, 0.02), made while they are written."""

    def random(path: str, shape: tuple[int, ...]) -> LazyArray:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            draw = np.random.default_rng([len(path), *(s.start for s in index)])
            values = draw.standard_normal([s.stop - s.start for s in index], np.float32) * 0.02
            return (values + path.endswith("scale")).astype(np.float16)

        return LazyArray(shape, np.dtype(np.float16), read)

    shapes = expected_shapes(OPTForCausalLM, config)
    write_arrays(directory / "params", {path: random(path, shape) for path, shape in shapes})
    (directory / "config.json").write_text(json.dumps(config.to_hf() | {"dtype": "float16"}))


def layers(samples: int) -> None:
    """Runs in a process of its own."""
    config = OPTConfig.preset("6.7b", num_hidden_layers=2, vocab_size=1000)
    ids = np.random.default_rng(0).integers(4, 1000, (samples, 2048))
    with tempfile.TemporaryDirectory() as place:
        write_random(Path(place), config)
        times = [time.perf_counter()]
        progress = lambda *_: times.append(time.perf_counter())  # noqa: E731
        compress(place, Path(place) / "out", "gptq", bits=4, group_size=128, calibration=ids, progress=progress)
    each = " and ".join(f"{b - a:.0f} s" for a, b in zip(times, times[1:], strict=False))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    most = f"{usage.ru_maxrss * 1024 / 1e9:.1f} GB, and {usage.ru_utime:.0f} s of all cores"
    what = f"GPTQ, 4 bits in groups of 128, {samples} windows of 2048 tokens"
    print(f"two layers of the 6.7B's shape, {what}: {each}; {most}")


class Product:
    """Best seconds of a product of `rows` rows with a matrix [inputs, outputs] of random weights, and its bytes.

    Args:
      kind: "float32", "int8" (`quantize`), or the number of bits that are packed, in groups of 128.
    """

    def __init__(self, kind: str, inputs: int, outputs: int):
        def make(seed: int) -> Any:
            linear = nnx.Linear(inputs, outputs, rngs=nnx.Rngs(seed))
            if kind == "float32":
                return linear
            if kind == "int8":
                return Int8Linear(int8.quantize(linear.kernel.get_value().T), linear.bias, jnp.float32)
            matrix = round_to_nearest(linear.kernel.get_value().T, Grid(int(kind), 128))
            return PackedLinear.from_matrix(matrix, linear.bias)

        first = make(0)
        self.nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
        copies = min(10, -(-FROM_MEMORY // self.nbytes))
        self.layers, self.inputs = [first, *map(make, range(1, copies))], inputs
        self.run = jax.jit(lambda layers, x: [layer(x) for layer in layers])

    def __call__(self, rows: int) -> tuple[float, int]:
        x, times = jnp.ones((rows, 1, self.inputs)), []
        for _ in range(4):  # the first call compiles
            begin = time.perf_counter()
            jax.block_until_ready(self.run(self.layers, x))
            times.append((time.perf_counter() - begin) / len(self.layers))
        return min(times), self.nbytes


def products(inputs: int, outputs: int, rows: list[int]) -> None:
    kinds = ("float32", "int8", "8", "4", "3")
    runs = {kind: Contestant(Product, kind, inputs, outputs) for kind in kinds}
    print(f"\na product with a matrix {inputs} x {outputs}, in groups of 128; milliseconds\n")
    print("| | MB read |" + "".join(f" {n} row{'s' * (n > 1)} |" for n in rows) + "\n|---|---|" + "---|" * len(rows))
    best: dict[tuple[str, int], float] = {}
    sizes: dict[str, int] = {}
    for _ in range(8):
        for n in rows:
            for kind, run in runs.items():
                seconds, sizes[kind] = run(n)[1]
                best[kind, n] = min(seconds, best.get((kind, n), seconds))
    close(runs)
    for kind in kinds:
        name = kind if kind in ("float32", "int8") else f"{kind} bits packed"
        print(
            f"| {name} | {sizes[kind] / 1e6:.1f} |" + "".join(f" {best[kind, n] * 1e3:.2f} |" for n in rows), flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    packages = sorted(
        {str(path.parent) for path in stdlib_files() if path.parent.name in ("asyncio", "http", "logging")}
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--calibration", nargs="+", default=packages)
    parser.add_argument("--data", nargs="+", default=[str(Path(optax.__file__).parent)])
    parser.add_argument("--rows", default="", help="only rows of the table with this in their name")
    parser.add_argument("--samples", type=int, default=4, help="windows for the layers of the 6.7B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4], help="rows of a product")
    parser.add_argument("--only", choices=["table", "layers", "products"])
    args = parser.parse_args()
    print(f"{machine()}, jax {jax.__version__}, optax {optax.__version__}")
    if args.only in (None, "table"):
        table(args.model, args.calibration, args.data, args.rows)
    if args.only in (None, "layers"):
        process = multiprocessing.get_context("spawn").Process(target=layers, args=(args.samples,))
        process.start()
        process.join()
    if args.only in (None, "products"):
        products(4096, 16384, args.tokens)  # fc1 of the 6.7B, and of the 125M
        products(768, 3072, args.tokens)


if __name__ == "__main__":
    main()
