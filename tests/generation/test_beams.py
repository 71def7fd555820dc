"""Beam search against all continuations, and against sums of log-probabilities. HF's beams: tests/parity."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from opt_jax import OPTConfig, OPTForCausalLM, OPTModel, named_parameters
from opt_jax.generation import beams
from opt_jax.generation.generate import generate
from opt_jax.generation.loop import FlatModel
from opt_jax.generation.request import check_request
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.parallel.rules import param_spec

pytestmark = pytest.mark.slow

PAD = 1
CONFIG = OPTConfig(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    ffn_dim=40,
    max_position_embeddings=64,
    word_embed_proj_dim=16,
    init_std=0.3,
)
# Left-padded; the third row has a hole.
IDS = np.array([[1, 1, 1, 7, 9], [4, 5, 6, 7, 8], [3, 9, 1, 5, 11]], np.int32)
MASK = IDS != PAD
ENDS = [3, 41, 6, 30, 59, 38, 58, 52]  # some of them are likely before the last step


GIVEN: dict[str, Any] = dict(max_new_tokens=10, num_beams=4, eos_token_id=ENDS, pad_token_id=PAD)


@pytest.fixture(scope="module")
def model():
    return OPTForCausalLM(CONFIG, rngs=nnx.Rngs(3))


def search(model, ids: Any = IDS, mask: Any = MASK, **options: Any) -> Any:
    return model.generate(ids, mask, **(GIVEN | options))


def sums(model, prompt, continuations):
    """Cumulative log-probabilities of continuations [M, n] of one prompt [T], from one call without a cache."""
    rows = np.concatenate([np.tile(prompt, (len(continuations), 1)), continuations], axis=1).astype(np.int32)
    log_probs = jax.nn.log_softmax(model(rows).logits[:, len(prompt) - 1 : -1])
    return np.take_along_axis(np.asarray(log_probs), rows[:, len(prompt) :, None], axis=2)[:, :, 0].cumsum(1)


@pytest.mark.parametrize(("length_penalty", "ends"), [(0.0, [2]), (1.0, [2, 4]), (2.0, [3]), (1.0, [])])
def test_wide_search_finds_the_best_of_all_continuations(length_penalty, ends):
    """With as many beams as prefixes, no beam is pruned. "never" goes on until no better sequence is possible."""
    vocabulary, new, best = 5, 3, 5
    small = OPTForCausalLM(dataclasses.replace(CONFIG, vocab_size=vocabulary), rngs=nnx.Rngs(1))
    prompts = np.array([[1, 1, 4, 2], [3, 0, 2, 4]], np.int32)
    out: Any = small.generate(
        prompts,
        prompts != 1,
        max_new_tokens=new,
        num_beams=vocabulary**2,
        num_return_sequences=best,
        length_penalty=length_penalty,
        early_stopping="never",
        eos_token_id=ends,
        pad_token_id=1,
    )
    every = np.array(list(itertools.product(range(vocabulary), repeat=new)))
    for row, prompt in enumerate(prompts):
        totals, expected = sums(small, prompt[prompt != 1], every), {}
        for sequence, total in zip(every.tolist(), totals, strict=True):
            length = next((i + 1 for i, token in enumerate(sequence) if token in ends), new)
            expected[tuple(sequence[:length])] = total[length - 1] / length**length_penalty
        ranked = sorted(expected, key=lambda key: -expected[key])
        sequences = [tuple(s[4 : 4 + n]) for s, n in zip(out.sequences.tolist(), out.lengths, strict=True)]
        mine = slice(row * best, (row + 1) * best)
        assert sequences[mine] == ranked[:best]
        np.testing.assert_allclose(out.sequences_scores[mine], [expected[key] for key in ranked[:best]], atol=1e-5)


def test_scores_are_sums_of_log_probabilities_over_length(model):
    for options in (dict(), dict(do_sample=True, seed=3), dict(length_penalty=0.5)):
        out = search(model, num_return_sequences=4, **options)
        assert out.sequences.dtype == np.int32 and out.sequences_scores.dtype == np.float32
        assert out.sequences.shape == (12, 5 + out.lengths.max()) and len(set(out.lengths)) > 1
        assert len(set(map(bytes, out.sequences))) == 12
        for i, (sequence, length) in enumerate(zip(out.sequences, out.lengths, strict=True)):
            row = i // 4
            np.testing.assert_array_equal(sequence[:5], IDS[row])
            new = sequence[5 : 5 + length]
            assert (sequence[5 + length :] == PAD).all()
            assert not set(new[:-1]) & set(ENDS) and (new[-1] in ENDS or length == GIVEN["max_new_tokens"])
            # Padded on the right, where the causal mask hides it, so that one length is compiled.
            prompt = np.concatenate([IDS[row][MASK[row]], new, np.zeros(20, np.int32)])[:20]
            real = int(MASK[row].sum())
            total = sums(model, prompt[:1], prompt[None, 1:])[0]
            total = total[real + length - 2] - (total[real - 2] if real > 1 else 0)
            score = total / length ** options.get("length_penalty", 1.0)
            np.testing.assert_allclose(out.sequences_scores[i], score, atol=1e-5)
        scores = out.sequences_scores.reshape(3, 4)
        assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True, seed=[7, 8, 9])], ids=["search", "sampling"])
def test_a_row_does_not_depend_on_the_others_or_on_padding(model, options):
    pads, options = 0 if options else 6, dict(num_return_sequences=3) | options
    out, width = search(model, **options), 5 + pads
    seeds = options.pop("seed", [0, 0, 0])
    for row in range(3):
        ids, mask = (np.pad(x[row : row + 1], ((0, 0), (pads, 0))) for x in (IDS, MASK))
        mates = np.random.RandomState(row).randint(3, 61, (2, width))
        both = np.concatenate([mates, ids]), np.concatenate([np.ones_like(mates, bool), mask])
        other = search(model, *both, **options, seed=[20, 30, seeds[row]])
        mine, last = slice(row * 3, row * 3 + 3), slice(6, 9)
        length = max(out.lengths[mine])
        np.testing.assert_array_equal(other.lengths[last], out.lengths[mine])
        np.testing.assert_array_equal(
            other.sequences[last, width : width + length], out.sequences[mine, 5 : 5 + length]
        )
        np.testing.assert_allclose(other.sequences_scores[last], out.sequences_scores[mine], atol=1e-5)


def test_sampling_from_a_peaked_distribution_is_search(model):
    given: dict[str, Any] = dict(num_return_sequences=4, length_penalty=0.0)
    best = search(model, **given)
    for seed in (0, 2**32 - 1):
        out = search(model, **given, do_sample=True, seed=seed, temperature=1 / 3e4)
        np.testing.assert_array_equal(out.sequences, best.sequences)
        np.testing.assert_allclose(out.sequences_scores, best.sequences_scores * 3e4, rtol=1e-5)


def test_sampling_is_repeatable_and_depends_on_seed_and_row(model):
    same = np.tile(IDS[1], (3, 1))
    given: dict[str, Any] = dict(do_sample=True, eos_token_id=[])  # without end tokens the fewest candidates are drawn
    runs = [search(model, same, same > 0, seed=seed, **given).sequences for seed in (1, 1, 2, [1, 1, 5])]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert runs[0].shape != runs[2].shape or (runs[0] != runs[2]).any()
    assert len(set(map(bytes, runs[0]))) == 3
    assert len(set(map(bytes, runs[3]))) == 2 and bytes(runs[3][0]) == bytes(runs[3][1])


def test_sampling_draws_without_replacement_by_probability():
    """One step of two beams: the two best of four tokens that are drawn from six. Chi-square over all pairs."""
    rows, vocabulary = 4000, 6
    config = dataclasses.replace(CONFIG, vocab_size=vocabulary, num_hidden_layers=1)
    small = OPTForCausalLM(config, rngs=nnx.Rngs(2))
    prompt = np.array([4, 5], np.int32)
    out: Any = small.generate(
        np.tile(prompt, (rows, 1)),
        np.ones((rows, 2), bool),
        max_new_tokens=1,
        num_beams=2,
        num_return_sequences=2,
        eos_token_id=[],
        pad_token_id=1,
        do_sample=True,
        seed=5,
    )
    p = np.exp(sums(small, prompt, np.arange(vocabulary)[:, None])[:, 0].astype(np.float64))
    assert p.max() > 2 / vocabulary  # far from uniform
    pairs = out.sequences[:, -1].reshape(rows, 2)
    assert (p[pairs[:, 0]] >= p[pairs[:, 1]]).all()
    np.testing.assert_allclose(out.sequences_scores, np.log(p[pairs.ravel()]), atol=1e-5)
    chances: dict[tuple, float] = {}
    for draws in itertools.permutations(range(vocabulary), 4):
        best = tuple(sorted(sorted(draws, key=lambda i: -p[i])[:2]))
        left = 1 - np.cumsum([0, *p[list(draws[:-1])]])
        chances[best] = chances.get(best, 0) + float(np.prod(p[list(draws)] / left))
    counts = {pair: (np.sort(pairs, axis=1) == pair).all(1).sum() for pair in chances}
    assert len(counts) == 6 and sum(counts.values()) == rows  # the two worst are never among the best of four
    statistic = sum((counts[pair] - rows * chance) ** 2 / (rows * chance) for pair, chance in chances.items())
    assert statistic < 20.5  # 0.999 quantile for 5 degrees of freedom


def test_the_number_of_candidates_drawn_follows_the_end_tokens(model):
    """With one end token 2 * 4 candidates are drawn, with eight 9 * 4. Even end tokens that never come change which."""
    given: dict[str, Any] = dict(num_return_sequences=4, do_sample=True, seed=1)
    unlikely = np.argsort(np.asarray(model(IDS[1:2]).logits)[0, -1])[:8].tolist()
    one, eight = (search(model, eos_token_id=unlikely[:n], **given).sequences for n in (1, 8))
    two = search(model, eos_token_id=unlikely[:1] * 2, **given).sequences
    np.testing.assert_array_equal(one, two)
    assert one.shape != eight.shape or (one != eight).any()


def test_compiles_once_per_shape_and_kind(model, compiled):
    """No other test here has five beams, so nothing is compiled yet."""

    def run(**options):
        del compiled[:]
        search(model, num_beams=5, **options)
        return [name for name in compiled if name in ("jit(_begin)", "jit(advance)")], compiled

    assert run()[0] == ["jit(_begin)", "jit(advance)"]
    for options in (
        dict(length_penalty=-2.0),
        dict(length_penalty=0),
        dict(max_new_tokens=1),
        dict(eos_token_id=[]),
        dict(eos_token_id=[5]),
        dict(pad_token_id=9),
        dict(num_return_sequences=3),
        dict(ids=IDS[::-1], mask=MASK[::-1]),
    ):
        assert run(**options)[1] == [], options
    assert run(do_sample=True)[0] == ["jit(_begin)", "jit(advance)"]
    assert run(do_sample=True, seed=4, length_penalty=0.3)[1] == []
    rows = [[5] * n for n in (3, 4, 20, 18)]  # one width for all batches
    assert run(ids=rows, mask=None, batch_size=2)[0] == ["jit(_begin)", "jit(advance)"]


def test_no_step_copies_the_cache(model):
    capacity, num_beams = 24, 5
    request = check_request(model, IDS, MASK, options=GIVEN | dict(max_new_tokens=20, num_beams=num_beams))
    slots, _ = beams.BeamEngine(FlatModel.of(model), request).begin(np.arange(3))
    program = beams.advance.lower(model, slots.state, slots.options, np.int32(20), np.int32(3)).compile()
    heads, size, layers = CONFIG.num_attention_heads, CONFIG.head_dim, CONFIG.num_hidden_layers
    shape = (3, heads, 16 + capacity * num_beams, size)  # the prompt once, not once for each beam
    text = program.as_text() or ""
    results = re.findall(rf"= f32\[{','.join(map(str, shape))}\]\S* ([\w-]+)\(", text)
    assert results.count("dynamic-update-slice") == 2 * layers, results
    assert not {"copy", "select", "gather", "concatenate", "transpose", "reshape"} & set(results), results
    # It is not copied in another shape either.
    elements = int(np.prod(shape))
    moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|gather|concatenate|transpose)\(", text)
    assert max((int(np.prod([int(n) for n in dims.split(",")])) for dims in moved), default=0) < elements / 4, moved
    memory, cache = program.memory_analysis(), 2 * layers * elements * 4
    assert memory and memory.alias_size_in_bytes >= cache and memory.temp_size_in_bytes < 0.6 * cache


def test_a_branched_cache(model):
    """Dropped, repeated and reordered branches give the logits of their tokens without a cache."""
    random = np.random.RandomState(0)
    out = model(IDS, MASK, cache=model.init_cache(3, 5 + 4 * 2))
    cache, tokens = out.cache.branch(2), np.zeros((3, 2, 0), np.int32)
    for order in ([[0, 1]] * 3, [[1, 0], [1, 1], [0, 0]], [[0, 0], [1, 0], [0, 1]], [[1, 1], [0, 1], [1, 0]]):
        cache = cache.select(jnp.array(order))
        tokens = np.take_along_axis(tokens, np.array(order)[:, :, None], axis=1)
        new = random.randint(3, 61, (3, 2)).astype(np.int32)
        tokens = np.concatenate([tokens, new[:, :, None]], axis=2)
        positions = np.tile(np.asarray(cache.next_position)[:, None], (1, 2))
        out = model(new, position_ids=positions, cache=cache)
        cache, length = out.cache, tokens.shape[2]
        for branch in range(2):
            alone = np.pad(np.concatenate([IDS, tokens[:, branch]], axis=1), ((0, 0), (0, 4 - length)))
            mask = np.concatenate([MASK, np.ones((3, 4), bool)], axis=1)
            expected = model(alone, mask).logits[:, 4 + length]  # the causal mask hides the padding after it
            np.testing.assert_allclose(out.logits[:, branch], expected, atol=2e-5)


def test_on_a_mesh():
    config = dataclasses.replace(CONFIG, vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    model = OPTForCausalLM(config, rngs=nnx.Rngs(3))
    ids, mask = np.concatenate([IDS, IDS[::-1]])[:4], np.concatenate([MASK, MASK[::-1]])[:4]
    expected = search(model, ids, mask, num_return_sequences=2)
    mesh = make_mesh("data=2,fsdp=2,tensor=2", jax.devices()[:8])
    for path, param in named_parameters(model).items():
        value = param.get_value()
        param.set_value(jax.device_put(value, NamedSharding(mesh, param_spec(path, value.shape, mesh))))
    with use_mesh(mesh):
        out = search(model, ids, mask, num_return_sequences=2)
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    np.testing.assert_allclose(out.sequences_scores, expected.sequences_scores, atol=1e-5)


# With other options ---------------------------------------------------------------------------------------


def test_prefix(model):
    prefix = [7, 8, 9, 10, 7]
    joined = np.concatenate([np.tile([prefix], (2, 1)), IDS[1:]], axis=1)
    expected = search(model, joined, joined > -1, num_return_sequences=2, logprobs=1)
    out = search(model, IDS[1:], IDS[1:] > -1, cache=model.prefill([prefix]), num_return_sequences=2, logprobs=1)
    np.testing.assert_array_equal(out.sequences[:, 5:], expected.sequences[:, 10:])
    np.testing.assert_allclose(out.sequences_scores, expected.sequences_scores, atol=1e-5)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.4), dict(do_sample=True, temperature=2.0)])
def test_logprobs_are_those_of_the_sequences(model, options):
    """They are those of `score`, before any processor, and follow each beam's ancestors."""
    out = search(model, num_return_sequences=4, logprobs=2, **options)
    for i, (sequence, length) in enumerate(zip(out.sequences, out.lengths, strict=True)):
        mask = np.concatenate([MASK[i // 4], np.ones(len(sequence) - 5, bool)])
        scores = model.score(sequence[None], mask[None])[0, 5:]
        np.testing.assert_allclose(out.logprobs[i, :length], scores[:length], atol=1e-5)
        assert np.isnan(out.logprobs[i, length:]).all() and np.isnan(out.top_logprobs[i, length:]).all()
        best = jax.nn.log_softmax(model(sequence[None], mask[None]).logits[0, 4:-1])
        top, ids = jax.lax.top_k(best, 2)
        np.testing.assert_allclose(out.top_logprobs[i, :length], top[:length], atol=1e-5)
        np.testing.assert_array_equal(out.top_token_ids[i, :length], ids[:length])


def test_stop_sequences_end_beams_as_end_tokens_do(model):
    """A stop sequence of one token acts as an end token. One of two tokens needs both."""
    options: dict[str, Any] = dict(num_return_sequences=4)
    # Both searches have two ends, and so the same number of candidates (as in HF, it depends on the end tokens).
    ends = search(model, eos_token_id=[3, 41], **options)
    stops = search(model, eos_token_id=[3], stop_token_ids=[41], **options)
    assert set(ends.finish_reasons) == {"stop", "length"}
    pair = ends.sequences[0, 5 + ends.lengths[0] - 2 : 5 + ends.lengths[0]].tolist()
    for out, last in ((stops, {3, 41}), (search(model, eos_token_id=[], stop_token_ids=[pair], **options), None)):
        for sequence, length, reason in zip(out.sequences, out.lengths, out.finish_reasons, strict=True):
            new = sequence[5 : 5 + length].tolist()
            if last is None:
                where = [i for i in range(1, length) if new[i - 1 : i + 1] == pair]
                assert where in ([], [length - 1]) and reason == ("stop" if where else "length")
            else:
                assert not set(new[:-1]) & last and reason == ("stop" if new[-1] in last else "length")
        assert "stop" in out.finish_reasons


def test_unsuitable_models():
    with pytest.raises(ValueError, match="OPTForCausalLM, not an OPTModel"):
        generate(OPTModel(CONFIG, rngs=nnx.Rngs(0)), IDS, MASK, **GIVEN)  # type: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unstack_layers"):
        search(OPTForCausalLM(CONFIG, rngs=nnx.Rngs(0), scan_layers=True))
