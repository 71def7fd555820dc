"""Greedy generation by a 125M-shaped OPT with random weights: ours beside PyTorch `transformers`, in alternation.

Run: `.venv/bin/python benchmarks/generate.py` (needs the `oracle` extra). The same weights in float32, the same
prompts, and, checked, the same tokens. tokens/s counts new tokens and the time of whole calls, prefill included. The
floor is the time to read the weights and the used half of the cache once per step, at the memory bandwidth measured in
the same run.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# benchmarks/convert.py is called like the package that reads checkpoints: keep it from being found first.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from opt_jax import OPTConfig, OPTForCausalLM, named_parameters  # noqa: E402


def bandwidth(repeats: int = 3) -> float:
    """Bytes per second that all cores together read from an array much larger than any cache, the best of a few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    array = np.ones(1 << 27, np.float32)
    parts = np.array_split(array, cores)
    times = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats + 1):  # the first touches the pages
            start = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            times.append(time.perf_counter() - start)
    return array.nbytes / min(times[1:])


def step_bytes(model: OPTForCausalLM, batch: int, length: float) -> float:
    """Bytes that one decode step must read: all weights but the tables of which it takes single rows, and the cache."""
    config = model.config
    skipped = {"model.decoder.embed_positions.embedding"}
    if not config.tie_word_embeddings:
        skipped.add("model.decoder.embed_tokens.embedding")
    params = named_parameters(model).items()
    weights = sum(param.get_value().nbytes for path, param in params if path not in skipped)
    return weights + 2 * config.num_hidden_layers * batch * length * config.hidden_size * model.dtype.itemsize


def timed(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    tokens = run()
    return time.perf_counter() - start, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="125m", help="a preset (default %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="new tokens (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    config = OPTConfig.preset(options.model)
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    hf: Any = transformers.OPTForCausalLM(transformers.OPTConfig(**config.to_hf())).eval()
    hf.set_attn_implementation("eager")
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        model = OPTForCausalLM.from_pretrained(folder)

    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    print(
        f"OPT-{options.model}, float32, prompt {options.prompt} + {options.new} new tokens, greedy; {os.cpu_count()} "
        f"cores, {versions}, Python {platform.python_version()}"
    )
    # No end token before the last step: both always do all the work.
    settings = dict(max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False)
    rows, speeds = [], [bandwidth()]
    for batch in options.batch_sizes:
        ids = np.random.default_rng(0).integers(4, config.vocab_size, (batch, options.prompt))
        mask = np.ones_like(ids)
        inputs = torch.from_numpy(ids), torch.from_numpy(mask)

        def theirs(inputs=inputs) -> np.ndarray:
            with torch.inference_mode():
                return hf.generate(inputs[0], attention_mask=inputs[1], **settings).numpy()

        def ours(ids=ids, mask=mask) -> np.ndarray:
            return model.generate(ids, mask, **settings).sequences

        contestants = {"opt-jax": ours, "transformers": theirs}
        first, tokens = zip(*(timed(run) for run in contestants.values()), strict=True)  # compiles, allocates
        same = np.mean(tokens[0][:, options.prompt :] == tokens[1][:, options.prompt :])
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.repeats):
            for name, run in contestants.items():
                times[name].append(timed(run)[0])
            speeds.append(bandwidth(1))
        print(
            f"batch {batch}: first call {first[0]:.1f} s (with compilation), {same:.0%} of the tokens as transformers'"
        )
        rows.append((batch, times))

    speed = max(speeds)
    print(f"memory bandwidth {speed / 1e9:.1f} GB/s (best; median {statistics.median(speeds) / 1e9:.1f})\n")
    print("| batch | | s (median) | spread | tokens/s | share of the floor | ratio |\n|---|---|---|---|---|---|---|")
    for batch, times in rows:
        floor = options.new * step_bytes(model, batch, options.prompt + options.new / 2) / speed
        reference = statistics.median(times["transformers"])
        for name, values in times.items():
            median = statistics.median(values)
            print(
                f"| {batch} | {name} | {median:.2f} | {min(values):.2f}-{max(values):.2f} "
                f"| {batch * options.new / median:.1f} | {floor / median:.0%} | {reference / median:.2f}x |"
            )


if __name__ == "__main__":
    main()
