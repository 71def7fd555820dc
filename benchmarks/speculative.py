"""Generation with drafts beside plain generation: greedy, float32, the same tokens (checked).

Run: `.venv/bin/python -m benchmarks.speculative`. Two models: 125M-shaped with random weights, the size that one would
speed up, and the embedded "tiny", which has learned its text (Python). Drafts come from prompt lookup, on a prompt that
is said twice, and from a model made of the first two layers of the same model. Random weights tell nothing of how often
drafts are accepted: the time of a step is what the first model is for. tokens/s counts new tokens and the time of whole
calls, prefill included; medians. Each row is a process of its own; they take turns.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from benchmarks.contestants import Contestant, alternate, close, machine, spread
from opt_jax import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

CODE = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()


class Queue:
    def __init__(self):
"""


def first_layers(model: OPTForCausalLM, count: int) -> OPTForCausalLM:
    """The model without its later layers. It shares the arrays."""
    draft = nnx.clone(model)
    layers: Any = draft.model.decoder.layers
    draft.model.decoder.layers = nnx.List(list(layers)[:count])
    config = dataclasses.replace(model.config, num_hidden_layers=count)
    draft.config = draft.model.config = draft.model.decoder.config = config
    return draft


def generator(preset: str, kind: str, drafts: int, new: int) -> Callable[[np.ndarray], tuple[np.ndarray, float | None]]:
    if preset == "tiny":
        model = AutoModelForCausalLM.from_pretrained("tiny")
    else:
        model = OPTForCausalLM(OPTConfig.preset(preset), rngs=nnx.Rngs(0))
    options: dict[str, Any] = {}
    if kind == "prompt lookup":
        options = dict(prompt_lookup_num_tokens=drafts)
    elif kind == "2 layers":
        options = dict(assistant_model=first_layers(model, 2), num_assistant_tokens=drafts)

    def run(ids: np.ndarray) -> tuple[np.ndarray, float | None]:
        out = model.generate(ids, max_new_tokens=new, eos_token_id=[], **options)
        return np.asarray(out.sequences), out.acceptance_rate

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="125m", help="a preset (default %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--new", type=int, default=64, help="new tokens (default %(default)s)")
    parser.add_argument("--drafts", type=int, default=4, help="drafted tokens in a step (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    print(f"{machine('jax')}; {options.new} new tokens, {options.drafts} drafts\n")
    print("| model | batch | drafts | accepted | s (median) | spread | tokens/s | ratio | same tokens |")
    print("|---|---|---|---|---|---|---|---|---|")
    for preset in ("tiny", options.model):
        kinds = ("none", "prompt lookup", "2 layers")
        runs = {kind: Contestant(generator, preset, kind, options.drafts, options.new) for kind in kinds}
        for batch in options.batch_sizes:
            if preset == "tiny":
                row = AutoTokenizer.from_pretrained("tiny").encode(CODE)
            else:
                row = np.random.default_rng(0).integers(4, OPTConfig.preset(preset).vocab_size, 48).tolist() * 2
            ids = np.array([row[i : len(row) - batch + 1 + i] for i in range(batch)])  # no two rows are equal
            outputs = {kind: run(ids)[1] for kind, run in runs.items()}  # compiles
            times = alternate(runs, options.repeats, ids)
            plain = statistics.median(times["none"])
            for kind, (sequences, acceptance) in outputs.items():
                median = statistics.median(times[kind])
                accepted = "" if acceptance is None else f"{acceptance:.0%}"
                print(
                    f"| {preset if preset == 'tiny' else f'{preset}, random'} | {batch} | {kind} | {accepted} "
                    f"| {spread(times[kind])} | {batch * options.new / median:.1f} | {plain / median:.2f}x "
                    f"| {np.mean(sequences == outputs['none'][0]):.0%} |",
                    flush=True,
                )
        close(runs)


if __name__ == "__main__":
    main()
