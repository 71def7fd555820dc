"""`model.score` beyond single batches, and perplexity by windows, against their definitions."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from reference import our_model
from support.small_models import on_mesh

from opt_jax.evaluation._perplexity import check_batch_size, perplexity, split
from opt_jax.parallel.mesh import make_mesh

CONTEXT = 64
IDS = np.random.RandomState(1).randint(3, 96, 203).astype(np.int32)  # seven windows of 32, the last of 11
SHAPE: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_attention_heads=8, word_embed_proj_dim=32, num_hidden_layers=2
)


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m", **SHAPE)


def log_probabilities(model, ids):
    """Log-probabilities [T, V] of the next token after each token, from logits.

    Padded on the right, where the causal mask hides it, so that one length is compiled.
    """
    filled = np.pad(np.asarray(ids), (0, CONTEXT - len(ids)))
    logits = np.asarray(model(filled[None]).logits[0, : len(ids)], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def mean_loss(model, ids, window, stride, full_windows=False):
    """(mean loss, number of tokens). Each token is scored alone, in the first window that holds it."""
    losses, done, begin = [], 1, 0
    while done < len(ids) and not (full_windows and begin + window > len(ids)):
        read = ids[begin : begin + window]
        values = log_probabilities(model, read)
        first = max(done, begin + 1)
        losses += [-values[i - 1 - begin, ids[i]] for i in range(first, begin + len(read))]
        done, begin = begin + len(read), begin + stride
    return np.mean(losses), len(losses)


def test_score_of_one_token_more_than_the_context(model):
    ids = IDS[: CONTEXT + 1]
    values = log_probabilities(model, ids[:-1])
    scores = model.score(ids[None])[0]
    np.testing.assert_allclose(scores[1:], values[np.arange(CONTEXT), ids[1:]], atol=2e-5)
    with pytest.raises(ValueError, match="66 tokens are more than max_position_embeddings=64"):
        model.score(IDS[None, : CONTEXT + 2])
    mask = np.ones((2, CONTEXT + 1), bool)  # row 1 has pads, so its other tokens fit
    mask[1, :40] = False
    both = model.score(np.stack([ids, ids]), mask)
    np.testing.assert_allclose(both[0, 1:], scores[1:], atol=2e-5)
    np.testing.assert_allclose(both[1, 41:], model.score(ids[None, 40:])[0, 1:], atol=2e-5)


def test_score_says_which_tokens_are_greedy(model):
    prompt = IDS[None, :10]
    row = model.generate(prompt, max_new_tokens=8, eos_token_id=[]).sequences
    row[0, -3] = (row[0, -3] + 1) % 96
    scores, greedy = model.score(row, return_greedy=True)
    best = log_probabilities(model, row[0]).argmax(-1)
    np.testing.assert_array_equal(greedy[0], [False, *(best[:-1] == row[0, 1:])])
    assert greedy[0, 10:-3].all() and not greedy[0, -3]
    np.testing.assert_array_equal(scores, model.score(row))


@pytest.mark.parametrize("tokens", [2, 31, 32, 33, 64, 200])
@pytest.mark.parametrize("window, stride", [(32, 32), (32, 16), (32, 5), (32, 1), (64, 48)])
def test_windows_score_every_token_but_the_first_once(tokens, window, stride):
    windows = list(split(tokens, window, stride))
    scored = [i for w in windows for i in range(w.end - w.scored, w.end)]
    unscored = range(0, tokens, window) if stride == window else (0,)  # no token of its window predicts the first one
    assert scored == [i for i in range(tokens) if i not in unscored]
    assert all(w.end - w.begin <= window and w.begin % stride == 0 for w in windows)
    assert all(w.end - w.scored - w.begin >= window - stride for w in windows[1:])  # tokens before a scored one


@pytest.mark.parametrize(
    "protocol, window, stride",
    [
        ("non-overlapping", 32, None),
        ("non-overlapping", 64, None),
        ("sliding", 32, 8),
        ("sliding", 64, None),
        ("sliding", 32, 32),
        ("sliding", 37, 11),
    ],
)
def test_perplexity_is_that_of_the_definition(model, protocol, window, stride):
    result = perplexity(model, IDS, protocol, window=window, stride=stride, batch_size=3)
    step = window if protocol == "non-overlapping" else stride or window // 2
    loss, count = mean_loss(model, IDS, window, step, full_windows=protocol == "non-overlapping")
    assert (result.tokens, result.left_out, result.window, result.stride) == (count, len(IDS) - count, window, step)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, np.exp(loss), rtol=1e-5)


def test_a_text_shorter_than_a_window_is_one(model):
    for protocol in ("non-overlapping", "sliding"):
        result = perplexity(model, IDS[:20], protocol)
        assert (result.windows, result.tokens, result.left_out) == (1, 19, 1)
        assert result.loss_stderr is None and result.perplexity_stderr is None
        np.testing.assert_allclose(result.loss, mean_loss(model, IDS[:20], 64, 64)[0], rtol=1e-6)


def test_stderr_is_that_of_windows(model):
    result = perplexity(model, IDS, window=32)  # windows of one size: the standard error of a mean
    means = [mean_loss(model, IDS[i : i + 32], 32, 32)[0] for i in range(0, 192, 32)]
    assert result.loss_stderr is not None and result.perplexity_stderr is not None
    np.testing.assert_allclose(result.loss_stderr, np.std(means, ddof=1) / np.sqrt(6), rtol=1e-4)
    np.testing.assert_allclose(result.perplexity_stderr, result.perplexity * result.loss_stderr)


def test_batches_change_nothing_and_compile_once(model, compiled):
    alone = perplexity(model, IDS, "sliding", window=48, stride=20, batch_size=1)
    compiled.clear()
    seen: list[tuple[int, int]] = []
    result = perplexity(model, IDS, "sliding", window=48, stride=20, batch_size=4, progress=lambda *n: seen.append(n))
    assert [name for name in compiled if "_score" in name] == compiled and len(compiled) == 1
    assert seen == [(4, 9), (8, 9), (9, 9)]
    assert result.loss == pytest.approx(alone.loss, rel=1e-6)
    assert result.loss_stderr == pytest.approx(alone.loss_stderr, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_on_a_mesh(model, spec):
    meshed = on_mesh(model, make_mesh(spec, jax.devices()[:8]))
    rows = IDS[:35].reshape(5, 7)  # five rows do not divide over the mesh
    expected, scores = (m.score(rows, return_greedy=True) for m in (model, meshed))
    np.testing.assert_allclose(scores[0], expected[0], atol=1e-4)
    np.testing.assert_array_equal(scores[1], expected[1])
    parts = 8 if spec == "fsdp=8" else 4
    assert check_batch_size(meshed, None) == 8 and check_batch_size(meshed, 2 * parts) == 2 * parts
    with pytest.raises(ValueError, match=f"batch size {parts + 1} must be a multiple of {parts}, the mesh's"):
        perplexity(meshed, IDS, batch_size=parts + 1)
    values = [dataclasses.asdict(perplexity(m, IDS, "sliding", window=40)) for m in (model, meshed)]
    for value in values:
        value.pop("seconds")
    assert values[0] == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in values[1].items()}


@pytest.mark.parametrize(
    "ids, options, message",
    [
        (IDS[None], {}, "ids of one text"),
        (IDS[:1], {}, "1 tokens: perplexity needs at least 2"),
        (np.uint64(IDS) + 2**32, {}, "input_ids holds 4294967"),
        (np.float32(IDS), {}, "input_ids must be integers, not float32"),
        (IDS, dict(window=65), "window 65: it must be at least 2 and at most 64, the model's context"),
        (IDS, dict(window=1), "window 1: it must be at least 2"),
        (IDS, dict(stride=4), "stride 4: only for the sliding protocol"),
        (IDS, dict(protocol="sliding", stride=65), "stride 65: it must be at least 1 and at most the window, 64"),
        (IDS, dict(protocol="sliding", stride=0), "stride 0: it must be at least 1"),
        (IDS, dict(protocol="strided"), "protocol 'strided': use 'non-overlapping' or 'sliding'"),
        (IDS, dict(batch_size=0), "batch size 0 must be a multiple of 1"),
        (np.where(np.arange(203) == 100, 96, IDS), {}, r"input_ids holds 96, outside \[0, 95\]"),
    ],
)
def test_bad_arguments(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, ids, **options)


def test_what_is_not_finite_is_an_error_that_says_where(model):
    broken = our_model("untied", **SHAPE)
    table = broken.model.decoder.embed_tokens.embedding
    first = next(i for i in range(64, len(IDS)) if IDS[i] not in IDS[:i])
    table.set_value(table.get_value().at[IDS[first]].set(np.nan))  # all logits of a window with this token are NaN
    assert np.isfinite(perplexity(broken, IDS[: first - 1], window=32).loss)
    with pytest.raises(ValueError, match=f"the log-probability of token {first // 32 * 32 + 1} is not finite: try"):
        perplexity(broken, IDS, window=32)
