"""Our models against `transformers`' PyTorch ones, the same random weights: outputs, losses, gradients.

Ours compute in float32, PyTorch's in float64, so that its own rounding errors do not matter. Where the mask is 1,
outputs agree within 1e-4 of the largest value. Gradients agree within 1e-4 of their norm, plus the rounding errors of
their summands (`oracle.summands`).
"""

from functools import cache
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
import limits
import numpy as np
import oracle
import pytest
from limits import TOLERANCE, gradient_limit, within
from oracle import canonical, canonical_path, make_exact_pair, make_hf, summands, to_numpy, torch, transformers
from reference import CONFIGS, PADDINGS, SMALL, batch, f32, i32

from opt_jax import named_parameters, unstack_layers
from opt_jax.config import ACTIVATIONS
from opt_jax.model.inputs import check_inputs
from opt_jax.model.outputs import cross_entropy

EVERYTHING = dict(output_hidden_states=True, output_attentions=True)


@cache
def pair(name, cls="OPTForCausalLM", **config: Any):
    """A pair of models with two layers, because the number of heads is three. Tests of a head take one layer."""
    return make_exact_pair(name, cls, **dict[str, Any](num_hidden_layers=2) | config)


def loss_of_output(output, inputs):
    return output.loss


def loss_and_output(model, inputs, loss=loss_of_output):
    output = model.forward(**inputs, **EVERYTHING)
    return loss(output, inputs), output


# Operation by operation, which compiles nothing for shapes that another test has used. (The goldens test plain calls.)
eager = jax.value_and_grad(loss_and_output, has_aux=True)
# For small models optimising takes longer than it saves.
jitted = jax.jit(eager, static_argnums=2, compiler_options={"xla_backend_optimization_level": 0})


def call(model, **inputs):
    """`model(**inputs)`, operation by operation."""
    return model.forward(**check_inputs(model, inputs))


def inputs_of(name, padding, **kwargs):
    """(inputs, boolean mask). Without padding the inputs have no mask."""
    inputs = batch(name, padding, **kwargs)
    mask = inputs["attention_mask"] == 1
    if padding == "none":
        del inputs["attention_mask"]
    return inputs, mask


def masked_inputs_of(name, padding, *removed):
    """(inputs, boolean mask). The inputs always have a mask, and lack `removed`."""
    inputs = batch(name, padding)
    for key in removed:
        del inputs[key]
    return inputs, inputs["attention_mask"] == 1


def assert_close(got, expected, mask=..., what=""):
    expected = to_numpy(expected)[mask]
    limits.assert_close(np.asarray(got)[mask], expected, TOLERANCE * np.abs(expected).max(), what=what)


def assert_states_close(got, expected, mask):
    """All hidden states and attentions agree where `mask` is true."""
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_close(a, b, mask, "hidden states")
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert_close(np.asarray(a).transpose(0, 2, 1, 3), b.transpose(1, 2), mask, "attentions")


def assert_gradients_close(gradients, hf, sizes):
    """All gradients agree.

    Args:
      gradients: a model of gradients, with separate or stacked layers.
      hf: the PyTorch model after `backward`.
      sizes: its `summands`.
    """
    got = {path: np.asarray(p.get_value()) for path, p in named_parameters(unstack_layers(gradients)).items()}
    expected = canonical({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in hf.named_parameters()})
    sizes = {canonical_path(name)[0]: size for name, size in sizes.items()}
    assert got.keys() == expected.keys()
    assert all(np.isfinite(g).all() for g in expected.values())
    for path, g in expected.items():
        within(np.linalg.norm(got[path] - g), gradient_limit(g, sizes[path]), path)


def check(hf, model, inputs, mask, our_loss=loss_of_output, their_loss=loss_of_output, run=eager):
    """Compare loss, hidden states, attentions, and the gradients of the given losses. Returns both outputs."""
    hf.zero_grad()
    with summands(hf) as sizes, oracle.relu_inputs(hf) as values:
        expected = oracle.run(hf, inputs, **EVERYTHING)
    their_loss(expected, inputs).backward()
    (_, got), gradients = run(model, {k: jnp.asarray(v) for k, v in inputs.items()}, our_loss)
    assert_close(got.loss, expected.loss, what="loss")
    assert_states_close(got, expected, mask)
    oracle.assert_no_relu_near_zero(values, mask)
    assert_gradients_close(gradients, hf, sizes)
    return got, expected


