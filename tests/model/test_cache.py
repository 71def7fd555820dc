"""The cache: a text in several calls gives what it gives in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SMALL, batch, our_model

from opt_jax import stack_layers
from opt_jax.model.attention import AttentionMask
from opt_jax.model.cache import init_cache
from opt_jax.model.inputs import check_inputs

LENGTH = 10


def call(model, **inputs):
    """`model(**inputs)`, operation by operation."""
    return model.forward(**check_inputs(model, inputs))


def chunks(random) -> list[slice]:
    cuts = np.flatnonzero(random.random_sample(LENGTH - 1) < 0.4) + 1
    edges = [0, *cuts.tolist(), LENGTH]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_any_chunking_equals_one_call(name, sample):
    """With random cuts, pads anywhere, a cache longer than needed, and both forms of the mask."""
    for seed in (0, *sample(range(1, 4), 1)):
        random = np.random.RandomState(seed)
        model, ids = our_model(name, num_hidden_layers=2), batch(name)["input_ids"]
        mask = random.random_sample(ids.shape) < (0.7 if seed else 1.1)  # seed 0: no pads and no mask
        expected = call(model, input_ids=ids, **({} if mask.all() else dict(attention_mask=mask))).logits
        cache = model.init_cache(3, LENGTH + 2)
        for chunk in chunks(random):
            with_past = random.random_sample() < 0.5
            extra = {} if mask.all() else dict(attention_mask=mask[:, 0 if with_past else chunk.start : chunk.stop])
            out = call(model, input_ids=ids[:, chunk], cache=cache, **extra)
            real = mask[:, chunk]
            np.testing.assert_allclose(np.asarray(out.logits)[real], np.asarray(expected)[:, chunk][real], atol=2e-5)
            assert out.cache.column == chunk.stop and not out.cache.fresh
            np.testing.assert_array_equal(out.cache.valid[:, : chunk.stop], mask[:, : chunk.stop])
            assert not out.cache.valid[:, chunk.stop :].any()
            np.testing.assert_array_equal(out.cache.next_position, mask[:, : chunk.stop].sum(1))
            cache = out.cache


@pytest.mark.slow
def test_compiled_steps_equal_one_call():
    """Prefill and steps as in generation: compiled, left-padded, also in half precision."""
    inputs = batch("opt-350m", "left")
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.1)):
        model = our_model("opt-350m", dtype=dtype, num_hidden_layers=2)
        expected = np.asarray(model(inputs["input_ids"], inputs["attention_mask"]).logits)
        out = model(inputs["input_ids"][:, :8], inputs["attention_mask"][:, :8], cache=model.init_cache(3, 12))
        assert {x.dtype for x in out.cache.k + out.cache.v} == {jnp.dtype(dtype)}
        for i in (8, 9):
            out = model(inputs["input_ids"][:, i : i + 1], cache=out.cache)
            np.testing.assert_allclose(out.logits[:, 0], expected[:, i], atol=tolerance)


@pytest.mark.slow
def test_a_fresh_cache_attends_to_the_new_tokens_alone():
    """Prefill computes T * T scores, not T * max_length. `fresh` is known while tracing."""
    model, ids = our_model("opt-125m"), batch("opt-125m")["input_ids"]
    cache = model.init_cache(3, 16)
    assert cache.fresh and (cache.batch_size, cache.max_length) == (3, 16)
    out = call(model, input_ids=ids[:, :4], cache=cache, output_attentions=True)
    assert out.attentions[0].shape == (3, 3, 4, 4)
    out = call(model, input_ids=ids[:, 4:6], cache=out.cache, output_attentions=True)
    assert out.attentions[0].shape == (3, 3, 2, 16)
    assert not np.asarray(out.attentions[0])[..., 6:].any()  # columns that are not written yet are hidden
    assert jax.tree.structure(cache) != jax.tree.structure(out.cache)


def test_the_callers_cache_stays_as_it_was():
    model, ids = our_model("opt-125m"), batch("opt-125m")["input_ids"]
    cache = model(ids[:, :4], cache=model.init_cache(3, 8)).cache
    a, b = (model(ids[:, 4:5], cache=cache).logits for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert cache.column == 4


def test_a_cache_needs_separate_layers():
    model = stack_layers(our_model("opt-125m"))
    with pytest.raises(ValueError, match="use opt_jax.unstack_layers"):
        model(batch("opt-125m")["input_ids"], cache=model.init_cache(3, 16))


@pytest.mark.slow
def test_explicit_positions_and_dtype():
    model, ids = our_model("opt-125m"), batch("opt-125m")["input_ids"]
    positions = np.random.RandomState(0).permutation(LENGTH)[None].repeat(3, 0)
    expected = call(model, input_ids=ids, position_ids=positions).logits
    cache = model.init_cache(3, LENGTH, dtype=jnp.float16)
    assert cache.k[0].dtype == jnp.float16 and len(cache.k) == len(cache.v) == 3
    for i in (slice(0, 6), slice(6, 10)):
        out = call(model, input_ids=ids[:, i], position_ids=positions[:, i], cache=cache)
        cache = out.cache
    np.testing.assert_allclose(out.logits, expected[:, 6:], atol=0.02)


def test_shape_of_an_empty_cache():
    cache = init_cache(layers=2, batch=3, heads=4, max_length=5, head_dim=6, dtype=jnp.bfloat16)
    assert [x.shape for x in cache.k] == [x.shape for x in cache.v] == [(3, 4, 5, 6)] * 2
    assert not cache.valid.any() and not cache.next_position.any() and cache.column == 0


@pytest.mark.parametrize("column", [0, 3, 6])
def test_columns_may_wrap(column):
    """A token does not see columns of later tokens of its call. All other valid columns are in its past."""
    keys, queries = 8, 4
    valid = np.ones((1, keys), bool)
    valid[0, 1] = False
    got = np.asarray(AttentionMask(jnp.asarray(valid), None, column).dense(queries, keys))[0, 0]
    for t in range(queries):
        hidden = {(column + later) % keys for later in range(t + 1, queries)} | {1}
        assert set(np.flatnonzero(~got[t])) == hidden
