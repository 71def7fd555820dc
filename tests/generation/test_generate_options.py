"""Rows, seeds, ends and log-probabilities against their definitions. Processors: tests/parity."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import our_model

from opt_jax import GenerationConfig, OPTForCausalLM, stack_layers
from opt_jax.generation import beams
from opt_jax.generation.generate import generate, stream
from opt_jax.generation.memory import column_bytes, device_memory, host_memory
from opt_jax.generation.processors import History, Sequences, completes
from opt_jax.generation.scoring import score

PAD = 1


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m")  # 99 tokens, a context of 64


def prompts(rows: int, width: int = 9, seed: int = 0) -> np.ndarray:
    """Left-padded prompts of 1 to `width` tokens."""
    random = np.random.RandomState(seed)
    ids = random.randint(3, 99, (rows, width)).astype(np.int32)
    ids[np.arange(width) < random.randint(0, width, rows)[:, None]] = PAD
    return ids


IDS = prompts(5)
FREE: dict[str, Any] = dict(eos_token_id=[], max_new_tokens=10)


# Rows and seeds -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_sequences_for_each_prompt(model):
    out = model.generate(IDS, do_sample=True, num_return_sequences=3, seed=4, **FREE)
    assert out.sequences.shape == (15, 19) and out.lengths.shape == (15,)
    np.testing.assert_array_equal(out.sequences[:, :9], np.repeat(IDS, 3, axis=0))
    assert len({tuple(row) for row in out.sequences[:, 9:]}) == 15
    repeated = model.generate(np.repeat(IDS, 3, axis=0), do_sample=True, seed=4, **FREE)
    np.testing.assert_array_equal(out.sequences, repeated.sequences)
    seeds = [7, 8, 9, 7, 2**32 - 1]
    out = model.generate(IDS, do_sample=True, num_return_sequences=3, seed=seeds, **FREE)
    for i, seed in enumerate(seeds):
        alone = model.generate(IDS[i : i + 1], do_sample=True, num_return_sequences=2, seed=seed, **FREE)
        np.testing.assert_array_equal(alone.sequences, out.sequences[3 * i : 3 * i + 2])


@pytest.mark.slow
def test_hundreds_of_rows_do_not_depend_on_their_batch(model):
    """In one batch, in small ones, in another order and with more padding: equal tokens, log-probabilities to 1e-5."""
    ids, seeds = prompts(384), np.arange(384)
    options: dict[str, Any] = dict(
        do_sample=True, max_new_tokens=8, logprobs=0, top_p=0.95, repetition_penalty=1.3, eos_token_id=[5]
    )
    together = model.generate(ids, seed=seeds, **options)
    assert len({tuple(row) for row in together.sequences[:, 9:]}) > 360
    order = np.random.RandomState(1).permutation(384)
    queued = model.generate(ids, seed=seeds, batch_size=96, **options)  # slots are used again
    np.testing.assert_array_equal(queued.sequences, together.sequences)
    np.testing.assert_allclose(queued.logprobs, together.logprobs, atol=1e-5, rtol=0)
    fill = 20
    padded = np.pad(ids, ((0, 0), (fill, 0)), constant_values=PAD)
    for rows in np.split(order, 8):
        out = model.generate(padded[rows], seed=seeds[rows], **options)
        wide = out.sequences.shape[1] - 9 - fill
        np.testing.assert_array_equal(out.sequences[:, 9 + fill :], together.sequences[rows, 9 : 9 + wide])
        np.testing.assert_allclose(out.logprobs, together.logprobs[rows, :wide], atol=1e-5, rtol=0)
        assert out.finish_reasons == [together.finish_reasons[row] for row in rows]


# Ends ---------------------------------------------------------------------------------------------------------


def cut(row: np.ndarray, sequences) -> int:
    """The number of tokens up to the end of the first stop sequence."""
    row = row.tolist()
    for n in range(1, len(row) + 1):
        if any(row[max(0, n - len(s)) : n] == list(s) for s in sequences):
            return n
    return len(row)


@pytest.mark.slow
def test_stop_sequences_and_reasons(model):
    free = model.generate(IDS, do_sample=True, seed=3, **FREE).sequences[:, 9:]
    sequences = [free[0, 3:5], [free[1, 6]], free[2, :3], [*free[3, 4:6], 98], free[4, 5:10]]
    sequences.append([IDS[3, -1], free[3, 0]])  # it begins in the prompt, so it does not count
    lengths = [cut(row, sequences) for row in free]
    assert len(set(lengths)) > 3
    expected = [row[:n].tolist() + [PAD] * (max(lengths) - n) for row, n in zip(free, lengths, strict=True)]
    out = model.generate(IDS, do_sample=True, seed=3, stop_token_ids=sequences, **FREE)
    assert out.sequences[:, 9:].tolist() == expected and out.lengths.tolist() == lengths
    ends = [
        any(row[:n].tolist()[-len(s) :] == list(s) for s in sequences) for row, n in zip(free, lengths, strict=True)
    ]
    assert out.finish_reasons == ["stop" if end else "length" for end in ends]
    assert {"stop", "length"} == set(out.finish_reasons)
    steps = np.stack(list(stream(model, IDS, do_sample=True, seed=3, stop_token_ids=sequences, **FREE)), axis=1)
    assert steps.tolist() == expected
    # Single tokens need no brackets, and act as end tokens.
    ends = [int(free[0, 2]), int(free[1, 4])]
    one = model.generate(IDS, do_sample=True, seed=3, stop_token_ids=ends, **FREE)
    two = model.generate(IDS, do_sample=True, seed=3, eos_token_id=ends, max_new_tokens=10)
    np.testing.assert_array_equal(one.sequences, two.sequences)
    assert one.finish_reasons == two.finish_reasons


def test_completes_looks_at_new_tokens_only():
    history = History(jnp.array([[4, 5, 6, 0, 0]]), jnp.array([[1, 1, 1, 0, 0]], bool), jnp.array([3]), jnp.array([2]))

    def ends_with(*sequence):
        ids = jnp.array([[99] * (4 - len(sequence)) + list(sequence)])
        return bool(completes(history, Sequences(ids, ids != 99))[0])

    assert ends_with(6) and ends_with(5, 6)
    assert not ends_with(4, 5, 6) and not ends_with(5) and not ends_with(6, 6) and not ends_with(0)


# Log-probabilities --------------------------------------------------------------------------------------------


def log_probabilities(model, row: np.ndarray) -> np.ndarray:
    """Log-probabilities after each token of one row, padded on the right so that one length is compiled."""
    logits = np.asarray(model(np.pad(row, (0, 48 - len(row)))[None]).logits, np.float64)[0, : len(row)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.slow
def test_logprobs_are_those_of_the_model(model):
    """Processors change the distribution that is sampled, not the log-probabilities. The prompts' lengths differ."""
    end = int(model.generate(IDS, **FREE).sequences[0, 13])
    options: dict[str, Any] = dict(
        do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.5, seed=3, max_new_tokens=12
    )
    out = model.generate(IDS, logprobs=4, eos_token_id=[end, 40, 50, 60], **options)
    plain = model.generate(IDS, eos_token_id=[end, 40, 50, 60], **options)
    np.testing.assert_array_equal(out.sequences, plain.sequences)
    assert plain.logprobs is None and plain.top_logprobs is None
    new = out.sequences[:, 9:]
    assert len(set(out.lengths)) > 1  # some rows end early
    assert out.logprobs.shape == new.shape and out.top_logprobs.shape == out.top_token_ids.shape == (*new.shape, 4)
    for row in range(len(IDS)):  # one by one, without padding
        prompt, n = IDS[row][IDS[row] != PAD], out.lengths[row]
        expected = log_probabilities(model, np.concatenate([prompt, new[row, :n]]))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(out.logprobs[row, :n], expected[np.arange(n), new[row, :n]], atol=2e-5)
        assert np.isnan(out.logprobs[row, n:]).all() and np.isnan(out.top_logprobs[row, n:]).all()
        order = np.argsort(-expected, axis=1)[:, :4]
        np.testing.assert_array_equal(out.top_token_ids[row, :n], order)
        np.testing.assert_allclose(out.top_logprobs[row, :n], np.take_along_axis(expected, order, 1), atol=2e-5)
    assert model.generate(IDS, logprobs=0, **FREE).top_logprobs.shape == (5, 10, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt-125m", "opt-350m"])
def test_score_is_what_generation_records(name):
    model = our_model(name)
    out = model.generate(IDS, logprobs=0, do_sample=True, seed=1, **FREE)
    real = out.sequences != PAD
    real[:, 9:] = True  # a pad that was drawn counts
    scores = model.score(out.sequences, real)
    assert scores.dtype == np.float32 and scores.shape == out.sequences.shape
    np.testing.assert_allclose(scores[:, 9:], out.logprobs, atol=2e-5)
    np.testing.assert_array_equal(np.isnan(scores), ~real | (np.cumsum(real, axis=1) == 1))


@pytest.mark.slow
def test_score_wherever_the_pads_are(model):
    random = np.random.RandomState(0)
    rows = [random.randint(3, 99, n) for n in (20, 3, 1, 40, 17)]
    alone = [model.score(row[None])[0] for row in rows]
    for row, values in zip(rows, alone, strict=True):
        expected = log_probabilities(model, row)[np.arange(len(row) - 1), row[1:]]
        assert np.isnan(values[0])
        np.testing.assert_allclose(values[1:], expected, atol=2e-5)
    ids, mask = np.full((5, 45), 7), np.zeros((5, 45), int)
    for i, row in enumerate(rows):
        where = np.sort(random.permutation(45)[: len(row)])
        ids[i, where], mask[i, where] = row, 1
    scores = model.score(ids, mask)
    assert np.isnan(scores[mask == 0]).all()
    for i, values in enumerate(alone):
        np.testing.assert_allclose(scores[i, mask[i] == 1], values, atol=2e-5)
    np.testing.assert_allclose(score(stack_layers(our_model("opt-125m")), ids, mask), scores, atol=2e-5)


# Layers of options ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_config_objects_and_the_checkpoint(model, tmp_path, monkeypatch):
    options: dict[str, Any] = dict(do_sample=True, top_k=5, max_new_tokens=10, eos_token_id=[])
    expected = model.generate(IDS, **options).sequences
    config = GenerationConfig(**options)
    np.testing.assert_array_equal(model.generate(IDS, generation_config=config).sequences, expected)
    assert model.generate(IDS, generation_config=config, max_new_tokens=9).sequences.shape == (5, 18)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"do_sample": true, "top_k": 5, "max_new_tokens": 10}')
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(loaded.generate(IDS, eos_token_id=[]).sequences, expected)
    greedy = loaded.generate(IDS, do_sample=False, **FREE).sequences
    np.testing.assert_array_equal(greedy, model.generate(IDS, **FREE).sequences)
    with monkeypatch.context() as patch:  # the config of a file with fields that mean nothing here
        patch.setattr(loaded, "generation_config_json", '{"top_k": 5, "use_cache": false, "our_note": 1}')
        with pytest.warns(UserWarning, match="use_cache=False .*, our_note=1 "):
            assert loaded.generation_config == GenerationConfig(top_k=5)
    (tmp_path / "model" / "generation_config.json").write_text('{"penalty_alpha": 0.6}')
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "model")  # it is refused only when it is used
    with pytest.raises(ValueError, match=r"generation_config\.json: penalty_alpha=0.6 is not supported"):
        loaded.generate(IDS)
    np.testing.assert_array_equal(loaded.generate(IDS, penalty_alpha=0, **FREE).sequences, greedy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(seed=[1, 2]), r"seed=\[1, 2\] .* each of the 5 prompts"),
        (dict(seed=[1, 2, 3, 4, -5]), "seed=-5"),
        (dict(seed="x"), "seed='x'"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(stop_strings="x"), "pass tokenizer=$"),
        (dict(stop_strings="x", tokenizer="tiny"), "pass tokenizer=, an opt_jax.OPTTokenizer, not a str"),
        (dict(stop_token_ids=[[]]), "stop_token_ids"),
        (dict(stop_token_ids=[[5, 99]]), r"stop_token_ids holds 99, outside \[0, 98\]"),
        (dict(stop_token_ids=5), "stop_token_ids=5"),
        (dict(bad_words_ids=[5]), "bad_words_ids"),
        (dict(bad_words_ids=[[-1]]), "bad_words_ids holds -1"),
        (dict(suppress_tokens=[99]), "suppress_tokens holds 99"),
        (dict(forced_eos_token_id=99), "forced_eos_token_id holds 99"),
        (dict(forced_bos_token_id=[3, 4]), "forced_bos_token_id"),
        (dict(forced_bos_token_id=3, suppress_tokens=[3, 4]), "forced_bos_token_id=3 is also in suppress_tokens"),
        (dict(min_length=40), "min_length=40 asks for 31 new tokens"),
        (dict(max_length=9), "max_length=9 leaves no new token"),
        (dict(generation_config={}), "GenerationConfig, not a dict"),
        (dict(streamer=1), "streamer=1 is not supported"),
    ],
)
def test_errors(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, IDS, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            dict(do_sample=True, num_return_sequences=10**9),
            "^num_return_sequences=1000000000.* GB of memory: ask",
        ),
        (dict(num_beams=10**9), "^num_beams=1000000000.* GB of memory: ask"),
        (
            dict(prompt_lookup_num_tokens=10**9),
            "prompt_lookup_num_tokens=1000000000 must be at most max_position_embed",
        ),
    ],
)
def test_what_no_machine_has_memory_for(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, IDS, **options)


