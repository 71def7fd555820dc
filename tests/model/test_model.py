"""The models: each field has an effect, pads never matter, both forms agree. Parity with PyTorch: tests/parity."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import CLASSES, CONFIGS, SMALL, batch, f32, i32, our_model, unset_model, values
from support.small_models import count

import opt_jax
from opt_jax import OPTConfig, OPTForCausalLM, named_parameters, stack_layers, unstack_layers
from opt_jax.config import _SIZES
from opt_jax.model.attention import DropoutKey, dropout
from opt_jax.model.heads import OPTPreTrainedModel

IDS = batch("opt-125m")["input_ids"]
QUIET: dict[str, Any] = dict(dropout=0.0, attention_dropout=0.0, layerdrop=0.0)


# --- each field of the configuration changes what it should ---

BASE = {"pooled", "classification loss"}
LM = {"logits", "training logits"}
# Field -> another value, and which of `observe`'s entries it changes.
EFFECTS = {
    "vocab_size": (110, {"parameters"} | LM),
    "hidden_size": (36, {"parameters"} | LM | BASE),
    "num_hidden_layers": (2, {"parameters"} | LM | BASE),
    "ffn_dim": (48, {"parameters"} | LM | BASE),
    "max_position_embeddings": (70, {"parameters"}),  # more rows, of which the same are read
    "do_layer_norm_before": (False, {"parameters"} | LM | BASE),
    "_remove_final_layer_norm": (True, {"parameters"} | LM | BASE),
    "word_embed_proj_dim": (16, {"parameters"} | LM | BASE),
    "dropout": (0.5, {"training logits"}),
    "attention_dropout": (0.5, {"training logits"}),
    "layerdrop": (0.5, {"training logits"}),
    "num_attention_heads": (4, LM | BASE),
    "activation_function": ("tanh", LM | BASE),
    "init_std": (0.1, {"initial std"}),
    "pad_token_id": (7, {"pad rows"} | BASE),
    "enable_bias": (False, {"parameters"} | LM | BASE),
    "layer_norm_elementwise_affine": (False, {"parameters"} | LM | BASE),
    "tie_word_embeddings": (False, {"parameters"} | LM),
    "num_labels": (5, BASE),
    "problem_type": ("multi_label_classification", {"classification loss"}),
}
NO_EFFECT_HERE = {
    "eos_token_id",  # for `generate`: test_options_have_effect.py
    "bos_token_id",  # for readers of the file: the tokenizer has its own
    "extra",  # written back unchanged; warnings about it: test_config.py
}


def observe(**config):
    settings = dict(QUIET, num_hidden_layers=1) | config
    model = our_model("opt-125m", **settings)
    ids = IDS.copy()
    ids[:, 7:] = [7, 1, 1]
    classifier = our_model("opt-125m", "OPTForSequenceClassification", **settings)
    labels = np.eye(3, 2, dtype=np.int32) if classifier.config.problem_type else i32([0, 1, 0])
    pooled = classifier.forward(ids, labels=labels)
    initial = values(OPTForCausalLM(model.config, rngs=nnx.Rngs(0)))
    return {
        "parameters": {path: value.shape for path, value in values(model).items()},
        "logits": model.forward(ids).logits,
        "training logits": model.forward(ids, dropout_key=jax.random.key(3)).logits,
        "initial std": round(float(initial["model.decoder.layers.0.fc2.kernel"].std()), 2),
        "pad rows": [i for i in (1, 7) if not initial["model.decoder.embed_tokens.embedding"][i].any()],
        "pooled": pooled.logits,
        "classification loss": pooled.loss,
    }


@pytest.fixture(scope="module")
def usual():
    return observe()


@pytest.mark.slow
@pytest.mark.parametrize("field", EFFECTS)
def test_field(field, usual):
    value, effects = EFFECTS[field]
    changed = set()
    for key, got in observe(**{field: value}).items():
        if isinstance(got, jax.Array):
            same = got.shape == usual[key].shape and np.allclose(got, usual[key], atol=1e-5)
        else:
            same = got == usual[key]
        changed |= set() if same else {key}
    assert changed == effects


def test_every_field_is_in_the_list():
    assert set(EFFECTS) | NO_EFFECT_HERE == {field.name for field in dataclasses.fields(OPTConfig)}


@pytest.mark.slow
def test_pads_start_at_zero_and_learn_nothing_from_lookups(usual):
    """As with torch's `padding_idx`. A tied head gives them gradients."""
    assert usual["pad rows"] == [1]
    ids = np.where(IDS % 2, 1, 7)
    for pad in (1, 7, None):
        for tied in (False, True):
            model = our_model("opt-125m", pad_token_id=pad, tie_word_embeddings=tied, num_hidden_layers=1)
            gradients = values(jax.jit(jax.grad(lambda model: model.forward(ids, labels=IDS).loss))(model))
            rows = gradients["model.decoder.embed_tokens.embedding"]
            assert [i for i in (1, 7) if not rows[i].any()] == ([pad] if pad and not tied else [])


