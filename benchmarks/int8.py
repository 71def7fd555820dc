"""int8 weights and int8 cache against float32: what they cost in accuracy, and what they bring in speed.

Run: `.venv/bin/python -m benchmarks.int8 PATH/TO/wikitext-2/test.txt` (needs the `int8` extra; `--only accuracy` or
`--only speed` for one of the two). Accuracy: the embedded model, windows of the text with BOS in front, the cache
filled by one call that attends to it, as decode steps do (`generate` reads prompts without rounding). KL is that of
next-token distributions from float32's, in nats per token. Speed: OPT-125M-shaped, random weights, greedy; whole calls,
prefill included, each row in a process of its own, in alternation. "In C": after `python -m opt_jax.model.native_int8`.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.contestants import Contestant, alternate, close, machine, spread
from opt_jax import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, quantize, use_native_int8
from opt_jax.model.native_int8 import library_path


@jax.jit
def logprobs(model: OPTForCausalLM, ids, cache):
    return jax.nn.log_softmax(model.forward(ids, cache=cache).logits, axis=-1)


def accuracy(path: Path, length: int, windows: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False))
    ids = ids[: min(windows, len(ids) // (length - 1)) * (length - 1)].reshape(-1, length - 1)
    ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=tokenizer.bos_token_id).astype(np.int32)

    exact = AutoModelForCausalLM.from_pretrained("tiny", dtype="float32")
    half = AutoModelForCausalLM.from_pretrained("tiny", dtype="bfloat16")
    small = quantize(exact)
    rows: dict[str, tuple[Any, str]] = {
        "float32": (exact, "float32"),
        "bfloat16": (half, "bfloat16"),
        "int8 weights": (small, "float32"),
        "int8 cache": (exact, "int8"),
        "int8 weights and cache": (small, "int8"),
    }
    sums = dict.fromkeys(rows, np.zeros(3))
    for window in np.array_split(ids, -(-len(ids) // 4)):
        reference = None
        for name, (model, dtype) in rows.items():
            cache = dataclasses.replace(
                model.init_cache(len(window), length, dtype), fresh=False
            )  # attend to the cache
            out = np.asarray(logprobs(model, window, cache), np.float64)[:, :-1]
            reference = out if reference is None else reference
            kl = (np.exp(reference) * (reference - out)).sum(-1)
            nll = -np.take_along_axis(out, window[:, 1:, None], axis=-1)
            sums[name] = sums[name] + [kl.sum(), nll.sum(), (out.argmax(-1) == reference.argmax(-1)).sum()]
    count = ids[:, 1:].size
    print(f"\nKL(float32 || row) on {count} tokens of {path.name}, windows of {length}\n")
    print("| | KL, nats/token | perplexity | same most likely token | weights, MB | cache, KB/token |")
    print("|---|---|---|---|---|---|")
    for name, (model, dtype) in rows.items():
        kl, nll, same = sums[name] / count
        cache = jax.eval_shape(lambda model=model, dtype=dtype: model.init_cache(1, 1024, dtype))
        print(
            f"| {name} | {kl:.2e} | {np.exp(nll):.3f} | {same:.2%} | {nbytes(model) / 1e6:.2f} "
            f"| {nbytes((cache.k, cache.v)) / 1024 / 1e3:.2f} |"
        )


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def generator(preset: str, weights: str, cache_dtype: str | None, new: int) -> Callable[[np.ndarray], None]:
    model: Any = OPTForCausalLM(OPTConfig.preset(preset), rngs=nnx.Rngs(0))
    model = model if weights == "float32" else quantize(model)
    model = use_native_int8(model) if weights == "int8 in C" else model

    def run(ids: np.ndarray) -> None:
        model.generate(ids, np.ones_like(ids), max_new_tokens=new, eos_token_id=[], cache_dtype=cache_dtype)

    return run


def speed(preset: str, batch_sizes: list[int], prompt: int, new: int, repeats: int) -> None:
    print(f"\nOPT-{preset}-shaped, float32 or int8, prompt {prompt} + {new} new tokens, greedy\n")
    print("| batch | | s (median) | spread | tokens/s | ratio | first call, s |\n|---|---|---|---|---|---|---|")
    rows = {
        "float32": ("float32", None),
        "int8 weights": ("int8", None),
        "int8 cache": ("float32", "int8"),
        "int8 weights and cache": ("int8", "int8"),
    }
    if library_path().is_file():
        rows |= {"int8 weights, in C": ("int8 in C", None), "int8 weights, in C, and cache": ("int8 in C", "int8")}
    runs = {name: Contestant(generator, preset, *row, new) for name, row in rows.items()}
    for batch in batch_sizes:
        ids = np.random.default_rng(0).integers(4, OPTConfig.preset(preset).vocab_size, (batch, prompt))
        first = {name: run(ids)[0] for name, run in runs.items()}
        times = alternate(runs, repeats, ids)
        reference = statistics.median(times["float32"])
        for name, values in times.items():
            median = statistics.median(values)
            print(
                f"| {batch} | {name} | {spread(values)} | {batch * new / median:.1f} "
                f"| {reference / median:.2f}x | {first[name]:.1f} |",
                flush=True,
            )
    close(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", help="WikiText-2's test split as plain text, for the accuracy")
    parser.add_argument("--only", choices=["accuracy", "speed"])
    parser.add_argument(
        "--window", type=int, default=512, help="tokens of a window, BOS included (default %(default)s)"
    )
    parser.add_argument("--windows", type=int, default=128, help="how many, at most (default %(default)s)")
    parser.add_argument("--model", default="125m", help="a preset, for the speed (default %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="new tokens (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    options: Any = parser.parse_args()
    if options.text is None and options.only != "speed":
        parser.error("the accuracy needs a text: pass the path of WikiText-2's test split, or --only speed")

    print(f"{jax.default_backend()}; {machine('jax', 'flax', 'qwix')}")
    if options.only != "speed" and options.text is not None:
        accuracy(options.text, options.window, options.windows)
    if options.only != "accuracy":
        speed(options.model, options.batch_sizes, options.prompt, options.new, options.repeats)


if __name__ == "__main__":
    main()