@pytest.mark.combinations
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", SMALL)
def test_causal_lm(name, padding):
    inputs, mask = inputs_of(name, padding)
    got, expected = check(*pair(name), inputs, mask)
    assert_close(got.logits, expected.logits, mask)


@pytest.mark.combinations
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", SMALL)
def test_causal_lm_scanned(name, padding):
    """Stacked layers, compiled. Without padding the mask is all ones."""
    inputs, mask = masked_inputs_of(name, padding)
    got, expected = check(*pair(name, scan_layers=True), inputs, mask, run=jitted)
    assert_close(got.logits, expected.logits, mask)


@pytest.mark.slow
def test_real_125m_size():
    """One row for each padding. With this seed no input of a ReLU is near 0."""
    kinds = [batch("real-125m", padding, length=8, seed=REAL_SEED) for padding in PADDINGS]
    inputs = {key: np.stack([kind[key][row] for row, kind in enumerate(kinds)]) for key in kinds[0]}
    mask = inputs["attention_mask"] == 1
    got, expected = check(*make_exact_pair("real-125m", scan_layers=True), inputs, mask, run=jitted)
    assert_close(got.logits, expected.logits, mask)


REAL_SEED = 52


@pytest.mark.combinations
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", SMALL)
def test_base_model(name, padding):
    hf, model = pair(name, "OPTModel")
    inputs, mask = inputs_of(name, padding)
    del inputs["labels"]
    expected = oracle.run(hf, inputs, **EVERYTHING)
    got = call(model, **inputs, **EVERYTHING)
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


# The choice of the loss does not depend on the decoder, nor the decoder's gradients on the loss. So each loss is tested
# once, and each model twice.
@pytest.mark.parametrize(("problem", "name"), list(zip(CLASSIFICATION, cycle(SMALL), strict=False)))
def test_classification(name, problem):
    problem_type, num_labels, labels = CLASSIFICATION[problem]
    config = dict(problem_type=problem_type, num_labels=num_labels, num_hidden_layers=1)
    hf, model = pair(name, "OPTForSequenceClassification", **config)
    for padding in PADDINGS:
        inputs, mask = masked_inputs_of(name, padding, "labels")
        got, expected = check(hf, model, inputs | dict(labels=labels), mask)
        assert_close(got.logits, expected.logits)


def test_classification_pools_as_hf():
    """The last token is known by its id, not by the mask. Embeddings: the last column. A row of pads: column 0."""
    hf, model = pair("opt-125m", "OPTForSequenceClassification")
    ids = i32([[5, 6, 7, 8] * 2 + [9, 9], [1, 1, 5, 1] * 2 + [1, 1], [5] + [1] * 9])
    more = i32([[1] * 10, [1, 5, 6, 7] * 2 + [1, 5], [7] * 10])
    for rows in (ids, more):
        for mask in (np.ones_like(ids), i32([[1, 1, 0, 0, 0] * 2] * 3)):
            inputs = dict(input_ids=rows, attention_mask=mask)
            assert_close(call(model, **inputs).logits, oracle.run(hf, inputs).logits)
    embeds = dict(inputs_embeds=np.random.RandomState(0).randn(3, 10, 24).astype(np.float32))
    assert_close(call(model, **embeds).logits, oracle.run(hf, embeds).logits)
    hf, model = pair("opt-125m", "OPTForSequenceClassification", pad_token_id=None)
    assert_close(call(model, input_ids=ids[1:2]).logits, oracle.run(hf, dict(input_ids=ids[1:2])).logits)


# Row r of the padded batches has 10 - 3 r real tokens. Positions from 10 on are ignored, negative ones count as 0.
ANSWERS = {"inside": ([0, 5, 9], [3, 6, 8]), "outside": ([-4, 10, 7], [99, -1, 8]), "[B, 1]": ([[4], [5], [9]],) * 2}


# In PyTorch too, the gradient of the scores of a row without visible keys depends on the backend. So with left padding,
# the loss whose gradients are compared leaves pads out of its normalisation, on both sides.
def our_visible_loss(output, inputs):
    masked = jnp.where(inputs["attention_mask"] == 1, output.start_logits, -1e9) + output.end_logits
    return cross_entropy(masked, inputs["start_positions"].reshape(-1).clip(0, 10), ignore_index=10)


