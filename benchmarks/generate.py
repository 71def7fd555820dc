"""Greedy generation by a 125M-shaped OPT with random weights: ours beside PyTorch `transformers` and CTranslate2.

Run: `.venv/bin/python -m benchmarks.generate` (needs the `oracle` extra; `bench` for CTranslate2, which is left out
otherwise; `python -m opt_jax.model.native_int8` for ours in C). The same weights in float32 (int8: quantized by each
of the two as it does), the same prompts; each contestant in a process of its own, in alternation, with its default
settings and with those that are best for it: `transformers` also with eager attention and with a static cache and
`torch.compile`, CTranslate2 also with a thread for each core.
tokens/s counts new tokens and the time of whole calls. A call that makes one token gives the time of the prompt; what a
longer call takes beyond that, for each further token, is a step. The floor of a step is the time to read all weights
and the used part of the cache once, at the memory bandwidth measured in the same run.

On a GPU, `--model 1.3b --batch-sizes 1 8 64`: in bfloat16; the bandwidth is that of a large copy, bytes read and
written. `--dtype bfloat16` on a CPU: opt-jax and `transformers` only.

`--first-token` measures something else: a fresh process, from its start to the first token of a checkpoint on disk,
with imports, loading and compilation; once without and once with what an earlier process has compiled.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.contestants import CORES, Contestant, alternate, close, machine, spread
from opt_jax import OPTConfig

COPIES = 20  # for the bandwidth of a GPU
Generate = Callable[[np.ndarray, int], np.ndarray]  # (prompts [B, T], number of new tokens) -> new tokens

FRESH_PROCESS = """
import sys
directory, cache = sys.argv[1:]
import jax
if cache:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from opt_jax import OPTForCausalLM
model = OPTForCausalLM.from_pretrained(directory)
model.generate([[2] + list(range(100, 227))], max_new_tokens={new})
"""


def gpu_name() -> str | None:
    import jax

    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def default_dtype(gpu: str | None) -> str:
    return "float32" if gpu is None else "bfloat16"


def bandwidth() -> Callable[[], float]:
    """Bytes per second, the best of four: all cores read an array much larger than any cache, or a GPU copies one."""
    if gpu_name() is None:
        values = np.ones(1 << 27, np.float32)
        parts = np.array_split(values, CORES)
        pool = ThreadPoolExecutor(CORES)
        move, nbytes = lambda: list(pool.map(lambda part: np.dot(part, part), parts)), values.nbytes
    else:
        import jax
        import jax.numpy as jnp

        # One of the other, many in one call, so that its launch counts little.
        copies = jax.jit(lambda array: jax.lax.fori_loop(0, COPIES, lambda _, x: -x, array))
        array = jnp.ones(1 << 29, jnp.float32)
        move, nbytes = lambda: copies(array).block_until_ready(), 2 * array.nbytes * COPIES

    def run() -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            move()
            times.append(time.perf_counter() - start)
        return nbytes / min(times)

    return run


def step_bytes(config: OPTConfig, itemsize: int, batch: int, length: float) -> float:
    """Bytes that one decode step must read: all weights but the tables of which it takes single rows, and the cache."""
    from opt_jax import OPTForCausalLM
    from opt_jax.checkpoints.pretrained import expected_shapes

    skipped = {"model.decoder.embed_positions.embedding"}
    if not config.tie_word_embeddings:
        skipped.add("model.decoder.embed_tokens.embedding")
    shapes = dict(expected_shapes(OPTForCausalLM, config))
    weights = sum(int(np.prod(shape)) for path, shape in shapes.items() if path not in skipped)
    return itemsize * (weights + 2 * config.num_hidden_layers * batch * length * config.hidden_size)


def write_model(preset: str, folder: str, dtype: str | None = None) -> Callable[[], str | None]:
    """A function that writes random weights into files for all contestants. It returns the name of the GPU, or None."""
    import jax
    from flax import nnx

    from convert.__main__ import main as convert
    from opt_jax import OPTForCausalLM

    def run() -> str | None:
        config, kind = OPTConfig.preset(preset), dtype or default_dtype(gpu_name())
        make = jax.jit(lambda: OPTForCausalLM(config, rngs=nnx.Rngs(0), dtype=kind, param_dtype=kind))
        make().save_pretrained(f"{folder}/orbax")
        if convert(["to-hf", f"{folder}/orbax", f"{folder}/hf", "--quiet"]):
            sys.exit("the model could not be written")
        return gpu_name()

    return run


# In the functions below no end token comes before the last step, so that all compute all steps.
def ours(folder: str, kind: str = "float") -> Generate:
    from opt_jax import OPTForCausalLM, quantize, use_native_int8

    model = OPTForCausalLM.from_pretrained(folder, dtype="auto")
    model = quantize(model) if "int8" in kind else model
    model = use_native_int8(model) if "C" in kind else model
    return lambda ids, new: np.asarray(
        model.generate(ids, np.ones_like(ids), max_new_tokens=new, min_new_tokens=new).sequences[:, -new:]
    )


def theirs(folder: str, attention: str | None, compiled: bool) -> Generate:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf: Any = transformers.OPTForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=attention)
    hf = hf.to(device).eval()
    settings: dict[str, Any] = dict(cache_implementation="static") if compiled else {}
    if compiled:
        hf.forward = torch.compile(hf.forward, mode="reduce-overhead" if device == "cuda" else "default")

    def run(ids: np.ndarray, new: int) -> np.ndarray:
        inputs = torch.from_numpy(ids).long().to(device)
        with torch.inference_mode():
            out = hf.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                **settings,
            )
        return out.cpu().numpy()[:, -new:]

    return run


def ctranslate2(folder: str, vocab_size: int, kind: str, threads: int) -> Generate:
    import transformers
    from ctranslate2 import Generator  # pyright: ignore[reportMissingImports]
    from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"token{i}" for i in range(4, vocab_size))]  # it wants texts
    given: dict[str, Any] = dict(bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    given |= dict(vocab={name: i for i, name in enumerate(names)}, merges=[])
    with tempfile.TemporaryDirectory() as place:
        transformers.GPT2Tokenizer(**given).save_pretrained(folder)
        TransformersConverter(folder).convert(f"{place}/model")
        generator = Generator(f"{place}/model", compute_type=kind, intra_threads=threads)

    def run(ids: np.ndarray, new: int) -> np.ndarray:
        results = generator.generate_batch(
            [[names[i] for i in row] for row in ids],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return np.array([result.sequences_ids[0] for result in results])

    return run


def contestants(config: OPTConfig, folder: str, only_floats: bool) -> dict[str, Contestant]:
    """Ours needs no settings. The peers: as they are, and with what makes them faster."""
    rows = {
        "opt-jax": Contestant(ours, folder),
        "transformers": Contestant(theirs, folder, None, False),
        "transformers, eager attention": Contestant(theirs, folder, "eager", False),
        "transformers, static cache, compiled": Contestant(theirs, folder, None, True),
    }
    if only_floats:
        return rows
    from opt_jax.model.native_int8 import library_path

    if importlib.util.find_spec("qwix") is not None:
        rows["opt-jax int8"] = Contestant(ours, folder, "int8")
        if library_path().is_file():
            rows["opt-jax int8, in C"] = Contestant(ours, folder, "int8 in C")
    if importlib.util.find_spec("ctranslate2") is None:
        print("CTranslate2 is not installed (the `bench` extra): its rows are left out")
        return rows
    kinds = {"float32": ("float32", 0), f"float32, {CORES} threads": ("float32", CORES), "int8": ("int8", CORES)}
    peers = {f"CTranslate2 {n}": Contestant(ctranslate2, folder, config.vocab_size, *k) for n, k in kinds.items()}
    return rows | peers


def compare(options: argparse.Namespace) -> None:
    config = OPTConfig.preset(options.model)
    with tempfile.TemporaryDirectory() as folder:
        writer = Contestant(write_model, options.model, folder, options.dtype)
        _, gpu = writer()
        writer.close()
        dtype = options.dtype or default_dtype(gpu)
        print(
            f"OPT-{options.model}, {dtype}, prompt {options.prompt} + {options.new} new tokens, greedy; "
            f"{gpu or 'CPU'}; {machine('jax', 'torch', 'transformers', 'ctranslate2')}"
        )
        memory = Contestant(bandwidth)
        runs = contestants(config, f"{folder}/hf", gpu is not None or dtype == "bfloat16")
        measure(options, config, 4 if dtype == "float32" else 2, memory, runs)
        close({"memory": memory, **runs})


def measure(
    options: argparse.Namespace, config: OPTConfig, itemsize: int, memory: Contestant, runs: dict[str, Contestant]
) -> None:
    speeds, notes = [memory()[1]], []
    print("\n| batch | | s (median) | spread | tokens/s | ratio | prompt, ms | step, ms | floor of a step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for batch in options.batch_sizes:
        ids = np.random.default_rng(0).integers(4, config.vocab_size, (batch, options.prompt))
        first = {name: run(ids, options.new) for name, run in runs.items()}  # compiles, allocates
        expected = first["opt-jax"][1]
        same = [f"{name} {np.mean(out == expected):.0%}" for name, (_, out) in first.items() if name != "opt-jax"]
        notes.append(
            f"batch {batch}: our first call {first['opt-jax'][0]:.1f} s; tokens equal to ours: {', '.join(same)}"
        )
        times = {}
        for new in (options.new, 1):  # one after the other: a static cache is made anew for another length
            for run in runs.values():
                run(ids, new)
            times[new] = alternate(runs, options.repeats, ids, new)
            speeds.append(memory()[1])
        floor = step_bytes(config, itemsize, batch, options.prompt + options.new / 2) / max(speeds)
        reference = statistics.median(times[options.new]["transformers"])
        for name in runs:
            median, prompt = (statistics.median(times[new][name]) for new in (options.new, 1))
            step = (median - prompt) / (options.new - 1)
            # int8 has other bytes to read: no share
            share = "" if "int8" in name else f"{floor / step:.0%} of {floor * 1e3:.3g} ms"
            print(
                f"| {batch} | {name} | {spread(times[options.new][name])} | {batch * options.new / median:,.1f} "
                f"| {reference / median:.2f}x | {prompt * 1e3:.0f} | {step * 1e3:.3g} | {share} |",
                flush=True,
            )
    print("", *notes, sep="\n")
    print(f"memory bandwidth {max(speeds) / 1e9:,.1f} GB/s (best; median {statistics.median(speeds) / 1e9:,.1f})")


def first_token(options: argparse.Namespace) -> None:
    from flax import nnx

    from opt_jax import OPTForCausalLM

    print(f"OPT-{options.model}; {machine('jax')}\n")

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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="new tokens, at least 2 (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--first-token", action="store_true", help="measure a fresh process instead")
    options = parser.parse_args()
    if options.new < 2:
        parser.error("--new: at least 2, because a step is what the tokens after the first one take")
    if options.first_token and (
        unused := [
            name
            for name in ("batch_sizes", "dtype", "prompt", "new")
            if vars(options)[name] != parser.get_default(name)
        ]
    ):
        parser.error(
            f"--first-token measures float32 and a prompt of its own: leave out --{unused[0].replace('_', '-')}"
        )

    first_token(options) if options.first_token else compare(options)


if __name__ == "__main__":
    main()