def test_initial_values_are_hf_s():
    config = dataclasses.replace(CONFIGS["opt-350m"], tie_word_embeddings=False, init_std=0.3, vocab_size=500)
    for path, value in values(OPTForCausalLM(config, rngs=nnx.Rngs(0))).items():
        if path.endswith("bias"):
            assert not value.any()
        elif path.endswith("scale"):
            assert (value == 1).all()
        else:  # a normal distribution: its mean and its deviation within four standard errors
            value = np.delete(value, 1, axis=0) if path.endswith("embed_tokens.embedding") else value
            assert abs(value.mean()) < 4 * 0.3 / value.size**0.5, path
            assert abs(value.std() / 0.3 - 1) < 4 / (2 * value.size) ** 0.5, path
    drawn = values(OPTForCausalLM(config, rngs=nnx.Rngs(0)))
    first = [f"model.decoder.layers.{i}.self_attn.{p}_proj.kernel" for i in range(3) for p in "qkv"]
    assert len({drawn[path][0, 0].item() for path in first}) == 9  # all layers and modules differ


# --- dropout and layerdrop ---


def test_dropout_keeps_the_mean_and_zeroes_at_its_rate():
    x, key = jnp.full((10, 100, 100), 2.0), DropoutKey.of(jax.random.key(0), 10)
    dropped = np.asarray(dropout(x, 0.3, key))
    kept = dropped != 0
    assert abs(kept.mean() - 0.7) < 4 * (0.3 * 0.7 / x.size) ** 0.5
    np.testing.assert_allclose(dropped[kept], 2 / 0.7, rtol=1e-6)
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, key) is x


@pytest.mark.slow
@pytest.mark.parametrize("form", [stack_layers, unstack_layers])
def test_dropout_follows_its_key_and_differs_by_layer_and_row(form):
    model = form(our_model("opt-125m", dropout=0.5))
    ids = np.repeat(IDS[:1], 2, axis=0)

    @jax.jit
    def run(model, key):
        return model.forward(ids, output_hidden_states=True, dropout_key=key).hidden_states

    def states(key):
        return [np.asarray(x) for x in run(model, key)]

    a, again, b = states(jax.random.key(0)), states(jax.random.key(0)), states(jax.random.key(1))
    np.testing.assert_array_equal(a[-1], again[-1])
    assert (a[-1] != b[-1]).any() and (a[1][0] != a[1][1]).any()
    np.testing.assert_array_equal(a[0], b[0])  # no dropout on the embeddings
    # Where a layer's output is dropped, the residual stream is unchanged. These places differ between layers.
    model = form(our_model("opt-125m", dropout=0.5, enable_bias=False))
    a = states(jax.random.key(0))
    kept = [a[i + 1] != a[i] for i in range(2)]
    assert (kept[0] != kept[1]).any()


def test_the_dropouts_of_a_layer_are_independent():
    """A layer adds one twice, scaled by two where it is kept. So the sum is 0, 2 or 4."""
    model = our_model("opt-125m", dropout=0.5)
    for path, param in named_parameters(model).items():
        if ".out_proj." in path or ".fc2." in path:
            param.set_value(jnp.full_like(param.get_value(), path.endswith("bias")))
    states = model.forward(IDS, output_hidden_states=True, dropout_key=jax.random.key(0)).hidden_states
    added = np.round(np.asarray(states[1] - states[0]))
    assert (abs((added == np.array([0, 2, 4])[:, None, None, None]).mean((1, 2, 3)) - [0.25, 0.5, 0.25]) < 0.1).all()


