"""Greedy generation by a 125M-shaped OPT with random weights: ours beside PyTorch `transformers` and CTranslate2.

Run: `.venv/bin/python benchmarks/generate.py` (needs the `oracle` extra; `bench` for CTranslate2, which is left out
otherwise). The same weights in float32 (int8: quantized by CTranslate2 as it does), the same prompts, in alternation.
tokens/s counts new tokens and the time of whole calls. A call that makes one token gives the time of the prompt; what a
longer call takes beyond that, for each further token, is a step. The floor of a step is the time to read all weights
and the used part of the cache once, at the memory bandwidth measured in the same run.

`--first-token` measures something else: a fresh process, from its start to the first token of a checkpoint on disk,
with imports, loading and compilation; once without and once with what an earlier process has compiled.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
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

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Generate = Callable[[np.ndarray, int], np.ndarray]  # (prompts [B, T], number of new tokens) -> new tokens

FRESH_PROCESS = """
import sys
directory, cache = sys.argv[1:]
import jax
if cache:
    jax.config.update("jax_compilation_cache_dir", cache)
from opt_jax import OPTForCausalLM
model = OPTForCausalLM.from_pretrained(directory)
model.generate([[2] + list(range(100, 227))], max_new_tokens={new})
"""


def bandwidth(repeats: int = 3) -> float:
    """Bytes per second that all cores together read from an array much larger than any cache, the best of a few."""
    array = np.ones(1 << 27, np.float32)
    parts = np.array_split(array, CORES)
    times = []
    with ThreadPoolExecutor(CORES) as pool:
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


def contestants(name: str) -> tuple[OPTForCausalLM, dict[str, Generate]]:
    config = OPTConfig.preset(name)
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    hf: Any = transformers.OPTForCausalLM(transformers.OPTConfig(**config.to_hf())).eval()
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        model = OPTForCausalLM.from_pretrained(folder)
        others = ctranslate2_models(folder, config.vocab_size)
    hf.set_attn_implementation("eager")

    # No end token before the last step: all always do all the work.
    def ours(ids: np.ndarray, new: int) -> np.ndarray:
        return model.generate(ids, np.ones_like(ids), max_new_tokens=new, min_new_tokens=new).sequences[:, -new:]

    def theirs(ids: np.ndarray, new: int) -> np.ndarray:
        settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
        with torch.inference_mode():
            out = hf.generate(torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long), **settings)
        return out.numpy()[:, -new:]

    return model, {"opt-jax": ours, "transformers": theirs, **others}


def ctranslate2_models(folder: str, vocab_size: int) -> dict[str, Generate]:
    if importlib.util.find_spec("ctranslate2") is None:
        print("CTranslate2 is not installed (the `bench` extra): its rows are left out")
        return {}
    import ctranslate2  # pyright: ignore[reportMissingImports]
    from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"token{i}" for i in range(4, vocab_size))]  # it wants texts
    given: dict[str, Any] = dict(bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    given |= dict(vocab={name: i for i, name in enumerate(names)}, merges=[])
    transformers.GPT2Tokenizer(**given).save_pretrained(folder)
    TransformersConverter(folder).convert(f"{folder}/ctranslate2")

    def generate(generator: Any, ids: np.ndarray, new: int) -> np.ndarray:
        prompts = [[names[i] for i in row] for row in ids]
        results = generator.generate_batch(
            prompts, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False
        )
        return np.array([result.sequences_ids[0] for result in results])

    def load(kind: str) -> Generate:
        generator = ctranslate2.Generator(f"{folder}/ctranslate2", compute_type=kind, intra_threads=CORES)
        return lambda ids, new: generate(generator, ids, new)

    return {f"CTranslate2 {kind}": load(kind) for kind in ("float32", "int8")}


def timed(run: Generate, ids: np.ndarray, new: int) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    tokens = run(ids, new)
    return time.perf_counter() - start, tokens


def compare(options: argparse.Namespace) -> None:
    model, runs = contestants(options.model)
    results, speeds = [], [bandwidth()]
    for batch in options.batch_sizes:
        ids = np.random.default_rng(0).integers(4, model.config.vocab_size, (batch, options.prompt))
        first = {name: timed(run, ids, options.new) for name, run in runs.items()}  # compiles, allocates
        for run in runs.values():
            run(ids, 1)  # fewer columns for new tokens: another compilation
        same = [
            f"{name} {np.mean(tokens == first['opt-jax'][1]):.0%}"
            for name, (_, tokens) in first.items() if name != "opt-jax"
        ]  # fmt: skip
        print(f"batch {batch}: our first call {first['opt-jax'][0]:.1f} s; tokens equal to ours: {', '.join(same)}")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                times[name].append((timed(run, ids, 1)[0], timed(run, ids, options.new)[0]))
            speeds.append(bandwidth(1))
        results.append((batch, times))

    speed = max(speeds)
    print(f"memory bandwidth {speed / 1e9:.1f} GB/s (best; median {statistics.median(speeds) / 1e9:.1f})\n")
    print("| batch | | s (median) | spread | tokens/s | ratio | prompt, ms | step, ms | floor of a step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for batch, times in results:
        floor = step_bytes(model, batch, options.prompt + options.new / 2) / speed
        reference = statistics.median(whole for _, whole in times["transformers"])
        for name, values in times.items():
            prompt, median = (statistics.median(column) for column in zip(*values, strict=True))
            step = (median - prompt) / (options.new - 1)
            whole = [seconds for _, seconds in values]
            speed_up, rate = reference / median, batch * options.new / median
            # int8 has other bytes to read: no share
            share = "" if "int8" in name else f"{floor / step:.0%} of {floor * 1e3:.1f} ms"
            print(
                f"| {batch} | {name} | {median:.2f} | {min(whole):.2f}-{max(whole):.2f} | {rate:.1f} "
                f"| {speed_up:.2f}x | {prompt * 1e3:.0f} | {step * 1e3:.1f} | {share} |"
            )


def first_token(options: argparse.Namespace) -> None:
    from flax import nnx

    def run(*arguments: Any, new: int = 1) -> float:
        start = time.perf_counter()
        code = FRESH_PROCESS.replace("{new}", str(new))
        subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
        return time.perf_counter() - start

    print(
        f"| seconds from the start of a process, median of {options.repeats} | first token | 20 tokens |\n|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        OPTForCausalLM(OPTConfig.preset(options.model), rngs=nnx.Rngs(0)).save_pretrained(f"{folder}/model")
        for name, cache in (("nothing compiled before", ""), ("persistent compilation cache", f"{folder}/cache")):
            cells = []
            for new in (1, 20):
                run(f"{folder}/model", cache, new=new)
                cells.append(statistics.median(run(f"{folder}/model", cache, new=new) for _ in range(options.repeats)))
            print(f"| {name} | {cells[0]:.1f} | {cells[1]:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="125m", help="a preset (default %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="new tokens, at least 2 (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--first-token", action="store_true", help="measure a fresh process instead")
    options = parser.parse_args()

    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "torch", "transformers", "ctranslate2") if importlib.util.find_spec(name)
    )  # fmt: skip
    print(
        f"OPT-{options.model}, float32, prompt {options.prompt} + {options.new} new tokens, greedy; {CORES} cores, "
        f"{versions}, Python {platform.python_version()}"
    )
    first_token(options) if options.first_token else compare(options)


if __name__ == "__main__":
    main()
