"""Separate and stacked layers: each form converts to the other, and both compute the same."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import CLASSES, CONFIGS, SMALL, batch, our_model, values

import opt_jax
from opt_jax import OPTConfig, OPTForCausalLM, named_parameters, stack_layers, unstack_layers
from opt_jax.model import decoder, stacking


def build(name: str, cls: str, scan_layers: bool = False):
    return getattr(opt_jax, cls)(CONFIGS[name], rngs=nnx.Rngs(3), scan_layers=scan_layers)


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", SMALL)
def test_stacking_and_back(name, cls):
    model = build(name, cls)
    before = values(model)
    stacked = values(stack_layers(model))
    for path, value in before.items():
        head, _, tail = path.partition(".layers.")
        index, _, rest = tail.partition(".")
        np.testing.assert_array_equal(stacked[f"{head}.layers.{rest}"][int(index)] if tail else stacked[path], value)
    assert {k: v.shape for k, v in stacked.items()} == {k: v.shape for k, v in values(build(name, cls, True)).items()}
    assert jax.tree.structure(model) == jax.tree.structure(build(name, cls, True))
    assert stack_layers(model) is model  # it is stacked already
    after = values(unstack_layers(model))
    assert after.keys() == before.keys() and all((after[k] == before[k]).all() for k in before)
    assert jax.tree.structure(model) == jax.tree.structure(build(name, cls))


def test_scan_layers_draws_the_same_values():
    a, b = (
        values(build("opt-350m", "OPTForCausalLM")),
        values(unstack_layers(build("opt-350m", "OPTForCausalLM", True))),
    )
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_abstract_models_stack_too():
    for cls in CLASSES:
        abstract = nnx.eval_shape(lambda cls=cls: build("opt-350m", cls))
        shapes = {path: param.get_value() for path, param in named_parameters(abstract).items()}
        stacked = named_parameters(stack_layers(abstract))
        assert stacked["model.decoder.layers.fc1.kernel"].get_value() == jax.ShapeDtypeStruct((3, 24, 40), jnp.float32)
        again = {path: param.get_value() for path, param in named_parameters(unstack_layers(abstract)).items()}
        assert again == shapes


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_keeps_less_in_both_forms(scan_layers):
    ids = batch("opt-125m")["input_ids"]

    def kept(remat):
        """Bytes that the forward pass keeps for the backward pass."""
        build = lambda: OPTForCausalLM(  # noqa: E731
            CONFIGS["opt-125m"], rngs=nnx.Rngs(0), scan_layers=scan_layers, remat=remat
        )
        loss = lambda model: model.forward(ids, labels=ids, dropout_key=jax.random.key(0)).loss  # noqa: E731
        _, backward = jax.eval_shape(lambda model: jax.vjp(loss, model), nnx.eval_shape(build))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    none, dots, names, full = (kept(remat) for remat in ("none", "dots", "names", "full"))
    assert none > dots > names > full


def test_remat_computes_the_same_in_separate_layers():
    model, ids = our_model("opt-125m", num_hidden_layers=1), batch("opt-125m")["input_ids"]
    gradients = jax.jit(jax.value_and_grad(lambda model: model.forward(ids, labels=ids).loss))
    expected = jax.tree.leaves(gradients(model))
    model.model.decoder.remat = "full"
    # The barrier keeps the compiler from merging the second computation with the first.
    assert "optimization_barrier" in gradients.lower(model).as_text()
    for got, want in zip(jax.tree.leaves(gradients(model)), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_changing_the_form_never_holds_two_copies(scan_layers, monkeypatch):
    """Memory holds at most the model and one more stacked leaf. Afterwards the old arrays are deleted."""
    shape: dict[str, Any] = dict(hidden_size=128, num_hidden_layers=16, num_attention_heads=4, ffn_dim=512)
    config = OPTConfig(vocab_size=8, max_position_embeddings=8, **shape)
    model = OPTForCausalLM(config, rngs=nnx.Rngs(0), scan_layers=scan_layers)
    gc.collect()
    others = live_bytes() - (size := sum(value.nbytes for value in values(model).values()))
    seen = []

    def watch(function):
        def watched(*args):
            result = function(*args)
            seen.append(live_bytes() - others)
            return result

        return watched

    monkeypatch.setattr(stacking, "_stacked", watch(stacking._stacked))
    monkeypatch.setattr(decoder, "_slice", watch(decoder._slice))
    (unstack_layers if scan_layers else stack_layers)(model)
    largest = 16 * 128 * 512 * 4
    assert len(seen) >= 16 and max(seen) <= size + largest
    assert live_bytes() - others == size


def live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.combinations
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", SMALL)
def test_both_forms_compute_the_same(name, padding):
    model, inputs = our_model(name), batch(name, padding)
    options = dict(output_hidden_states=True, output_attentions=True)
    separate = model.forward(**inputs, **options)
    scanned = stack_layers(model).forward(**inputs, **options)
    assert jax.tree.structure(separate) == jax.tree.structure(scanned)
    for a, b in zip(jax.tree.leaves(separate), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
