"""Our models against `transformers`' PyTorch ones, float32, the same random weights: outputs, losses, gradients.

Outputs agree within 1e-4 of the largest value where the mask is 1 (what a pad computes is nobody's business); gradients
within 1e-4 of their norm, or of a thousandth of the norm of all gradients where they vanish (`k_proj.bias`, in theory).
"""

from contextlib import contextmanager
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import canonical, make_hf, make_pair, to_numpy, torch, torch_inputs, transformers
from reference import CONFIGS, PADDINGS, SMALL, batch, f32, i32

from opt_jax import named_parameters, stack_layers, unstack_layers
from opt_jax.config import ACTIVATIONS
from opt_jax.inputs import check_inputs
from opt_jax.outputs import cross_entropy

TOLERANCE = 1e-4
pair = lru_cache(maxsize=None)(make_pair)


def loss_and_output(model, inputs):
    output = model.forward(**inputs, output_hidden_states=True, output_attentions=True)
    return output.loss, output


# Operation by operation: nothing to compile once another test has used the same shapes. (The goldens test plain calls.)
eager = jax.value_and_grad(loss_and_output, has_aux=True)
# Optimising the machine code takes longer than models this small can win back.
jitted = jax.jit(eager, compiler_options={"xla_backend_optimization_level": 0})


def call(model, **inputs):
    """`model(**inputs)`, not compiled."""
    return model.forward(**check_inputs(model, inputs))


def inputs_of(name, padding, **kwargs):
    """Inputs and the boolean mask; without padding no mask is among the inputs."""
    inputs = batch(name, padding, **kwargs)
    mask = inputs["attention_mask"] == 1
    if padding == "none":
        del inputs["attention_mask"]
    return inputs, mask


def assert_close(got, expected, mask=...):
    got, expected = np.asarray(got)[mask], to_numpy(expected)[mask]
    assert got.shape == expected.shape
    assert np.isfinite(expected).all()
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def assert_states_close(got, expected, mask):
    """Every hidden state and attention, where `mask`."""
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_close(a, b, mask)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert_close(a.transpose(0, 2, 1, 3), b.transpose(1, 2), mask)


def assert_gradients_close(gradients, hf):
    """`gradients`: a model of gradients, layers in either form; `hf`: the PyTorch model after `backward`."""
    got = {path: np.asarray(p.get_value()) for path, p in named_parameters(unstack_layers(gradients)).items()}
    expected = canonical({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in hf.named_parameters()})
    assert got.keys() == expected.keys()
    assert all(np.isfinite(g).all() for g in expected.values())
    total = np.sqrt(sum(np.square(g).sum() for g in expected.values()))
    for path, g in expected.items():
        error, limit = np.linalg.norm(got[path] - g), TOLERANCE * max(np.linalg.norm(g), 1e-3 * total)
        assert error <= limit, (path, error, limit)


def check(hf, model, inputs, mask, run=eager):
    """Loss, hidden states, attentions and gradients; returns both outputs."""
    hf.zero_grad()
    expected = hf(**torch_inputs(inputs), output_hidden_states=True, output_attentions=True)
    expected.loss.backward()
    (loss, got), gradients = run(model, {k: jnp.asarray(v) for k, v in inputs.items()})
    assert_close(loss, expected.loss)
    assert_states_close(got, expected, mask)
    assert_gradients_close(gradients, hf)
    return got, expected


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", SMALL)
def test_causal_lm(name, padding):
    inputs, mask = inputs_of(name, padding)
    got, expected = check(*pair(name), inputs, mask)
    assert_close(got.logits, expected.logits, mask)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", SMALL)
def test_causal_lm_scanned(name, padding):
    """One stacked layer, compiled; all ones for a mask where there is no padding."""
    inputs = batch(name, padding)
    mask = inputs["attention_mask"] == 1
    got, expected = check(*pair(name, scan_layers=True), inputs, mask, jitted)
    assert_close(got.logits, expected.logits, mask)


