"""Generation with drafts beside plain generation, in alternation: greedy, float32, the same tokens (checked).

Run: `.venv/bin/python -m benchmarks.speculative`. Two models: 125M-shaped with random weights, the size that one would
speed up, and the embedded "tiny", which has learned its text (Python). Drafts come from prompt lookup, on a prompt that
is said twice, and from a model made of the first two layers of the same model. Random weights tell nothing of how often
drafts are accepted: the time of a step is what the first model is for. tokens/s counts new tokens and the time of whole
calls, prefill included; medians.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

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
    """The same embeddings and head with fewer layers between them; shares the arrays."""
    draft = nnx.clone(model)
    layers: Any = draft.model.decoder.layers
    draft.model.decoder.layers = nnx.List(list(layers)[:count])
    config = dataclasses.replace(model.config, num_hidden_layers=count)
    draft.config = draft.model.config = draft.model.decoder.config = config
    return draft


def measure(name: str, model: OPTForCausalLM, ids: np.ndarray, new: int, repeats: int, kinds: dict[str, Any]) -> None:
    settings: dict[str, Any] = dict(max_new_tokens=new, eos_token_id=[])
    kinds = {"none": {}} | kinds
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    outputs = {}
    for turn in range(repeats + 1):  # the first compiles
        for kind, options in kinds.items():
            start = time.perf_counter()
            outputs[kind] = model.generate(ids, **settings, **options)
            if turn:
                times[kind].append(time.perf_counter() - start)
    plain = statistics.median(times["none"])
    for kind, values in times.items():
        out, median = outputs[kind], statistics.median(values)
        same = np.mean(out.sequences == outputs["none"].sequences)
        rate = "" if out.acceptance_rate is None else f"{out.acceptance_rate:.0%}"
        print(
            f"| {name} | {len(ids)} | {kind} | {rate} | {len(ids) * new / median:.1f} "
            f"| {len(ids) * new / max(values):.1f}-{len(ids) * new / min(values):.1f} | {plain / median:.2f}x "
            f"| {same:.0%} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="125m", help="a preset (default %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--new", type=int, default=64, help="new tokens (default %(default)s)")
    parser.add_argument("--drafts", type=int, default=4, help="drafted tokens in a step (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {options.new} new tokens, {options.drafts} drafts\n"
    )
    print("| model | batch | drafts | accepted | tokens/s (median) | spread | ratio | same tokens |")
    print("|---|---|---|---|---|---|---|---|")
    tokenizer, tiny = AutoTokenizer.from_pretrained("tiny"), AutoModelForCausalLM.from_pretrained("tiny")
    random = OPTForCausalLM(OPTConfig.preset(options.model), rngs=nnx.Rngs(0))
    for name, model in (("tiny", tiny), (f"{options.model}, random", random)):
        for batch in options.batch_sizes:
            if model is tiny:
                row = tokenizer.encode(CODE)
            else:
                row = np.random.default_rng(0).integers(4, model.config.vocab_size, 48).tolist() * 2
            kinds = {
                "prompt lookup": dict(prompt_lookup_num_tokens=options.drafts),
                "2 layers": dict(assistant_model=first_layers(model, 2), num_assistant_tokens=options.drafts),
            }
            ids = np.array([row[i : len(row) - batch + 1 + i] for i in range(batch)])  # no two rows are equal
            measure(name, model, ids, options.new, options.repeats, kinds)


if __name__ == "__main__":
    main()