def their_visible_loss(output, inputs):
    pads = torch.from_numpy(inputs["attention_mask"] == 0)
    answers = torch.from_numpy(inputs["start_positions"]).long().reshape(-1).clamp(0, 10)
    return torch.nn.functional.cross_entropy(
        output.start_logits.masked_fill(pads, -1e9) + output.end_logits, answers, ignore_index=10
    )


# The shape of the positions does not concern the decoder, so [B, 1] is tested with one model.
@pytest.mark.combinations
@pytest.mark.parametrize(
    ("name", "answers"),
    [(name, answers) for name in SMALL for answers in ANSWERS if name == "opt-350m" or answers != "[B, 1]"],
)
@pytest.mark.parametrize("padding", PADDINGS)
def test_question_answering(name, padding, answers):
    hf, model = pair(name, "OPTForQuestionAnswering", num_hidden_layers=1)
    inputs, mask = masked_inputs_of(name, padding, "labels")
    inputs |= dict(zip(["start_positions", "end_positions"], i32(ANSWERS[answers]), strict=True))
    losses = (our_visible_loss, their_visible_loss) if padding == "left" else ()
    got, expected = check(hf, model, inputs, mask, *losses)
    assert_close(got.start_logits, expected.start_logits, mask)
    assert_close(got.end_logits, expected.end_logits, mask)


@pytest.mark.combinations
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_position_ids(name, padding):
    hf, model = pair(name)
    inputs, mask = inputs_of(name, padding)
    random = np.random.RandomState(1)
    inputs["position_ids"] = random.randint(0, 64, mask.shape).astype(np.int32)
    del inputs["labels"]
    assert_close(call(model, **inputs).logits, oracle.run(hf, inputs).logits, mask)


@pytest.mark.combinations
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("padding", PADDINGS)
def test_inputs_embeds(name, padding):
    hf, model = pair(name)
    inputs, mask = masked_inputs_of(name, padding, "input_ids")
    shape = (*mask.shape, CONFIGS[name].embed_dim)
    inputs["inputs_embeds"] = np.random.RandomState(1).standard_normal(shape).astype(np.float32)
    got, expected = check(hf, model, inputs, mask)
    assert_close(got.logits, expected.logits, mask)


def test_logits_to_keep():
    hf, model = pair("opt-350m")
    ids = batch("opt-350m")["input_ids"]
    assert_close(
        call(model, input_ids=ids, logits_to_keep=2).logits,
        oracle.run(hf, dict(input_ids=ids), logits_to_keep=2).logits,
    )


@pytest.mark.combinations
@pytest.mark.parametrize("pad", [1, 7, None])
@pytest.mark.parametrize("tied", [True, False])
def test_padding_idx_gradient(pad, tied):
    """A lookup of the pad id gives its row no gradient, even where the mask counts it as a token. A tied head does."""
    hf, model = pair("opt-125m", num_hidden_layers=1, pad_token_id=pad, tie_word_embeddings=tied)
    inputs, mask = inputs_of("opt-125m", "none")
    inputs["input_ids"][:, 2:6] = [1, 7, 1, 5]
    check(hf, model, inputs, mask)
    row = hf.model.decoder.embed_tokens.weight.grad[7]
    assert (row.abs().max() == 0) == (pad == 7 and not tied)  # so the oracle follows this rule


ONE_BY_ONE = "prefill, then one by one"
CHUNKS = {ONE_BY_ONE: [4, 1, 1, 1, 1, 1, 1], "four into a non-empty cache": [4, 4, 1, 1], "all": [10]}
MASK_FORMS = ("none", "new tokens", "past and new tokens")