# Where a ReLU's input is so near 0 that rounding decides its sign, float32 gradients agree with nobody's, PyTorch's in
# float64 included. These seeds give ids without such inputs.
REAL_SEEDS = {"none": 56, "left": 31, "right": 56}


@pytest.mark.slow
def test_real_125m_size():
    hf, model = make_pair("real-125m")
    for padding in PADDINGS:
        inputs = batch("real-125m", padding, rows=2, length=8, seed=REAL_SEEDS[padding])
        mask = inputs["attention_mask"] == 1
        with relu_inputs(hf) as values:
            got, expected = check(hf, model, inputs, mask, jitted)
        assert_close(got.logits, expected.logits, mask)
        assert min(x.view(*mask.shape, -1)[torch.from_numpy(mask)].abs().min() for x in values) > 5e-6


@contextmanager
def relu_inputs(hf):
    values = []
    hooks = [layer.fc1.register_forward_hook(lambda *args: values.append(args[2])) for layer in hf.model.decoder.layers]
    yield values
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", SMALL)
def test_base_model(name, padding):
    hf, model = pair(name, "OPTModel")
    inputs, mask = inputs_of(name, padding)
    del inputs["labels"]
    expected = hf(**torch_inputs(inputs), output_hidden_states=True, output_attentions=True)
    got = call(model, **inputs, output_hidden_states=True, output_attentions=True)
    assert_close(got.last_hidden_state, expected.last_hidden_state, mask)
    assert_states_close(got, expected, mask)


CLASSIFICATION = {  # problem_type, num_labels, labels of three rows
    "regression": ("regression", 1, f32([0.5, -1.0, 2.0])),
    "regression of 3": ("regression", 3, f32([[0.5, -1.0, 2.0], [1, 2, 3], [0, 0, 1]])),
    "single label": ("single_label_classification", 4, i32([3, 0, 1])),
    "single label, one not counted": ("single_label_classification", 4, i32([3, -100, 1])),
    "multi label": ("multi_label_classification", 4, f32([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])),
    "unset: regression": (None, 1, f32([[0.5], [-1.0], [2.0]])),
    "unset: single label": (None, 4, i32([3, 0, 1])),
    "unset: multi label": (None, 4, f32([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])),
}
MAIN = ("regression", "single label", "multi label")


# How the loss is chosen does not depend on the decoder: the variants with one model only.
@pytest.mark.parametrize(
    ("name", "problem"),
    [(name, problem) for name in SMALL for problem in CLASSIFICATION if name == "opt-125m" or problem in MAIN],
)
def test_classification(name, problem):
    problem_type, num_labels, labels = CLASSIFICATION[problem]
    hf, model = make_pair(name, "OPTForSequenceClassification", problem_type=problem_type, num_labels=num_labels)
    for padding in PADDINGS:
        inputs, mask = inputs_of(name, padding)
        got, expected = check(hf, model, inputs | dict(labels=labels), mask)
        assert_close(got.logits, expected.logits)


def test_classification_pools_as_hf():
    """By id, whatever the mask says; the last column for embeddings; column 0 where all ids are pads."""
    hf, model = pair("opt-125m", "OPTForSequenceClassification")
    ids = i32([[5, 6, 7, 8], [1, 1, 5, 1], [5, 1, 1, 1], [1, 1, 1, 1], [1, 5, 6, 7]])
    for mask in (np.ones_like(ids), i32([[1, 1, 0, 0]] * 5)):
        inputs = dict(input_ids=ids, attention_mask=mask)
        assert_close(call(model, **inputs).logits, hf(**torch_inputs(inputs)).logits)
    embeds = dict(inputs_embeds=np.random.RandomState(0).randn(2, 4, 24).astype(np.float32))
    assert_close(call(model, **embeds).logits, hf(**torch_inputs(embeds)).logits)
    hf, model = make_pair("opt-125m", "OPTForSequenceClassification", pad_token_id=None)
    assert_close(call(model, input_ids=ids[1:2]).logits, hf(torch.tensor(ids[1:2])).logits)