def test_attention_dropout_acts_on_the_weights():
    model = our_model("opt-125m", **{**QUIET, "attention_dropout": 0.5})
    out = model.forward(IDS, output_attentions=True, dropout_key=jax.random.key(0))
    weights = np.asarray(out.attentions[0])[:, :, np.tri(10, dtype=bool)]
    assert abs((weights == 0).mean() - 0.5) < 4 * 0.5 / weights.size**0.5


@pytest.mark.parametrize("form", [stack_layers, unstack_layers])
def test_layerdrop_skips_whole_layers_at_its_rate(form):
    model = form(our_model("opt-350m", **{**QUIET, "layerdrop": 0.25}, _remove_final_layer_norm=True))

    @jax.jit
    @jax.vmap
    def skipped(key):
        states = jnp.stack(model.forward(IDS, output_hidden_states=True, dropout_key=key).hidden_states[:-1])
        same = states[1:] == states[:-1]
        return same.all((1, 2, 3)), same.any((1, 2, 3))

    all_skipped, any_skipped = skipped(jax.random.split(jax.random.key(0), 400))
    np.testing.assert_array_equal(all_skipped, any_skipped)  # for all rows and positions, or none
    rate = np.asarray(all_skipped).mean(0)
    assert rate.shape == (2,)  # hidden_states lacks the last layer's output
    assert (abs(rate - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5).all()
    both_skipped = all_skipped.all(1).mean()
    assert abs(both_skipped - 0.0625) < 4 * (0.0625 * 0.9375 / 400) ** 0.5  # independently


# --- full-size models ---

PUBLISHED = {"125m": 125239296, "350m": 331196416, "1.3b": 1315758080, "2.7b": 2651596800, "6.7b": 6658473984}


@pytest.mark.parametrize("size", _SIZES)
def test_full_size_models_build_abstractly(size, pytestconfig):
    """All classes and forms of the two architectures. The other sizes are only larger, so one form is enough."""
    config = OPTConfig.preset(size)
    every = size in ("125m", "350m") or pytestconfig.getoption("--exhaustive")
    for cls in CLASSES if every else ["OPTForCausalLM"]:
        for scan_layers in (True, False) if every and cls == "OPTForCausalLM" else [True]:
            build = getattr(opt_jax, cls)
            model = nnx.eval_shape(lambda b=build, s=scan_layers: b(config, rngs=nnx.Rngs(0), scan_layers=s))
            params = [param.get_value() for param in named_parameters(model).values()]
            assert all(isinstance(p, jax.ShapeDtypeStruct) for p in params)
            assert sum(p.size for p in params) == count(config, cls)
    assert size not in PUBLISHED or count(config, "OPTForCausalLM") == PUBLISHED[size]


# --- calling ---

LABELS = {
    "OPTModel": {},
    "OPTForCausalLM": dict(labels=IDS),
    "OPTForSequenceClassification": dict(labels=i32([0, 1, 1])),
    "OPTForQuestionAnswering": dict(start_positions=i32([0, 1, 2]), end_positions=i32([2, 3, 4])),
}


@pytest.mark.parametrize("form", [list, np.asarray, jnp.asarray, np.int64, np.uint8])
def test_input_forms(form):
    model = our_model("opt-125m")
    data = dict(input_ids=IDS, attention_mask=np.ones_like(IDS), labels=IDS, position_ids=IDS // 2)
    expected = model(**{k: jnp.asarray(v) for k, v in data.items()})
    got = model(**{k: form(v.tolist()) for k, v in data.items()})
    np.testing.assert_array_equal(got.logits, expected.logits)
    np.testing.assert_array_equal(got.loss, expected.loss)


@pytest.mark.slow
def test_plain_call_jit_and_forward_agree_and_differentiate():
    model = our_model("opt-350m", num_hidden_layers=1)
    inputs = batch("opt-350m", "left")
    plain = model(**inputs)
    jitted = jax.jit(lambda model, inputs: model(**inputs))(model, inputs)
    eager = model.forward(**inputs)
    for other in (jitted, eager):
        np.testing.assert_allclose(other.logits, plain.logits, atol=1e-5)
        np.testing.assert_allclose(other.loss, plain.loss, rtol=1e-6)
    a = values(jax.grad(lambda model: model(**inputs).loss)(model))
    b = values(jax.grad(lambda model: model.forward(**inputs).loss)(model))
    assert a.keys() == values(model).keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=1e-5)


def test_repeated_plain_calls_are_compiled_once():
    traced = []

    class Counted(OPTForCausalLM):
        def forward(self, *args, **kwargs):
            traced.append(1)
            return super().forward(*args, **kwargs)

    model, other = (Counted(CONFIGS["opt-125m"], rngs=nnx.Rngs(i)) for i in range(2))
    for m in (model, model, other):  # also another model of the same configuration
        for ids in (IDS, jnp.asarray(IDS + 0), IDS.tolist()):
            m(ids)
    assert len(traced) == 1
    for _ in range(2):
        model(IDS, output_attentions=True)
    assert len(traced) == 2
    cache = model(IDS, cache=model.init_cache(3, 16)).cache
    for _ in range(4):
        cache = model(IDS[:, :1], cache=cache).cache
    assert len(traced) == 4  # prefill, and one for all the steps


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["opt-350m", "untied"])
def test_dtypes(name, dtype, param_dtype):
    """The model computes in `dtype`. Logits and losses are always float32."""
    out = {}
    for cls in CLASSES:
        model = unset_model(dataclasses.replace(CONFIGS[name], num_hidden_layers=1), cls, dtype, param_dtype)
        assert {p.get_value().dtype for p in named_parameters(model).values()} == {jnp.dtype(param_dtype)}
        options = dict(output_hidden_states=True, output_attentions=True)
        out[cls] = jax.eval_shape(
            lambda model, labels=LABELS[cls], options=options: model.forward(
                IDS, cache=model.init_cache(3, 10), **options, **labels
            ),
            model,
        )
        inner = [*out[cls].hidden_states, *out[cls].attentions, *out[cls].cache.k, *out[cls].cache.v]
        assert {x.dtype for x in inner} == {jnp.dtype(dtype)}
        assert cls == "OPTModel" or out[cls].loss.dtype == jnp.float32
    assert out["OPTModel"].last_hidden_state.dtype == dtype
    heads = out["OPTForQuestionAnswering"]
    logits = [out["OPTForCausalLM"].logits, out["OPTForSequenceClassification"].logits]
    assert {x.dtype for x in (*logits, heads.start_logits, heads.end_logits)} == {jnp.dtype(jnp.float32)}


