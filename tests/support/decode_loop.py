"""The loops of `generate` as XLA compiles them, for inspection. As a script it compiles for a TPU, and needs none.

`python -m support.decode_loop FILE` writes the optimized HLO of the decode loop for four chips of a TPU v5e, with the
tensors of a bfloat16 model split four ways. Needs `libtpu`, and PYTHONPATH pointing at this package.
"""

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import opt_jax.generation.generate  # noqa: F401  (imported first: what it imports from a patched module would stay patched)
from opt_jax import OPTConfig, OPTForCausalLM, named_parameters
from opt_jax.generation import loop
from opt_jax.parallel.mesh import make_mesh, replicated, use_mesh
from opt_jax.parallel.rules import param_sharding

# All sizes differ, and every weight and cache is larger than any activation, even split four ways.
LAYERS, HEADS = 2, 8
CONFIG = OPTConfig(
    vocab_size=1024,
    hidden_size=512,
    num_attention_heads=HEADS,
    ffn_dim=1536,
    word_embed_proj_dim=512,
    num_hidden_layers=LAYERS,
    max_position_embeddings=638,
)
IDS = np.arange(4, 404).reshape(4, 100)


@cache
def make_model(mesh: Mesh | None = None, **kwargs) -> OPTForCausalLM:
    model = OPTForCausalLM(CONFIG, rngs=nnx.Rngs(0), **kwargs)
    if mesh is None:
        return model
    for path, param in named_parameters(model).items():
        value = param.get_value()
        param.set_value(jax.device_put(value, param_sharding(path, value.shape, mesh)))
    return model


def arguments(
    compiled: str, model: OPTForCausalLM, rows: int = len(IDS), **options: Any
) -> tuple[tuple, dict[str, Any]]:
    """(positional, keyword) arguments with which `generate` would call a compiled function.

    Without a mesh, arguments are shapes, and the prefill is not run.

    Args:
      compiled: "loop.advance" or "beams.advance".
      model: as for `generate`.
      rows: number of prompts.
      options: of `generate`.
    """

    class CalledError(Exception):
        pass

    def called(*args, **kwargs):
        raise CalledError(args, kwargs)

    def begin(*args, **kwargs):
        return jax.eval_shape(partial(decode_begin, **kwargs), *args)

    decode_begin, sharding = loop.begin, jax.tree.leaves(model)[0].sharding
    read = decode_begin if isinstance(sharding, NamedSharding) else begin
    try:
        with mock.patch(f"opt_jax.generation.{compiled}", called), mock.patch("opt_jax.generation.loop.begin", read):
            model.generate(IDS[:rows], max_new_tokens=40, **options)
    except CalledError as call:
        return call.args[0], call.args[1]
    raise AssertionError(f"generate has not called {compiled}")


def _abstract(x: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    here = getattr(x, "sharding", None)
    sharding = NamedSharding(mesh, here.spec) if isinstance(here, NamedSharding) else replicated(mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def main(file: str) -> None:
    from jax.experimental import topologies

    here = make_mesh("tensor=4", jax.devices()[:4])
    chips = make_mesh("tensor=4", topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
    with use_mesh(here):
        model = make_model(here, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        args, kwargs = arguments("loop.advance", model)
    with use_mesh(chips):
        lowered = loop.advance.lower(*jax.tree.map(lambda x: _abstract(x, chips), args), **kwargs)
        # Otherwise caches that were prefetched are written back (docs/scaling.md, "Decoding").
        compiled = lowered.compile(compiler_options={"xla_msa_max_outstanding_evictions": "0"})
        Path(file).write_text(compiled.as_text() or "")


if __name__ == "__main__":
    main(sys.argv[1])
