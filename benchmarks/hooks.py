"""Activations of a 125M-shaped OPT with random weights: ours beside PyTorch `transformers` with forward hooks.

Run: `.venv/bin/python -m benchmarks.hooks` (needs the `oracle` extra). The same shapes in float32, each contestant in a
process of its own, in alternation. The first table: a forward pass, and one that keeps the residual stream after each
layer. The second: a causal trace, 12 layers x 32 positions of patched residuals, as one program under `jax.vmap`, and
as a loop over cells that calls one compiled program.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contestants import Contestant, alternate, close, machine, spread

NAMES = "blocks.*.hook_resid_post"


def ours(shape: tuple[int, int], keep: bool) -> Callable[[], None]:
    import jax
    from flax import nnx

    from opt_jax import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig.preset("125m"), rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(3, 50_000, shape)

    def run() -> None:
        jax.block_until_ready(model.run_with_cache(ids, names=NAMES) if keep else model(ids))

    run()
    return run


def torch(shape: tuple[int, int], keep: bool) -> Callable[[], None]:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    model: Any = OPTForCausalLM(OPTConfig()).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 50_000, shape))
    kept: dict[Any, Any] = {}
    for i, layer in enumerate(model.model.decoder.layers) if keep else ():
        layer.register_forward_hook(lambda _module, _inputs, out, i=i: kept.update({i: out[0]}))

    @torch.inference_mode()
    def run() -> None:
        model(ids, use_cache=False)

    run()
    return run


def trace(length: int, vmapped: bool) -> Callable[[], None]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from opt_jax import OPTConfig, OPTForCausalLM, Replace

    model = OPTForCausalLM(OPTConfig.preset("125m"), rngs=nnx.Rngs(0))
    clean, corrupted = np.random.default_rng(0).integers(3, 50_000, (2, 1, length))
    kept = model.run_with_cache(clean, names=NAMES)[1]
    states = jnp.stack(list(kept.values()))

    def cell(model: Any, states: jax.Array, layer: jax.Array, position: jax.Array) -> jax.Array:
        patch = Replace(states[layer], layers=layer, positions=position)
        out = model.forward(corrupted, hooks={NAMES: patch}, logits_to_keep=1)
        return out.logits[0, -1, 5]

    over_positions = jax.vmap(cell, (None, None, None, 0))
    grid = jax.jit(jax.vmap(over_positions, (None, None, 0, None)))
    one = jax.jit(cell)
    layers, positions = jnp.arange(len(states)), jnp.arange(length)

    def run() -> None:
        if vmapped:
            grid(model, states, layers, positions).block_until_ready()
        else:
            jax.block_until_ready([one(model, states, layer, p) for layer in layers for p in positions])

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    shape = (args.batch_size, args.length)
    print(machine("jax", "torch", "transformers"))
    contestants = {
        "opt-jax": Contestant(ours, shape, False),
        "opt-jax, residuals kept": Contestant(ours, shape, True),
        "transformers": Contestant(torch, shape, False),
        "transformers, residuals kept by hooks": Contestant(torch, shape, True),
    }
    table(
        f"forward pass, batch {shape[0]}, {shape[1]} tokens", alternate(contestants, args.repeats, untimed_first=True)
    )
    close(contestants)
    contestants = {
        "one program (vmap over layers and positions)": Contestant(trace, 32, True),
        "a loop over the cells": Contestant(trace, 32, False),
    }
    table("causal trace, 12 layers x 32 positions", alternate(contestants, 3))
    close(contestants)


def table(title: str, times: dict[str, list[float]]) -> None:
    print(f"\n| {title} | seconds, median | range |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {spread(seconds)} |")


if __name__ == "__main__":
    main()