def test_what_was_not_asked_for_is_none():
    out = our_model("opt-125m").forward(IDS)
    assert (out.loss, out.hidden_states, out.attentions, out.cache) == (None,) * 4


def test_logits_to_keep():
    model = our_model("opt-125m")
    everything = model.forward(IDS).logits
    np.testing.assert_allclose(model.forward(IDS, logits_to_keep=2).logits, everything[:, -2:], atol=1e-6)
    assert model(IDS, logits_to_keep=np.int64(1)).logits.shape == (3, 1, 99)


def test_the_abstract_class_says_so():
    with pytest.raises(TypeError, match="use OPTModel or one of"):
        OPTPreTrainedModel(CONFIGS["opt-125m"], rngs=nnx.Rngs(0)).forward(IDS)


# --- pads, packing, pooling ---


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SMALL)
def test_pads_never_produce_nan(name, dtype):
    """Neither do rows of pads alone, and gradients neither."""
    model = our_model(name, dtype=dtype, num_hidden_layers=2)
    inputs = batch(name, "left")
    inputs["attention_mask"][1] = 0
    inputs["attention_mask"][2] = [1, 0] * 5  # holes
    inputs["input_ids"][1] = 1

    def loss(model, inputs):
        out = model.forward(**inputs, output_hidden_states=True, output_attentions=True)
        return out.loss, out

    # Also gradients in float16, which has the smallest range.
    run = jax.jit(jax.value_and_grad(loss, has_aux=True) if dtype == jnp.float16 else loss)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(model, inputs)))
    inputs["labels"] = np.full_like(inputs["labels"], -100)
    assert jax.tree.leaves(run(model, inputs))[0] == 0


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", SMALL)
def test_a_row_does_not_see_the_batch_or_its_padding(name, padding):
    model = our_model(name, num_hidden_layers=2)
    inputs = batch(name, padding)
    del inputs["labels"]
    mask = inputs["attention_mask"] == 1
    together = np.asarray(model.forward(**inputs).logits)
    inputs["input_ids"] = np.where(mask, inputs["input_ids"], 50)  # the ids of pads do not matter
    np.testing.assert_allclose(np.asarray(model.forward(**inputs).logits)[mask], together[mask], atol=1e-6)
    for row in range(3):
        alone = model.forward(inputs["input_ids"][row : row + 1, mask[row]]).logits[0]
        np.testing.assert_allclose(together[row, mask[row]], alone, atol=2e-5)


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("padded", [False, True])
def test_segments_are_separate_rows(name, padded):
    """Packed documents, one of them a single token, with and without pads between and after them."""
    model = our_model(name, num_hidden_layers=2)
    ids = np.concatenate([IDS[0], IDS[1]])[None]
    segments = np.repeat([[3, 0, 0, 5]], [7, 1, 4, 8], axis=1)  # 7, 5 and 8 tokens; numbers in any order
    segments[0, 7:8] = 9
    mask = np.ones_like(ids)
    if padded:
        mask[0, [5, 6, 18, 19]] = 0
    extra = dict(attention_mask=mask) if padded else {}
    packed = model.forward(ids, segment_ids=segments, **extra).logits[0]
    where = [(segments[0] == segment) & (mask[0] == 1) for segment in (3, 9, 0, 5)]
    rows, row_mask = np.ones((4, 10), np.int32), np.zeros((4, 10), np.int32)
    for row, at in enumerate(where):
        rows[row, : at.sum()], row_mask[row, : at.sum()] = ids[0, at], 1
    expected = model.forward(rows, attention_mask=row_mask).logits
    for row, at in enumerate(where):
        np.testing.assert_allclose(packed[at], expected[row, : at.sum()], atol=2e-5)


