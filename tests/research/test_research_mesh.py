"""What the research functions return on a mesh is what they return on one device."""

from functools import partial

import jax
import numpy as np
import pytest
from reference import our_model
from support.hooked_models import assert_near
from support.small_models import on_mesh

from opt_jax.parallel.mesh import make_mesh
from opt_jax.research import attribution, induction, lens, neurons, patching, steering

IDS = np.random.RandomState(0).randint(4, 99, (8, 6))
CLEAN, CORRUPTED = IDS[:4], IDS[4:]


def metric(logits):
    return logits[:, -1, 5].mean()


def cells(patched):
    return patched.patched, patched.clean, patched.corrupted


METHODS = {
    "lens": lambda model: lens.logit_lens(model, CLEAN),
    "training of a lens": lambda model: lens.train_tuned_lens(model, [CLEAN, CORRUPTED]),
    "attribution": lambda model: attribution.attribute(model, CLEAN, tokens=5),
    "patching": lambda model: cells(patching.patch(model, CLEAN, CORRUPTED, metric, layers=[0, 2], positions=[1, -1])),
    "tracing": lambda model: cells(patching.causal_trace(model, IDS[:1], [1], metric, positions=[1], samples=4)),
    "induction": lambda model: induction.induction_scores(model, length=5),
    "steering": lambda model: steering.steering_vectors(model, [CLEAN], [CORRUPTED], names="blocks.1.hook_resid_post"),
    "neurons": lambda model: neurons.neuron_statistics(model, [CLEAN, CORRUPTED]).rate,
}


@pytest.mark.parametrize("method", METHODS)
def test_a_mesh_gives_the_same(method):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    model = our_model("opt-125m", hidden_size=32, num_attention_heads=4, word_embed_proj_dim=32, vocab_size=100)
    meshed = on_mesh(model, make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4]))
    expected, got = METHODS[method](model), METHODS[method](meshed)
    jax.tree.map(partial(assert_near, tolerance=1e-5), got, expected)
