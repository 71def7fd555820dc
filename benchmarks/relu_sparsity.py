"""Decoding steps of a model that skips zeros in fc2 (`use_relu_sparsity`) beside those of the same model without it.

Run: `.venv/bin/python -m benchmarks.relu_sparsity` (`--dtype bfloat16`, `--model 125m --layers 0`, `--densities ...`).
Layers of the shape of OPT-6.7B, with random weights and a vocabulary of 512 tokens. The biases of fc1 are such that a
token makes the given share of its neurons live. `live` is the share that is live for at least one row of the batch,
measured. It grows with the batch as it does for independent neurons; those of a trained model have more in common. The
ceiling is by bytes: all other matrices, and the live rows of fc2.

Each of the two in a process of its own, in alternation. Times are those of the compiled loop of `generate`, for a few
steps less for one, because in bfloat16 each run of the loop begins with a cast of all weights. The best of all repeats,
because other work makes a step longer and never shorter.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.stats import norm

from benchmarks.contestants import Contestant, close, machine
from opt_jax import OPTConfig, OPTForCausalLM, use_relu_sparsity
from opt_jax.generation.engines import PlainEngine
from opt_jax.generation.loop import FlatModel
from opt_jax.generation.request import check_request

PROMPT, NEW = 16, 128


class Steps:
    """Seconds of `steps` decoding steps for (batch size, share of live neurons of a token, steps).

    Tokens are sampled, because rows with the same tokens would have the same live neurons. For 0 steps it returns the
    share of neurons that are live for at least one of the rows, by the last tokens of the prompts.
    """

    def __init__(self, config: OPTConfig, dtype: str, capacity: float | None):
        plain: Any = OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        self.plain, self.capacity, self.case, self.left = plain, capacity, None, 0
        self.deviation = config.init_std * config.hidden_size**0.5  # of a neuron: LayerNorm gives its inputs

    def __call__(self, batch: int, density: float, steps: int) -> float:
        if self.case != (batch, density) or self.left < steps:
            self.begin(batch, density)
        if not steps:
            _, acts = self.plain.run_with_cache(self.ids, names="blocks.*.mlp.hook_post")
            return float(np.mean([(x[:, -1] > 0).any(axis=0).mean() for x in acts.values()]))
        self.left -= steps
        start = time.perf_counter()
        self.slots, _ = jax.block_until_ready(self.engine.advance(self.slots, steps, batch))
        return time.perf_counter() - start

    def begin(self, batch: int, density: float) -> None:
        config, self.case, self.left = self.plain.config, (batch, density), NEW - 1
        for layer in self.plain.model.decoder.layers:
            bias = jnp.full(config.ffn_dim, -self.deviation * norm.ppf(1 - density), self.plain.dtype)
            layer.fc1.bias.set_value(bias)
        model = self.plain if self.capacity is None else use_relu_sparsity(self.plain, self.capacity)
        self.ids = np.random.default_rng(0).integers(4, config.vocab_size, (batch, PROMPT))
        options = dict(max_new_tokens=NEW, eos_token_id=[], do_sample=True, seed=0)
        request = check_request(model, self.ids, options=options)
        self.engine = PlainEngine(FlatModel.of(model), request)
        self.slots, _ = self.engine.begin(np.arange(batch))


def measure(options: Any) -> None:
    config = OPTConfig.preset(options.model)
    layers = options.layers or config.num_hidden_layers
    config = dataclasses.replace(config, num_hidden_layers=layers, vocab_size=512)
    print(f"\n{layers} layers of the shape of OPT-{options.model}, {options.dtype}\n")
    print("| batch | live | dense step, ms | sparse step, ms | ratio | ceiling |\n|---|---|---|---|---|---|")
    runs = {
        "dense": Contestant(Steps, config, options.dtype, None),
        "sparse": Contestant(Steps, config, options.dtype, 1.0),
    }
    for batch in options.batch_sizes:
        for density in options.densities:
            best: dict[tuple[str, int], float] = {}
            for _ in range(options.repeats + 1):  # the first one compiles
                for steps in (1, 1 + options.steps):
                    for name, run in runs.items():
                        seconds = run(batch, density, steps)[1]
                        best[name, steps] = min(seconds, best.get((name, steps), seconds))
            step = {n: (best[n, 1 + options.steps] - best[n, 1]) / options.steps * 1e3 for n in runs}
            share = runs["dense"](batch, density, 0)[1]
            matrices = 4 * config.hidden_size + 2 * config.ffn_dim  # of a layer, in rows of `hidden_size`
            ceiling = matrices / (matrices - (1 - share) * config.ffn_dim)
            print(
                f"| {batch} | {share:.0%} | {step['dense']:.1f} | {step['sparse']:.1f} "
                f"| {step['dense'] / step['sparse']:.2f}x | {ceiling:.2f}x |",
                flush=True,
            )
    close(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="6.7b", help="a preset (default %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="0: those of the preset (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05], help="shares of neurons live for a token")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    print(f"{jax.default_backend()}; {machine('jax', 'flax')}")
    measure(options)


if __name__ == "__main__":
    main()