def test_position_ids_default_to_the_number_of_real_tokens_before():
    model = our_model("opt-125m")
    mask = i32([[0, 0, 1, 1, 1, 0, 1, 1, 0, 0]])
    position_ids = i32([[-1, -1, 0, 1, 2, -1, 3, 4, -1, -1]])
    expected = model.forward(IDS[:1], attention_mask=mask, position_ids=position_ids).logits
    np.testing.assert_array_equal(model.forward(IDS[:1], attention_mask=mask).logits, expected)
    shifted = model.forward(IDS[:1], attention_mask=mask, position_ids=position_ids + 1).logits
    assert np.abs(shifted - expected).max() > 0.01


def test_inputs_embeds_are_what_the_ids_look_up():
    for name in ("opt-125m", "opt-350m"):
        model = our_model(name)
        embeds = model.model.decoder.embed_tokens.embedding.get_value()[IDS]
        np.testing.assert_array_equal(model.forward(inputs_embeds=embeds).logits, model.forward(IDS).logits)


@pytest.mark.slow
def test_classification_pools_the_last_id_that_is_no_pad():
    model = our_model("opt-125m", "OPTForSequenceClassification", num_hidden_layers=1)
    base = our_model("opt-125m", "OPTModel", num_hidden_layers=1)
    ids = i32([[5, 6, 7, 8], [1, 1, 5, 1], [5, 1, 1, 1], [1, 1, 1, 1], [1, 5, 6, 7]])
    states = np.asarray(base.forward(ids).last_hidden_state)
    kernel = values(model)["score.kernel"]
    for mask in (None, i32([[1, 1, 0, 0]] * 5)):  # the mask makes no difference
        states = np.asarray(base.forward(ids, attention_mask=mask).last_hidden_state)
        expected = states[np.arange(5), [3, 2, 0, 0, 3]] @ kernel
        np.testing.assert_allclose(model.forward(ids, attention_mask=mask).logits, expected, atol=1e-5)
    embeds = f32(np.random.standard_normal((2, 4, 24)))  # noqa: NPY002
    last = np.asarray(base.forward(inputs_embeds=embeds).last_hidden_state)[:, -1]
    np.testing.assert_allclose(model.forward(inputs_embeds=embeds).logits, last @ kernel, atol=1e-5)
