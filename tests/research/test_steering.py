"""Steering vectors: mean differences by hand, and hooks that change generation as adding in the model does."""

import numpy as np
import pytest
from reference import our_model

from opt_jax.research.steering import steer, steering_vectors

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m")


def texts(seed):
    """Two batches of texts of different lengths, padded left and right."""
    draw = np.random.RandomState(seed)
    ids = draw.randint(4, 99, (2, 2, 5)).astype(np.int32)
    masks = np.ones((2, 2, 5), bool)
    masks[0, 1, :2] = masks[1, 0, 3:] = False
    return list(zip(ids, masks, strict=True))


def by_hand(model, batches, last):
    """Each text alone and without pads."""
    means = []
    for ids, mask in batches:
        for row, real in zip(ids, mask, strict=True):
            _, kept = model.run_with_cache(row[real][None], names=POINT)
            means.append(np.asarray(kept[POINT][0][-last if last else None :]).mean(axis=0))
    return np.mean(means, axis=0)


@pytest.mark.parametrize("last", [1, 2, None])
def test_the_mean_difference_is_that_of_texts_alone(model, last):
    positive, negative = texts(0), texts(1)
    vectors = steering_vectors(model, positive, negative, names=POINT, last=last)
    expected = by_hand(model, positive, last) - by_hand(model, negative, last)
    assert vectors.keys() == {POINT} and vectors[POINT].dtype == np.float32 and vectors[POINT].shape == (24,)
    np.testing.assert_allclose(vectors[POINT], expected, rtol=1e-4, atol=1e-5)


def test_heads_have_vectors_of_their_own_shape(model):
    vectors = steering_vectors(model, texts(0), texts(1), names=["blocks.*.attn.hook_z", "blocks.2.mlp.hook_post"])
    assert [v.shape for v in vectors.values()] == [(3, 8), (3, 8), (3, 8), (40,)]


def test_steering_adds_the_vector(model):
    vector = np.random.RandomState(0).standard_normal(24).astype(np.float32)
    ids = texts(0)[0][0]
    _, plain = model.run_with_cache(ids, names=POINT)
    _, steered = model.run_with_cache(ids, names=POINT, hooks=steer({POINT: vector}, 2.0, positions=[-1]))
    expected = np.array(plain[POINT])
    expected[:, -1] += 2 * vector
    np.testing.assert_allclose(steered[POINT], expected, rtol=1e-5, atol=1e-5)
    _, steered = model.run_with_cache(ids, names=POINT, hooks=steer({POINT: vector}, -3.0, relative_to=5.0))
    difference = np.asarray(steered[POINT]) - np.asarray(plain[POINT])
    np.testing.assert_allclose(np.linalg.norm(difference, axis=-1), 15, rtol=1e-4)
    assert (difference @ vector < 0).all()


def test_generation_goes_where_the_vector_points(model):
    """A long vector along a token's row of the unembedding: the last layer's output, and so the token, is fixed."""
    final, ids = "ln_final.hook_normalized", texts(0)[0][0]
    row = np.asarray(model.model.decoder.embed_tokens.embedding.get_value())[42]
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    steered = model.generate(ids, max_new_tokens=4, do_sample=False, hooks=steer({final: row}, 100.0))
    assert (np.asarray(steered.sequences)[:, 5:] == 42).all() and (np.asarray(plain.sequences)[:, 5:] != 42).any()


def test_other_vectors_and_scales_compile_nothing(model, compiled):
    ids = texts(0)[0][0]
    run = lambda vector, scale: model.run_with_hooks(ids, hooks=steer({POINT: vector}, scale, positions=[2])).logits  # noqa: E731
    one = run(np.ones(24, np.float32), 1.0)
    compiled.clear()
    other = run(np.arange(24, dtype=np.float32), -2.0)
    assert compiled == [] and (np.asarray(one) != np.asarray(other)).any()


def test_what_is_refused(model):
    for words, arguments in {
        "no texts": dict(negative=[]),
        "a text has no token": dict(positive=[(np.ones((1, 3), int), np.zeros((1, 3)))]),
        "last=0": dict(last=0),
        "no row for each token": dict(names="blocks.0.attn.hook_pattern"),
    }.items():
        with pytest.raises(ValueError, match=words):
            steering_vectors(model, **dict(positive=texts(0), negative=texts(1), names=POINT) | arguments)
