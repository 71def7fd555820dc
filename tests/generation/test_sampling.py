"""Each function against its definition in NumPy. HF's processors: tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax.generation import processors, sampling

LOGITS = np.random.RandomState(0).standard_normal((4, 50)).astype(np.float32) * 3  # both signs, no ties
X = jnp.asarray(LOGITS)


def kept(logits):
    return np.isfinite(np.asarray(logits))


@pytest.mark.parametrize("k", [1, 2, 7, 49, 50])
def test_top_k(k):
    out = np.asarray(jax.jit(sampling.keep_top_k)(X, k))
    expected = np.zeros_like(LOGITS, bool)
    np.put_along_axis(expected, np.argsort(-LOGITS, axis=-1)[:, :k], True, axis=-1)
    np.testing.assert_array_equal(kept(out), expected)
    np.testing.assert_array_equal(out[expected], LOGITS[expected])
    assert np.all(out[~expected] == -np.inf)


def test_top_k_off_more_than_all_and_ties():
    np.testing.assert_array_equal(sampling.keep_top_k(X, 0), LOGITS)
    np.testing.assert_array_equal(sampling.keep_top_k(X, 99), LOGITS)
    tied = jnp.array([[1.0, 2.0, -3.0, 2.0, 5.0]])
    assert kept(sampling.keep_top_k(tied, 2)).tolist() == [[False, True, False, True, True]]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(p):
    out = np.asarray(jax.jit(sampling.keep_top_p)(X, p))
    for row, new in zip(LOGITS.astype(np.float64), out, strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-row)
        before = np.cumsum(probabilities[order]) - probabilities[order]
        assert set(np.flatnonzero(np.isfinite(new))) == set(order[before < p])
    np.testing.assert_array_equal(out[kept(out)], LOGITS[kept(out)])


def test_top_p_off_and_after_another_filter():
    np.testing.assert_array_equal(sampling.keep_top_p(X, 1.0), LOGITS)
    filtered = jnp.log(jnp.array([[0.5, 0.3, 0.0, 0.2]]))  # the token of -inf stays out
    assert kept(sampling.keep_top_p(filtered, 0.75)).tolist() == [[True, True, False, False]]
    assert kept(sampling.keep_top_p(filtered, 0.85)).tolist() == [[True, True, False, True]]


PEAKED = jnp.array([[0.0, 1, 2, 300], [5, 3, 4, -200]])  # in row 0 all but one probability underflow, in row 1 one does


@pytest.mark.parametrize(("min_keep", "count"), [(1, 1), (2, 2), (3, 3), (9, 4)])
@pytest.mark.parametrize(
    ("keep", "value"),
    [(sampling.keep_top_k, 1), (sampling.keep_top_p, 0.5), (sampling.keep_min_p, 0.9), (sampling.keep_typical, 0.2)],
)
def test_min_keep_where_probabilities_underflow(keep, value, min_keep, count):
    """Tokens of probability 0 tie, so the logits choose among them."""
    out = np.asarray(keep(PEAKED[:1], value, min_keep))
    np.testing.assert_array_equal(out, np.where(np.arange(4) >= 4 - count, PEAKED[:1], -np.inf))


def test_min_p_compares_logits():
    assert kept(sampling.keep_min_p(PEAKED, 0.3)).tolist() == [[False] * 3 + [True], [True, False, True, False]]
    np.testing.assert_array_equal(sampling.keep_min_p(PEAKED, 0.0), PEAKED)  # 0 turns it off
    tied = jnp.array([[2.0, -jnp.inf, 2.0, 1.0]])
    assert kept(sampling.keep_min_p(tied, 1.0)).tolist() == [[True, False, True, False]]


def test_min_p_keeps_no_more_where_differences_are_rounded():
    large = jnp.array([[1e38, 0.0, 1, 2], [jnp.inf, 0, 1, 2]])
    assert kept(sampling.keep_min_p(large[:1], 0.9, 2)).tolist() == [[True, False, False, True]]
    assert (np.asarray(sampling.keep_min_p(large, 0.9)) > -np.inf).tolist() == [[True, False, False, False]] * 2


@pytest.mark.parametrize("keep", [sampling.keep_top_p, sampling.keep_typical])
def test_a_share_that_underflows_keeps_a_token(keep):
    """A top_p of 1e-50 is 0 in float32."""
    assert kept(jax.jit(keep)(X, np.float32(1e-50))).sum(1).tolist() == [1] * 4
    zeros = jnp.array([[0.0, -0.0, -1.0]])
    assert kept(sampling.keep_top_p(zeros, 0.1)).tolist() == [[True, True, False]]  # 0.0 and -0.0 are equal


def test_suppress():
    out = np.asarray(processors.suppress(X, jnp.array([3, 7, 50, 99])))
    assert np.flatnonzero(~kept(out)[0]).tolist() == [3, 7]
    np.testing.assert_array_equal(out[kept(out)], LOGITS[kept(out)])


def test_draw_follows_the_probabilities():
    probabilities = np.array([0.5, 0.25, 0.2, 0.05, 0.0])
    n = 20_000
    keys = sampling.row_keys(jnp.full(n, 5, jnp.uint32), jnp.arange(n), jnp.full(n, 3))
    tokens = sampling.draw(jnp.tile(jnp.log(jnp.array(probabilities, jnp.float32)), (n, 1)), keys)
    frequencies = np.bincount(np.asarray(tokens), minlength=5) / n
    assert frequencies[4] == 0
    np.testing.assert_allclose(frequencies, probabilities, atol=4 * 0.5 / n**0.5)


def test_keys_differ_by_seed_row_and_step_only():
    def data(seed, batch, step):
        keys = sampling.row_keys(jnp.full(batch, seed, jnp.uint32), jnp.arange(batch), jnp.full(batch, step))
        return np.asarray(jax.random.key_data(keys))

    all_keys = np.concatenate([data(seed, 5, step) for seed in (0, 1, 2**32 - 1) for step in range(4)])
    assert len(np.unique(all_keys, axis=0)) == len(all_keys)
    np.testing.assert_array_equal(data(1, 2, 3), data(1, 5, 3)[:2])