@pytest.mark.parametrize("name", ["bad_words_ids", "stop_token_ids"])
def test_one_long_sequence_does_not_make_all_long(model, name, monkeypatch):
    monkeypatch.setattr("opt_jax.generation.request._LARGEST_TABLE", 500)
    options: dict[str, Any] = {name: [[5]] * 8 + [[5] * 40]}
    with pytest.raises(ValueError, match=f"{name} has 9 sequences, the longest of 40 tokens: padded they are 1,024"):
        generate(model, IDS, **options)


def test_drafts_of_an_assistant_have_a_limit(model):
    limit = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"num_assistant_tokens={limit + 1} must be at most max_pos.*={limit}"):
        generate(model, IDS, assistant_model=model, num_assistant_tokens=limit + 1)


@pytest.mark.parametrize(
    "options",
    [
        dict(max_new_tokens=4),
        dict(max_new_tokens=4, num_beams=2),
        dict(max_new_tokens=4, prompt_lookup_num_tokens=2),
        dict(max_new_tokens=4, logprobs=3),
        dict(max_new_tokens=4, batch_size=2, progress_bar=False),
    ],
)
def test_memory_is_looked_at_before_anything_is_made(model, options, monkeypatch):
    monkeypatch.setattr("opt_jax.generation.request.host_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"max_new_tokens=4.*: 5 rows at a time need"):
        generate(model, IDS, **options)
    monkeypatch.setattr("opt_jax.generation.request.host_memory", lambda: 10**9)
    monkeypatch.setattr("opt_jax.generation.engines.device_memory", lambda model: 1000)
    rows = options.get("batch_size", 6)  # 5 rows are in the bucket of 6
    with pytest.raises(ValueError, match=f"max_new_tokens=4.*: {rows} rows at a time need 0.0 GB, more than the 0.0"):
        generate(model, IDS, **options)
    if not {"num_beams", "logprobs", "batch_size"} & options.keys():
        with pytest.raises(ValueError, match="6 rows at a time need"):
            stream(model, IDS, **options)


def test_memory_for_logprobs_of_beams_is_that_of_all_candidates(model, monkeypatch):
    monkeypatch.setattr("opt_jax.generation.engines.device_memory", lambda model: 1_500_000)
    options: dict[str, Any] = dict(max_new_tokens=16, logprobs=61)
    assert len(generate(model, IDS, **options)) == 5
    with pytest.raises(ValueError, match="num_beams=4.*: 6 rows at a time need"):
        generate(model, IDS, num_beams=4, **options)


def test_memory_of_the_devices(model):
    assert 10**8 < device_memory(model) <= host_memory()
    for dtype in (model.dtype, jnp.int8):
        cache = model.init_cache(3, 10, dtype)
        assert column_bytes(model.config, dtype) * 30 == sum(x.nbytes for x in jax.tree.leaves((cache.k, cache.v)))


def test_errors_of_others(model):
    with pytest.raises(ValueError, match="logprobs are not streamed"):
        stream(model, IDS, logprobs=1)
    for ids, words in (
        ([[PAD, PAD]], "row 0 has no token"),
        ([[]], "empty"),
        (np.full((1, 66), 5), "66 tokens are more than"),
    ):
        with pytest.raises(ValueError, match=words):
            score(model, ids)
    with pytest.raises(ValueError, match="OPTForCausalLM, not an Linear"):
        score(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), IDS)  # type: ignore[reportArgumentType]


