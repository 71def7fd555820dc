"""Direct logit attribution: parts add up to the logit, and each part is what taking it away takes away."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import batch, our_model

from opt_jax import Replace, Zero, stack_layers
from opt_jax.research.attribution import Attribution, attribute, plot

PARTS = ("embed", "pos_embed", "heads", "attention_bias", "mlp", "norm_bias", "logits")


def inputs(name, padding="left") -> dict[str, Any]:
    return {key: value for key, value in batch(name, padding).items() if key != "labels"}


@pytest.mark.parametrize(
    "name, removed", [("opt-125m", False), ("galactica", False), ("untied", False), ("untied", True)]
)
def test_parts_add_up_to_the_logit(name, removed):
    model = our_model(name, _remove_final_layer_norm=removed)
    logits = np.asarray(model(**inputs(name)).logits)
    for tokens, minus in ((5, None), (batch(name)["input_ids"], np.array([[7], [8], [9]]))):
        parts = attribute(model, **inputs(name), tokens=tokens, minus=minus)
        at = lambda ids: np.take_along_axis(logits, np.broadcast_to(ids, (3, 10))[..., None], -1)[..., 0]  # noqa: E731
        expected = at(tokens) - (0 if minus is None else at(minus))
        np.testing.assert_allclose(parts.logits, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(parts.total, expected, rtol=1e-5, atol=1e-5)
        summed = sum(np.asarray(getattr(parts, part)).reshape(-1, 3, 10).sum(0) for part in PARTS[:-1])
        np.testing.assert_allclose(summed, expected, rtol=1e-5, atol=1e-5)


def test_a_part_is_what_its_removal_removes():
    """In the last layer parts do not depend on each other, but for the feed-forward block on attention."""
    model = our_model("opt-125m", num_hidden_layers=2)
    parts = attribute(model, **inputs("opt-125m"), tokens=5)
    _, kept = model.run_with_cache(**inputs("opt-125m"), names="ln_final.hook_scale")
    held = {"ln_final.hook_scale": Replace(kept["ln_final.hook_scale"])}

    def without(edits):
        return np.asarray(parts.logits - model.run_with_hooks(**inputs("opt-125m"), hooks=held | edits).logits[..., 5])

    np.testing.assert_allclose(without({"blocks.1.hook_mlp_out": Zero()}), parts.mlp[1], rtol=1e-4, atol=1e-4)
    _, kept = model.run_with_cache(**inputs("opt-125m"), names="blocks.1.hook_mlp_out")
    same = {"blocks.1.hook_mlp_out": Replace(kept["blocks.1.hook_mlp_out"])}  # attention acts by its share alone
    head = without(same | {"blocks.1.attn.hook_z": Zero(heads=1)})
    np.testing.assert_allclose(head, parts.heads[1, 1], rtol=1e-4, atol=1e-4)
    block = without(same | {"blocks.1.hook_attn_out": Zero()})
    np.testing.assert_allclose(block, parts.heads[1].sum(axis=0) + parts.attention_bias[1], rtol=1e-4, atol=1e-4)


def test_stacked_layers_give_the_same():
    model = our_model("untied")
    listed = attribute(model, **inputs("untied"), tokens=5)
    stacked = attribute(stack_layers(model), **inputs("untied"), tokens=5)
    for part in PARTS:
        np.testing.assert_allclose(getattr(stacked, part), getattr(listed, part), rtol=1e-4, atol=1e-5, err_msg=part)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="post-norm model .*has no attribution"):
        attribute(our_model("opt-350m"), **inputs("opt-350m"), tokens=5)
    model = our_model("opt-125m")
    adapted = nnx.clone(model)
    adapted.model.decoder.layers[1].self_attn.out_proj.kernel_lora_a = nnx.Param(jnp.zeros((24, 2)))
    quantized = nnx.clone(model)
    quantized.model.decoder.layers[1].fc1.kernel = nnx.Param(jnp.zeros((24, 2), jnp.int8))
    for other in (adapted, quantized):
        with pytest.raises(ValueError, match="matrices of a plain model"):
            attribute(other, **inputs("opt-125m"), tokens=5)
    with pytest.raises(ValueError, match="this is an OPTModel"):
        attribute(model.base_model, **inputs("opt-125m"), tokens=5)
    with pytest.raises(ValueError, match=r"tokens of shape \(4,\) does not broadcast"):
        attribute(model, **inputs("opt-125m"), tokens=[1, 2, 3, 4])
    for wrong in (99, -1, 0.5):
        with pytest.raises(ValueError, match="minus must be ids from 0 to 98"):
            attribute(model, **inputs("opt-125m"), tokens=5, minus=wrong)


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    random = np.random.default_rng(0)
    fields: dict[str, Any] = dict.fromkeys(PARTS, np.zeros((2, 6)))
    fields |= dict(heads=random.standard_normal((3, 3, 2, 6)), mlp=random.standard_normal((3, 2, 6)))
    parts = Attribution(**fields)
    axes = plot(parts, row=1, position=4)
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(drawn[:, :3], parts.heads[:, :, 1, 4], rtol=1e-6)
    np.testing.assert_allclose(drawn[:, 3], parts.mlp[:, 1, 4], rtol=1e-6)
    assert axes.images[0].norm.vmax == -axes.images[0].norm.vmin == jnp.abs(drawn).max()
    pyplot.close("all")