# All layers use the cache alike. So one model is tested with all forms of a call, the others with one form.
@pytest.mark.parametrize(
    ("name", "mask_form", "chunks"),
    [("opt-350m", mask_form, chunks) for mask_form in MASK_FORMS for chunks in CHUNKS]
    + [(name, "new tokens", ONE_BY_ONE) for name in SMALL if name != "opt-350m"],
)
def test_cache(name, mask_form, chunks):
    """In chunks, against HF's cache. With a mask, rows are left-padded. Our cache needs the mask of new tokens only."""
    hf, model = pair(name)
    inputs, mask = inputs_of(name, "none" if mask_form == "none" else "left")
    ids = inputs["input_ids"]
    cache, past, start = model.init_cache(3, 12), transformers.DynamicCache(), 0
    for size in CHUNKS[chunks]:
        stop = start + size
        theirs, ours = {}, {}
        if mask_form != "none":
            theirs["attention_mask"] = mask[:, :stop].astype(np.int64)
            ours["attention_mask"] = mask[:, start if mask_form == "new tokens" else 0 : stop]
        with torch.no_grad():
            expected = oracle.run(hf, dict(input_ids=ids[:, start:stop]) | theirs, cache=past, use_cache=True)
        got = call(model, input_ids=ids[:, start:stop], cache=cache, **ours)
        where = mask[:, start:stop]
        if where.any():
            assert_close(got.logits, expected.logits, where)
        past, cache, start = expected.cache, got.cache, stop
    np.testing.assert_array_equal(cache.next_position, mask.sum(1))
    np.testing.assert_array_equal(cache.valid[:, :10], mask)
    for layer in range(2):
        theirs = to_numpy(past.layers[layer].keys).transpose(0, 2, 1, 3)[mask]
        ours = np.asarray(cache.k[layer][:, :, :10]).transpose(0, 2, 1, 3)[mask]
        limits.assert_close(ours, theirs, TOLERANCE * np.abs(theirs).max(), what="keys")


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
    hf, model = pair("opt-125m", **FIELDS[field])
    inputs, mask = inputs_of("opt-125m", "left")
    got, expected = loss_and_output(model, inputs)[1], oracle.run(hf, inputs)
    assert_close(got.logits, expected.logits, mask)
    assert_close(got.loss, expected.loss)


@pytest.mark.combinations
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SMALL)
def test_half_precision(name, dtype):
    """Our error is at most that of twice the roundings of the reference, which rounds each result once.

    Squares of independent errors add up, so the sum of squares counts roundings. A LayerNorm in half precision, for
    example, exceeds the limit.
    """
    hf, model = oracle.make_pair(name, dtype=dtype, num_hidden_layers=2)
    hf = hf.double()
    ours = theirs = 0.0
    for seed in range(2):
        inputs, mask = inputs_of(name, "left", rows=9, seed=seed)
        del inputs["labels"]
        with torch.no_grad():
            exact, rounded = (to_numpy(oracle.run(hf, inputs, to).logits)[mask] for to in (None, dtype))
        ours += np.square(np.asarray(call(model, **inputs).logits)[mask] - exact).sum()
        theirs += np.square(rounded - exact).sum()
    within(max(ours - theirs, 0), theirs, "half precision")


def test_oracle_is_what_it_says():
    """Its attention is eager, its head is tied as the config says, and no parameter has its initial value."""
    for name in SMALL:
        hf = make_hf(name)
        assert hf.config._attn_implementation == "eager" and not hf.training
        assert (hf.lm_head.weight is hf.model.decoder.embed_tokens.weight) == CONFIGS[name].tie_word_embeddings
        for path, p in hf.named_parameters():
            assert p.std() > 0.05, path


def test_limits_are_narrow(monkeypatch):
    """A gradient that is off by a thousandth fails, and so does one that should be zero and is not."""
    monkeypatch.setattr(limits, "RATIOS", None)
    hf, model = pair("opt-350m")
    inputs, _ = inputs_of("opt-350m", "left")
    hf.zero_grad()
    with summands(hf) as sizes:
        oracle.run(hf, inputs).loss.backward()
    gradients = eager(model, inputs)[1]
    for path, p in named_parameters(gradients).items():
        right = p.get_value()
        p.set_value(right + 1e-4 if path.endswith("k_proj.bias") else right * 1.001)
        with pytest.raises(AssertionError, match=path):
            assert_gradients_close(gradients, hf, sizes)
        p.set_value(right)
    assert_gradients_close(gradients, hf, sizes)


def test_the_exact_oracle_computes_nothing_in_float32():
    """Gradients that are zero in theory are as small as in float64, though their summands are not."""
    hf, _ = pair("opt-125m")
    with summands(hf) as sizes:
        oracle.run(hf, batch("opt-125m", "left")).loss.backward()
    for name, p in hf.named_parameters():
        if name.endswith("k_proj.bias"):
            assert 0 < p.grad.norm() < 1e-13 * sizes[name]
        else:
            assert 1e-3 * sizes[name] < p.grad.norm() <= sizes[name], name
