"""Decoding steps of a model that skips zeros in fc2 (`use_relu_sparsity`) beside those of the same model without it.

Run: `.venv/bin/python -m benchmarks.relu_sparsity` (`--dtype bfloat16`, `--model 125m --layers 12`). A stack of layers
of OPT-6.7B's shape with random weights, and a vocabulary of 512 tokens. The biases of fc1 make that share of its
neurons live which the table says. `live` is what a layer finds live for one token at least of a step, as measured: of 8
rows with random weights it is the most that it can be, because their neurons are independent. Each of the two in a
process of its own, in alternation. A step is the time of a call for many tokens less that of a call for few, by their
difference. The ceiling is by bytes: a step that reads only the live rows of fc2, and all other weights.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.stats import norm

from benchmarks.contestants import Contestant, alternate, close, machine
from opt_jax import OPTConfig, OPTForCausalLM, use_relu_sparsity

PROMPT, FEW = 16, 9


def stepper(config: OPTConfig, dtype: str, capacity: float | None) -> Callable[[int, float, int], float]:
    """A function (batch size, share of live neurons, new tokens) -> the share of neurons that a step finds live."""
    plain: Any = OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    model = plain if capacity is None else use_relu_sparsity(plain, capacity)
    deviation = config.init_std * config.hidden_size**0.5  # of a neuron: its inputs come from a LayerNorm

    def run(batch: int, density: float, new: int) -> float:
        for layer in model.model.decoder.layers:
            layer.fc1.bias.set_value(jnp.full(config.ffn_dim, -deviation * norm.ppf(1 - density), dtype))
        ids = np.random.default_rng(0).integers(4, config.vocab_size, (batch, PROMPT))
        if new:
            model.generate(ids, np.ones_like(ids), max_new_tokens=new, eos_token_id=[])
            return 0.0
        _, acts = plain.run_with_cache(ids, names="blocks.*.mlp.hook_post")
        return float(np.mean([(np.asarray(x[:, -1], np.float32) > 0).any(axis=0).mean() for x in acts.values()]))

    return run


def measure(options: Any) -> None:
    config = OPTConfig.preset(options.model)
    layers = options.layers or config.num_hidden_layers
    config = dataclasses.replace(config, num_hidden_layers=layers, vocab_size=512)
    print(f"\n{layers} layers of OPT-{options.model}'s shape, {options.dtype}\n")
    print("| batch | live | dense step, ms | sparse step, ms | ratio | ceiling |\n|---|---|---|---|---|---|")
    runs = {
        "dense": Contestant(stepper, config, options.dtype, None),
        "sparse": Contestant(stepper, config, options.dtype, 1.0),
    }
    matrices = 4 * config.hidden_size + 2 * config.ffn_dim  # times hidden_size: the weights of a layer
    for batch in options.batch_sizes:
        for density in options.densities:
            live = runs["dense"](batch, density, 0)[1]
            alternate(runs, 1, batch, density, FEW)  # compiles
            few, many = (alternate(runs, options.repeats, batch, density, n) for n in (FEW, FEW + options.steps))
            steps = {k: [(b - a) / options.steps * 1e3 for a, b in zip(few[k], many[k], strict=True)] for k in runs}
            best = {k: (min(many[k]) - min(few[k])) / options.steps * 1e3 for k in runs}
            cells = [f"{best[k]:.1f} ({statistics.median(steps[k]):.1f})" for k in runs]
            ceiling = matrices / (matrices - (1 - live) * config.ffn_dim)
            print(
                f"| {batch} | {live:.1%} | {' | '.join(cells)} | {best['dense'] / best['sparse']:.2f}x "
                f"| {ceiling:.2f}x |",
                flush=True,
            )
    close(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="6.7b", help="a preset (default %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="0: those of the preset (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05], help="of one token")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{jax.default_backend()}; {machine('jax', 'flax')}; milliseconds: the best, and the median in parentheses")
    measure(options)


if __name__ == "__main__":
    main()
