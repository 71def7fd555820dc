"""Beam search with a 125M-shaped OPT of random weights: ours, the same with a reordered cache, and `transformers`.

Run: `.venv/bin/python -m benchmarks.beams` (needs the `oracle` extra). The same weights in float32, the same prompts
and, checked, the same sequences. "reordered cache" is our search with beams as rows of the cache, gathered at every
step, as is usual. Seconds are those of whole calls, prefill included, the best of a few in alternation.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax import lax

from opt_jax import OPTConfig, OPTForCausalLM, beams
from opt_jax.cache import KVCache


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
def search_rows(model: OPTForCausalLM, ids, mask, options: beams.BeamOptions, *, num_beams: int, capacity: int):
    """`beams._search` with a `RowsCache`."""
    batch, width = ids.shape
    out = model.forward(ids, mask, cache=model.init_cache(batch, width + capacity), logits_to_keep=1)
    assert out.cache is not None
    per_row = (out.cache.k, out.cache.v, out.cache.valid, out.cache.next_position)
    k, v, valid, position = jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=0), per_row)
    cache: Any = RowsCache(dataclasses.replace(out.cache, k=k, v=v, valid=valid, next_position=position))
    advance = partial(beams._advance, ids, mask, options, None, False, None)

    def step(state):
        token = lax.dynamic_index_in_dim(state.running.tokens, state.step - 1, axis=2, keepdims=False)
        out = model.forward(token.reshape(-1, 1), cache=state.cache.rows)
        assert out.cache is not None
        state = dataclasses.replace(state, cache=RowsCache(out.cache))
        return advance(state, out.logits.reshape(batch, num_beams, -1))

    state = beams._start(batch, num_beams, capacity, options.pad_token_id, cache)
    logits = jnp.broadcast_to(out.logits, (batch, num_beams, out.logits.shape[-1]))
    return lax.while_loop(lambda s: ~s.done.all(), step, advance(state, logits)).finished


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

    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    config = transformers.OPTConfig(**OPTConfig.preset(settings.model).to_hf())
    hf: Any = transformers.OPTForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        model = OPTForCausalLM.from_pretrained(folder)

    print(
        f"OPT-{settings.model}, float32, prompt {settings.prompt} + {new} new tokens, {num_beams} beams; "
        f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}"
    )
    print("batch  ours, s  reordered cache, s  HF, s  new tokens/s of ours")
    for batch in settings.batch_sizes:
        ids = np.random.RandomState(batch).randint(3, 50265, (batch, settings.prompt)).astype(np.int32)
        options = beams._options(model, new, 1.0, [], 1, None)

        def ours(ids=ids):
            out = beams.beam_search(
                model, ids, ids > 0, max_new_tokens=new, num_beams=num_beams, eos_token_ids=[], pad_token_id=1
            )
            return out.sequences[:, settings.prompt :]

        def rows(ids=ids, options=options):
            out = search_rows(model, ids, ids > 0, options, num_beams=num_beams, capacity=new)
            return np.asarray(out.tokens[:, 0])

        def theirs(ids=ids):
            given = dict(num_beams=num_beams, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=1)
            return hf.generate(torch.from_numpy(ids).long(), **given).numpy()[:, settings.prompt :]

        runs = dict(ours=ours, rows=rows, theirs=theirs)
        times: dict[str, list[float]] = {name: [] for name in runs}
        tokens = {name: run() for name, run in runs.items()}  # compiles
        for _ in range(settings.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        for name in ("rows", "theirs"):
            if not np.array_equal(tokens["ours"], tokens[name]):
                print(f"# {name} differ in {(tokens['ours'] != tokens[name]).any(1).sum()} of {batch} sequences")
        best = {name: min(seconds) for name, seconds in times.items()}
        print(
            f"{batch:5}  {best['ours']:7.2f}  {best['rows']:18.2f}  {best['theirs']:5.2f}  "
            f"{batch * new / best['ours']:20.1f}"
        )


if __name__ == "__main__":
    main()
