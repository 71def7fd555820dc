"""Models, inputs and vectors of the tests of hook points."""

from functools import cache
from typing import Any

import numpy as np
from reference import batch, draw, our_model

from opt_jax import OPTForCausalLM, stack_layers

DEPTH = 3
INPUTS = {padding: batch("opt-125m", padding, length=6) for padding in ("none", "left", "right")}
IDS, MASK = INPUTS["left"]["input_ids"], INPUTS["left"]["attention_mask"]
VECTOR = draw("some.kernel", (24, 1))[:, 0] * 5
OTHER = 4 * np.roll(VECTOR, 7)
RESID = "blocks.1.hook_resid_post"


@cache
def separate(depth: int = DEPTH) -> OPTForCausalLM:
    return our_model("opt-125m", num_hidden_layers=depth)


@cache
def stacked(depth: int = DEPTH) -> OPTForCausalLM:
    return stack_layers(our_model("opt-125m", num_hidden_layers=depth))


def edited(model, hooks, ids: Any = IDS, mask: Any = MASK, **kwargs):
    return np.asarray(model.run_with_hooks(ids, mask, hooks=hooks, **kwargs).logits)


def assert_near(got, expected, tolerance=1e-6, least=0.0):
    """Assert that the error is at most `tolerance` times the norm of what is expected, or times `least`."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= tolerance * max(np.linalg.norm(expected), least)
