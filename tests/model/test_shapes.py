"""The shapes and dtypes in the model's annotations are true: jaxtyping and beartype check every call.

The checks are added while opt_jax is imported, so this needs its own process. All calls are made under
`jax.eval_shape`, which computes nothing.
"""

import subprocess
import sys

import pytest

pytest.importorskip("beartype", reason="beartype checks the annotations")

PROGRAM = """
import warnings

import beartype.roar
import jaxtyping

warnings.simplefilter("ignore", beartype.roar.BeartypeDecorHintPep585DeprecationWarning)
jaxtyping.install_import_hook("opt_jax", "beartype.beartype")

import jax
import jax.numpy as jnp
from flax import nnx

from opt_jax import (
    OPTConfig,
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
    stack_layers,
)

B, T = 2, 6
ids, mask = jnp.ones((B, T), jnp.int32), jnp.ones((B, T), bool)
pre_norm = OPTConfig(vocab_size=40, hidden_size=24, ffn_dim=56, num_hidden_layers=3, num_attention_heads=4)
post_norm = OPTConfig(
    vocab_size=40, hidden_size=24, ffn_dim=56, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=16,
    do_layer_norm_before=False, tie_word_embeddings=False, enable_bias=False, layerdrop=0.1, attention_dropout=0.1,
)
labels = {
    OPTModel: {},
    OPTForCausalLM: {"labels": ids},
    OPTForSequenceClassification: {"labels": jnp.zeros(B, jnp.int32)},
    OPTForQuestionAnswering: {"start_positions": jnp.zeros(B, jnp.int32), "end_positions": jnp.ones(B, jnp.int32)},
}


def call(config, cls, dtype, extra):
    model = cls(config, rngs=nnx.Rngs(0), dtype=dtype)
    options = dict(output_hidden_states=True, output_attentions=True)
    out = model.forward(ids, attention_mask=mask, dropout_key=jax.random.key(0), **options, **extra)
    assert out.hidden_states[-1].shape == (B, T, config.word_embed_proj_dim)
    assert out.attentions[0].shape == (B, 4, T, T)
    model.forward(ids, position_ids=jnp.arange(B * T).reshape(B, T), **extra)
    model.forward(attention_mask=mask, inputs_embeds=jnp.zeros((B, T, config.word_embed_proj_dim), dtype), **extra)
    out = model.forward(ids, attention_mask=mask, cache=model.init_cache(B, 2 * T))
    model.forward(ids[:, :1], attention_mask=mask[:, :1], cache=out.cache)
    stack_layers(model).forward(ids, attention_mask=mask, **options, **extra)


for config in (pre_norm, post_norm):
    for cls, extra in labels.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            jax.eval_shape(lambda: call(config, cls, dtype, extra))
print("checked")
"""


@pytest.mark.slow
def test_annotated_shapes_hold_in_every_class_and_form():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.stdout == "checked\n", run.stdout + run.stderr
