"""One training step of OPT with random weights: ours beside PyTorch `transformers`, in alternation.

Run: `.venv/bin/python -m benchmarks.train_step` (the peer needs the `oracle` extra; without it, or on a GPU that
PyTorch cannot use, it is left out). All do the same work: forward, backward, clipping to norm 1.0 and AdamW without
dropout, float32 weights and moments, and with `--dtype bfloat16` the products in bfloat16 (the peer: autocast). Each is
in a process of its own. The peer has a row with its defaults (SDPA) and one with `torch.compile` and the fused AdamW.
The floor is the model's FLOPs (6 N + 12 L H Q T per token) at the rate that a large product of the same dtype reaches
on this machine in the same run; MFU, where the chip is known, compares with its data sheet's bfloat16. On a GPU:
`--dtype bfloat16 --model 1.3b --batch-size 8 --seq-len 2048`, and `--model 6.7b --layers 4` for the width of a size
that does not fit.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contestants import Contestant, alternate, close, machine, spread
from opt_jax import OPTConfig
from opt_jax.model.attention_choice import choose_attention
from opt_jax.model.remat import Remat
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.training.flops import flops_per_token, peak_flops
from opt_jax.training.metrics import peak_memory
from opt_jax.training.optimizer import make_optimizer
from opt_jax.training.step import make_train_step, new_model, new_state, place_batch, state_shardings

Step = Callable[[], int | None]  # one update, done; returns the most bytes of the device's memory in use so far


def ours(config: OPTConfig, batch: np.ndarray, dtype: str, remat: Remat) -> Step:
    mesh = make_mesh("data=1", jax.devices()[:1])
    optimizer = make_optimizer(lambda step: 1e-4)
    attention = choose_attention("auto", jax.default_backend(), config.head_dim, dtype, config.attention_dropout)
    model = partial(new_model, config, 0, dtype, remat=remat, attn_implementation=attention)
    begin = lambda: new_state(model(), optimizer)  # noqa: E731
    shardings = state_shardings(jax.eval_shape(begin), mesh)
    state = jax.jit(begin, out_shardings=shardings)()
    step = make_train_step(optimizer, lambda step: jnp.float32(1e-4), config, 0, shardings, mesh)
    rows = lambda rows: {"input_ids": batch[rows, :-1], "labels": batch[rows, 1:]}  # noqa: E731
    placed = place_batch(rows, len(batch), 1, mesh)

    def run() -> int | None:
        nonlocal state
        with use_mesh(mesh):
            state, measured = step(state, placed)
        float(measured["loss"])  # waits
        return peak_memory(jax.devices()[:1])

    return run


def theirs(config: OPTConfig, batch: np.ndarray, dtype: str, best: bool) -> Step:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA has it by default; on a CPU it changes nothing
    hf_config = transformers.OPTConfig(**config.to_hf())  # its default attention is SDPA
    with torch.device(device):
        model = transformers.OPTForCausalLM(hf_config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True if best else None
    )
    forward = torch.compile(model) if best else model
    inputs, targets = (torch.from_numpy(ids).long().to(device) for ids in (batch[:, :-1], batch[:, 1:]))

    def run() -> int | None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = forward(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()  # waits
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    return run


def why_no_peer() -> str | None:
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        return f"{missing[0]} is not installed"
    import torch

    platform = jax.default_backend()
    if platform not in ("cpu", "gpu"):
        return f"it does not run on {platform}"
    if platform == "gpu" and not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use this GPU"
    return None


def matmul_rate(dtype: str) -> Callable[[], float]:
    """FLOP/s of a large product, the best of five."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()

    def run() -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            product(a, a).block_until_ready()
            times.append(time.perf_counter() - start)
        return 2 * size**3 / min(times)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="125m", help="a preset (default %(default)s)")
    parser.add_argument("--layers", type=int, help="so many instead of the preset's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--remat", choices=get_args(Remat), nargs="+", default=["none", "dots"], help="a row for each")
    options = parser.parse_args()

    changes = {"num_hidden_layers": options.layers} if options.layers is not None else {}
    config = OPTConfig.preset(options.model, dropout=0.0, **changes)
    shape = (options.batch_size, options.seq_len + 1)
    batch = np.random.default_rng(0).integers(4, config.vocab_size, shape).astype(np.int32)
    contestants = {
        f"opt-jax, --remat {remat}": Contestant(ours, config, batch, options.dtype, remat) for remat in options.remat
    }
    if (reason := why_no_peer()) is None:
        contestants["transformers"] = Contestant(theirs, config, batch, options.dtype, False)
        contestants["transformers, compiled, fused AdamW"] = Contestant(theirs, config, batch, options.dtype, True)
    else:
        print(f"transformers is left out: {reason}")
    rate = Contestant(matmul_rate, options.dtype)
    rates = [rate()[1]]
    for run in contestants.values():
        run()  # compiles, allocates
    times = alternate(contestants, options.repeats, untimed_first=True)
    rates.append(rate()[1])

    device, tokens = jax.devices()[0], options.batch_size * options.seq_len
    parameters = sum(p.size for p in jax.tree.leaves(jax.eval_shape(lambda: new_model(config, 0, jnp.float32))))
    flops = flops_per_token(config, parameters, options.seq_len) * tokens
    floor, peak = flops / max(rates), peak_flops(device)
    where = "CPU" if device.platform == "cpu" else device.device_kind
    print(
        f"OPT-{options.model}, {config.num_hidden_layers} layers, {parameters:,} parameters, {options.batch_size} x "
        f"{options.seq_len} tokens, {options.dtype}, {where}; {machine('jax', 'torch', 'transformers')}; "
        f"floor {floor:.3g} s"
    )
    print("| | s/step (median) | spread | tokens/s | share of the floor | MFU | memory | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    reference = statistics.median(times.get("transformers", next(iter(times.values()))))
    for name, values in times.items():
        median, memory = statistics.median(values), contestants[name]()[1]
        mfu = f"{flops / median / peak:.1%}" if peak else "-"
        print(
            f"| {name} | {spread(values)} | {tokens / median:,.0f} | "
            f"{floor / median:.0%} | {mfu} | {f'{memory / 2**30:.1f} GiB' if memory else '-'} | "
            f"{reference / median:.2f}x |"
        )
    close({"rate": rate, **contestants})


if __name__ == "__main__":
    main()