# Row r of the padded batches has 10 - 3 r real tokens. 10 and above is past the end (not counted), below 0 counts as 0.
ANSWERS = {"inside": ([0, 5, 9], [3, 6, 8]), "outside": ([-4, 10, 7], [99, -1, 8]), "[B, 1]": ([[4], [5], [9]],) * 2}


@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", SMALL)
def test_question_answering(name, padding, answers):
    hf, model = pair(name, "OPTForQuestionAnswering")
    inputs, mask = inputs_of(name, padding)
    inputs |= dict(zip(["start_positions", "end_positions"], i32(ANSWERS[answers]), strict=True))
    del inputs["labels"]
    if padding != "left":
        got, expected = check(hf, model, inputs, mask)
    else:
        # The gradient that a row without any visible key sends into its scores differs by backend within PyTorch too,
        # so the loss whose gradients are compared leaves the pads out of the normalisation, on both sides.
        answer = torch.from_numpy(inputs["start_positions"]).long().reshape(-1).clamp(0, 10)
        hf.zero_grad()
        expected = hf(**torch_inputs(inputs), output_hidden_states=True, output_attentions=True)
        masked = expected.start_logits.masked_fill(torch.from_numpy(~mask), -1e9) + expected.end_logits
        torch.nn.functional.cross_entropy(masked, answer, ignore_index=10).backward()

        def loss(model):
            got = model.forward(**inputs, output_hidden_states=True, output_attentions=True)
            masked = jnp.where(mask, got.start_logits, -1e9) + got.end_logits
            return cross_entropy(masked, answer.numpy(), ignore_index=10), got

        gradients, got = jax.grad(loss, has_aux=True)(model)
        assert_gradients_close(gradients, hf)
        assert_close(got.loss, expected.loss)
        assert_states_close(got, expected, mask)
    assert_close(got.start_logits, expected.start_logits, mask)
    assert_close(got.end_logits, expected.end_logits, mask)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_position_ids(name, padding):
    hf, model = pair(name)
    inputs, mask = inputs_of(name, padding)
    random = np.random.RandomState(1)
    inputs["position_ids"] = random.randint(0, 64, mask.shape).astype(np.int32)
    del inputs["labels"]
    assert_close(call(model, **inputs).logits, hf(**torch_inputs(inputs)).logits, mask)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("padding", PADDINGS)
def test_inputs_embeds(name, padding):
    hf, model = pair(name)
    inputs, mask = inputs_of(name, padding)
    shape = (*mask.shape, CONFIGS[name].embed_dim)
    inputs["inputs_embeds"] = np.random.RandomState(1).standard_normal(shape).astype(np.float32)
    del inputs["input_ids"]
    got, expected = check(hf, model, inputs, mask)
    assert_close(got.logits, expected.logits, mask)


def test_logits_to_keep():
    hf, model = pair("opt-350m")
    ids = batch("opt-350m")["input_ids"]
    assert_close(call(model, input_ids=ids, logits_to_keep=2).logits, hf(torch.tensor(ids), logits_to_keep=2).logits)


@pytest.mark.parametrize("pad", [1, 7, None])
@pytest.mark.parametrize("tied", [True, False])
def test_padding_idx_gradient(pad, tied):
    """Looking up the pad id gives its row no gradient, though it may count as a token; the tied head does."""
    hf, model = make_pair("opt-125m", pad_token_id=pad, tie_word_embeddings=tied)
    inputs, mask = inputs_of("opt-125m", "none")
    inputs["input_ids"][:, 2:6] = [1, 7, 1, 5]
    check(hf, model, inputs, mask)
    row = hf.model.decoder.embed_tokens.weight.grad[7]
    assert (row.abs().max() == 0) == (pad == 7 and not tied)  # the oracle does have the rule


