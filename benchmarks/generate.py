"""Greedy generation by a 125M-shaped OPT with random weights: ours beside PyTorch `transformers` and CTranslate2.

Run: `.venv/bin/python benchmarks/generate.py` (needs the `oracle` extra; `bench` for CTranslate2, which is left out
otherwise). The same weights in float32 (int8: quantized by CTranslate2 as it does), the same prompts, in alternation.
tokens/s counts new tokens and the time of whole calls. A call that makes one token gives the time of the prompt; what a
longer call takes beyond that, for each further token, is a step. The floor of a step is the time to read all weights
and the used part of the cache once, at the memory bandwidth measured in the same run.

On a GPU, `python -m benchmarks.generate --model 1.3b --batch-sizes 1 8 64`: in bfloat16, and `transformers` with its
static cache, which it compiles with `torch.compile`; the bandwidth is that of a large copy, bytes read and written.

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

# The peer lives in the same process: JAX takes what it needs of a GPU's memory, not three quarters of it at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from flax import nnx  # noqa: E402
from jax import lax  # noqa: E402

from convert.names import to_hf  # noqa: E402
from opt_jax import OPTConfig, OPTForCausalLM, named_parameters  # noqa: E402

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
COPIES = 20  # for the bandwidth of a GPU
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


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


@jax.jit
def copies(array: jax.Array) -> jax.Array:
    """One of the other, many in one call, so that its launch counts little."""
    return lax.fori_loop(0, COPIES, lambda _, x: -x, array)


def bandwidth(repeats: int = 3) -> float:
    """Bytes per second, the best of a few: all cores read an array much larger than any cache, or a GPU copies one."""
    if on_gpu():
        array = jax.random.normal(jax.random.key(0), (1 << 29,), jnp.float32)
        times = [timed(lambda: copies(array).block_until_ready())[0] for _ in range(repeats + 1)]
        return 2 * array.nbytes * COPIES / min(times[1:])
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
    device, settings, others = "cuda" if on_gpu() else "cpu", {}, {}
    with torch.device(device):
        hf: Any = transformers.AutoModelForCausalLM.from_config(
            transformers.OPTConfig(**config.to_hf()), dtype=torch.bfloat16 if on_gpu() else torch.float32
        ).eval()
    if on_gpu():
        model, settings = same_weights(hf, config), dict(cache_implementation="static")
    else:
        with tempfile.TemporaryDirectory() as folder:
            hf.save_pretrained(folder)
            model = OPTForCausalLM.from_pretrained(folder)
            others = ctranslate2_models(folder, config.vocab_size)
        hf.set_attn_implementation("eager")

    # No end token before the last step: all always do all the work.
    def ours(ids: np.ndarray, new: int) -> np.ndarray:
        return model.generate(ids, np.ones_like(ids), max_new_tokens=new, min_new_tokens=new).sequences[:, -new:]

    def theirs(ids: np.ndarray, new: int) -> np.ndarray:
        inputs = torch.from_numpy(ids).long().to(device)
        with torch.inference_mode():
            out = hf.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, **settings,
            )  # fmt: skip
        return out.cpu().numpy()[:, -new:]

    return model, {"opt-jax": ours, "transformers": theirs, **others}


def same_weights(hf: Any, config: OPTConfig) -> OPTForCausalLM:
    """Our model with the weights of HF's, in bfloat16, without leaving the GPU."""
    model = nnx.eval_shape(
        lambda: OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    )
    weights = dict(hf.named_parameters())
    for path, param in named_parameters(model).items():
        name, transposed = to_hf(path)
        weight = weights[name].detach()
        param.set_value(jnp.from_dlpack(weight.T.contiguous() if transposed else weight))
    torch.cuda.synchronize()
    return model


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


def timed(run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run(*args)
    return time.perf_counter() - start, result


def compare(options: argparse.Namespace) -> None:
    model, runs = contestants(options.model)
    speeds = [bandwidth()]
    print("\n| batch | | s (median) | spread | tokens/s | ratio | prompt, ms | step, ms | floor of a step |")
    print("|---|---|---|---|---|---|---|---|---|")
    notes = []
    for batch in options.batch_sizes:
        ids = np.random.default_rng(0).integers(4, model.config.vocab_size, (batch, options.prompt))
        first = {name: timed(run, ids, options.new) for name, run in runs.items()}  # compiles, allocates
        same = [
            f"{name} {np.mean(tokens == first['opt-jax'][1]):.0%}"
            for name, (_, tokens) in first.items() if name != "opt-jax"
        ]  # fmt: skip
        notes.append(
            f"batch {batch}: our first call {first['opt-jax'][0]:.1f} s; tokens equal to ours: {', '.join(same)}"
        )
        times: dict[str, dict[int, list[float]]] = {name: {1: [], options.new: []} for name in runs}
        for new in (
            options.new,
            1,
        ):  # one after the other: for another length a static cache is made, and recorded, anew
            for run in runs.values():
                run(ids, new)
            for _ in range(options.repeats):
                for name, run in runs.items():
                    times[name][new].append(timed(run, ids, new)[0])
                speeds.append(bandwidth(1))
        floor = step_bytes(model, batch, options.prompt + options.new / 2) / max(speeds)
        reference = statistics.median(times["transformers"][options.new])
        for name, values in times.items():
            whole = values[options.new]
            prompt, median = statistics.median(values[1]), statistics.median(whole)
            step = (median - prompt) / (options.new - 1)
            speed_up, rate = reference / median, batch * options.new / median
            # int8 has other bytes to read: no share
            share = "" if "int8" in name else f"{floor / step:.0%} of {floor * 1e3:.3g} ms"
            print(
                f"| {batch} | {name} | {median:.3g} | {min(whole):.3g}-{max(whole):.3g} | {rate:,.1f} "
                f"| {speed_up:.2f}x | {prompt * 1e3:.0f} | {step * 1e3:.3g} | {share} |",
                flush=True,
            )
    print("", *notes, sep="\n")
    print(f"memory bandwidth {max(speeds) / 1e9:,.1f} GB/s (best; median {statistics.median(speeds) / 1e9:,.1f})")


def first_token(options: argparse.Namespace) -> None:
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
    dtype, where = ("bfloat16", jax.devices()[0].device_kind) if on_gpu() else ("float32", f"{CORES} cores")
    print(
        f"OPT-{options.model}, {dtype}, prompt {options.prompt} + {options.new} new tokens, greedy; {where}, "
        f"{versions}, Python {platform.python_version()}"
    )
    first_token(options) if options.first_token else compare(options)


if __name__ == "__main__":
    main()
