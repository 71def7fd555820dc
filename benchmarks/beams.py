"""Beam search with a 125M-shaped OPT of random weights: ours, the same with a reordered cache, and `transformers`.

Run: `.venv/bin/python -m benchmarks.beams` (needs the `oracle` extra). The same weights in float32, the same prompts,
sequences beside each other; each row of the table is a process of its own. "reordered cache" is our search with beams
as rows of the cache, gathered at every step, as is usual. Seconds are those of whole calls, prefill included, in
alternation.
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.contestants import Contestant, alternate, close, machine, spread
from benchmarks.generate import write_model
from opt_jax import OPTConfig, OPTForCausalLM
from opt_jax.generation import beams
from opt_jax.generation.loop import Prompts
from opt_jax.generation.request import check_request
from opt_jax.model.cache import KVCache

Search = Callable[[np.ndarray], np.ndarray]  # prompts [B, T] -> new tokens of the best sequence [B, N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowsCache:
    """Takes the place of a branched `KVCache`; `rows` has B * N rows."""

    rows: KVCache

    def select(self, branches: jax.Array) -> "RowsCache":
        batch, count = branches.shape
        index = (jnp.arange(batch)[:, None] * count + branches).reshape(-1)
        cache = self.rows
        per_row = (cache.k, cache.v, cache.valid, cache.next_position)
        k, v, valid, position = jax.tree.map(lambda x: x[index], per_row)
        return RowsCache(dataclasses.replace(cache, k=k, v=v, valid=valid, next_position=position))


@partial(jax.jit, static_argnames=("num_beams", "capacity"))
def search_rows(model: OPTForCausalLM, prompts: Prompts, options: beams.BeamOptions, *, num_beams: int, capacity: int):
    """The search of `BeamEngine` with a `RowsCache`."""
    batch, width = prompts.mask.shape
    out = model.forward(prompts.ids, prompts.mask, cache=model.init_cache(batch, width + capacity), logits_to_keep=1)
    assert out.cache is not None
    per_row = (out.cache.k, out.cache.v, out.cache.valid, out.cache.next_position)
    k, v, valid, position = jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=0), per_row)
    cache: Any = RowsCache(dataclasses.replace(out.cache, k=k, v=v, valid=valid, next_position=position))

    def step(state):
        token = lax.dynamic_index_in_dim(state.running.tokens, state.step - 1, axis=2, keepdims=False)
        out = model.forward(token.reshape(-1, 1), cache=state.cache.rows)
        assert out.cache is not None
        state = dataclasses.replace(state, cache=RowsCache(out.cache))
        return beams.add_tokens(state, out.logits.reshape(batch, num_beams, -1), options)

    state = beams.new_state(prompts, cache, options, num_beams, capacity, None)
    logits = jnp.broadcast_to(out.logits, (batch, num_beams, out.logits.shape[-1]))
    state = beams.add_tokens(state, logits, options)
    return lax.while_loop(lambda s: ~s.done.all(), step, state).finished


def ours(folder: str, num_beams: int, new: int) -> Search:
    model = OPTForCausalLM.from_pretrained(folder)
    given: Any = dict(max_new_tokens=new, num_beams=num_beams, eos_token_id=[], pad_token_id=1)
    return lambda ids: model.generate(ids, ids > 0, **given).sequences[:, -new:]


def reordered(folder: str, num_beams: int, new: int) -> Search:
    model = OPTForCausalLM.from_pretrained(folder)
    given: Any = dict(max_new_tokens=new, num_beams=num_beams, eos_token_id=[], pad_token_id=1)

    def search(ids: np.ndarray) -> np.ndarray:
        request = check_request(model, ids, ids > 0, options=given)
        sampling = request.options_of(np.arange(1))
        options = beams.BeamOptions(sampling, jnp.float32(1), keys=None, early_stopping=False, min_keep=1)
        finished = search_rows(model, request.prompts, options, num_beams=num_beams, capacity=new)
        return np.asarray(finished.tokens[:, 0])

    return search


def theirs(folder: str, num_beams: int, new: int, attention: str | None) -> Search:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    hf: Any = transformers.OPTForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    given: Any = dict(num_beams=num_beams, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=1)
    return lambda ids: hf.generate(torch.from_numpy(ids).long(), **given).numpy()[:, -new:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="125m", help="a preset (default %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="new tokens (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    num_beams, new = settings.num_beams, settings.new

    config = OPTConfig.preset(settings.model)
    print(
        f"OPT-{settings.model}, float32, prompt {settings.prompt} + {new} new tokens, {num_beams} beams; "
        f"{machine('jax', 'torch', 'transformers')}\n"
    )
    print("| batch | | s (median) | spread | new tokens/s | ratio | same sequences |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        writer = Contestant(write_model, settings.model, folder)
        writer()
        writer.close()
        runs = {
            "opt-jax": Contestant(ours, f"{folder}/hf", num_beams, new),
            "opt-jax, reordered cache": Contestant(reordered, f"{folder}/hf", num_beams, new),
            "transformers": Contestant(theirs, f"{folder}/hf", num_beams, new, None),
            "transformers, eager attention": Contestant(theirs, f"{folder}/hf", num_beams, new, "eager"),
        }
        for batch in settings.batch_sizes:
            ids = np.random.default_rng(batch).integers(4, config.vocab_size, (batch, settings.prompt), np.int32)
            outputs = {name: run(ids)[1] for name, run in runs.items()}  # compiles
            times = alternate(runs, settings.repeats, ids)
            reference = statistics.median(times["transformers"])
            for name, values in times.items():
                median = statistics.median(values)
                same = np.mean((outputs[name] == outputs["opt-jax"]).all(1))
                print(
                    f"| {batch} | {name} | {spread(values)} | {batch * new / median:.1f} | {reference / median:.2f}x "
                    f"| {same:.0%} |",
                    flush=True,
                )
        close(runs)


if __name__ == "__main__":
    main()