CHUNKS = {"prefill, then one by one": [4, 1, 1, 1, 1, 1, 1], "several into a non-empty cache": [3, 4, 3], "all": [10]}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("mask_form", ["none", "new tokens", "past and new tokens"])
@pytest.mark.parametrize("name", SMALL)
def test_cache(name, mask_form, chunks):
    """Chunk by chunk against HF's cache. Left-padded where there is a mask; our cache needs the new tokens' only."""
    hf, model = pair(name)
    inputs, mask = inputs_of(name, "none" if mask_form == "none" else "left")
    ids = inputs["input_ids"]
    cache, past, start = model.init_cache(3, 12), transformers.DynamicCache(), 0
    for size in CHUNKS[chunks]:
        stop = start + size
        theirs, own = {}, {}
        if mask_form != "none":
            theirs["attention_mask"] = torch.from_numpy(mask[:, :stop].astype(np.int64))
            own["attention_mask"] = mask[:, start if mask_form == "new tokens" else 0 : stop]
        with torch.no_grad():
            expected = hf(torch.tensor(ids[:, start:stop]), cache=past, use_cache=True, **theirs)
        got = call(model, input_ids=ids[:, start:stop], cache=cache, **own)
        where = mask[:, start:stop]
        if where.any():
            assert_close(got.logits, expected.logits, where)
        past, cache, start = expected.cache, got.cache, stop
    np.testing.assert_array_equal(cache.next_position, mask.sum(1))
    np.testing.assert_array_equal(cache.valid[:, :10], mask)
    for layer in range(3):
        theirs = to_numpy(past.layers[layer].keys).transpose(0, 2, 1, 3)[mask]
        own = np.asarray(cache.k[layer][:, :, :10]).transpose(0, 2, 1, 3)[mask]
        np.testing.assert_allclose(own, theirs, atol=TOLERANCE * np.abs(theirs).max())


FIELDS = {
    "_remove_final_layer_norm": dict(_remove_final_layer_norm=True),
    "post-norm": dict(do_layer_norm_before=False),
    "projections without final norm": dict(word_embed_proj_dim=16, _remove_final_layer_norm=True),
    "no biases": dict(enable_bias=False),
    "no affine norms": dict(layer_norm_elementwise_affine=False, do_layer_norm_before=False),
    "one head": dict(num_attention_heads=1),
    "scale that is no power of two": dict(num_attention_heads=2),
    **{name: dict(activation_function=name) for name in ACTIVATIONS},
}


@pytest.mark.parametrize("field", FIELDS)
def test_config_fields(field):
    hf, model = make_pair("opt-125m", **FIELDS[field])
    inputs, mask = inputs_of("opt-125m", "left")
    got, expected = loss_and_output(model, inputs)[1], hf(**torch_inputs(inputs), output_hidden_states=True)
    assert_close(got.logits, expected.logits, mask)
    assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SMALL)
def test_half_precision(name, dtype):
    """No further from the float32 result than PyTorch in the same precision (times two, for chance)."""
    inputs, mask = inputs_of(name, "left")
    del inputs["labels"]
    with torch.no_grad():
        exact = to_numpy(pair(name)[0](**torch_inputs(inputs)).logits)[mask]
        hf, model = make_pair(name, dtype=dtype)
        theirs = to_numpy(hf(**torch_inputs(inputs)).logits)[mask]
    got = np.asarray(call(model, **inputs).logits)[mask]
    assert np.linalg.norm(got - exact) <= 2 * np.linalg.norm(theirs - exact)


def test_stacking_gradients_matches_separate_ones():
    """The two forms are one model: the scanned gradients, unstacked, are the separate gradients."""
    _, model = make_pair("opt-350m")
    inputs, _ = inputs_of("opt-350m", "left")
    separate = named_parameters(eager(model, inputs)[1])
    scanned = named_parameters(unstack_layers(eager(stack_layers(model), inputs)[1]))
    assert separate.keys() == scanned.keys()
    for path, p in separate.items():
        np.testing.assert_allclose(p.get_value(), scanned[path].get_value(), atol=1e-5)


def test_oracle_is_what_it_says():
    """The reference computes eagerly, tied as the config says, with no parameter left at its initial value."""
    for name in SMALL:
        hf = make_hf(name)
        assert hf.config._attn_implementation == "eager" and not hf.training
        assert (hf.lm_head.weight is hf.model.decoder.embed_tokens.weight) == CONFIGS[name].tie_word_embeddings
        for path, p in hf.named_parameters():
            assert p.std() > 0.05, path
