"""One training step of a 125M-shaped OPT with random weights: ours beside PyTorch `transformers`, in alternation.

Run: `.venv/bin/python benchmarks/train_step.py` (needs the `oracle` extra). Both do the same work: forward, backward,
clipping to norm 1.0 and AdamW in float32, without dropout. The floor is 6 FLOPs per parameter and token at the rate
that a large float32 matrix product reaches on this machine in the same run.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from opt_jax import OPTConfig
from opt_jax.sharding import make_mesh, use_mesh
from opt_jax.training.optimizer import make_optimizer
from opt_jax.training.step import make_train_step, new_model, new_state, place_batch, state_shardings


def ours(config: OPTConfig, batch: np.ndarray) -> Callable[[], float]:
    mesh = make_mesh("data=1", jax.devices()[:1])
    optimizer = make_optimizer(lambda step: 1e-4)
    state = new_state(new_model(config, 0, jnp.float32), optimizer)
    shardings = state_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    step = make_train_step(optimizer, lambda step: jnp.float32(1e-4), config, 0, shardings, mesh)
    rows = lambda rows: {"input_ids": batch[rows, :-1], "labels": batch[rows, 1:]}  # noqa: E731
    placed = place_batch(rows, len(batch), 1, mesh)

    def run() -> float:
        nonlocal state
        with use_mesh(mesh):
            state, measured = step(state, placed)
        return float(measured["loss"])

    return run


def theirs(config: OPTConfig, batch: np.ndarray) -> Callable[[], float]:
    hf_config = transformers.OPTConfig(**config.to_hf())
    model = transformers.OPTForCausalLM(hf_config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    inputs, targets = torch.from_numpy(batch[:, :-1]).long(), torch.from_numpy(batch[:, 1:]).long()

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


def matmul_flops(size: int = 2048) -> float:
    """FLOP/s of a large float32 product, the best of five."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="125m", help="a preset (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    config = OPTConfig.preset(options.model, dropout=0.0)
    shape = (options.batch_size, options.seq_len + 1)
    batch = np.random.default_rng(0).integers(4, config.vocab_size, shape).astype(np.int32)
    contestants = {"opt-jax": ours(config, batch), "transformers": theirs(config, batch)}
    for run in contestants.values():
        run()  # compilation, allocation
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)

    tokens = options.batch_size * options.seq_len
    parameters = sum(p.size for p in jax.tree.leaves(jax.eval_shape(lambda: new_model(config, 0, jnp.float32))))
    floor = 6 * parameters * tokens / matmul_flops()
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    print(
        f"OPT-{options.model}, {options.batch_size} x {options.seq_len} tokens, float32, {os.cpu_count()} cores, ",
        end="",
    )
    print(f"{versions}, Python {platform.python_version()}; floor (6N) {floor:.2f} s")
    print("| | s/step (median) | spread | tokens/s | share of the floor | ratio |\n|---|---|---|---|---|---|")
    reference = statistics.median(times["transformers"])
    for name, values in times.items():
        median = statistics.median(values)
        spread, speed = f"{min(values):.2f}-{max(values):.2f}", f"{tokens / median:,.0f}"
        print(f"| {name} | {median:.2f} | {spread} | {speed} | {floor / median:.0%} | {reference / median:.2f}x |")


if __name__ == "__main__":
    main()