@pytest.mark.slow
def test_beams(model):
    """One compiled program serves all values. Options that beams cannot take are refused."""
    options: dict[str, Any] = dict(num_beams=3, num_return_sequences=2, max_new_tokens=5)
    out = model.generate(IDS, **options)
    assert len(out) == 2 * len(IDS) and out.sequences_scores is not None
    assert (np.diff(out.sequences_scores.reshape(-1, 2), axis=1) <= 0).all()  # best first
    search: Any = beams.advance
    size = search._cache_size()
    assert len(model.generate(IDS, **options | dict(length_penalty=2.0, max_new_tokens=6))) == 2 * len(IDS)
    assert search._cache_size() == size
    many = [1, 2, 1, 2, 3]
    drawn = [
        model.generate(IDS, **options, do_sample=True, temperature=2.0, seed=seed).sequences
        for seed in (1, np.int64(1), 2, many, np.array(many), jnp.array(many))
    ]
    for one, other in ((0, 1), (3, 4), (3, 5)):
        np.testing.assert_array_equal(drawn[one], drawn[other])
    assert drawn[0].shape != drawn[2].shape or (drawn[0] != drawn[2]).any()
    with pytest.raises(ValueError, match="beams, which are known only at the end, are not streamed"):
        stream(model, IDS, **options)
