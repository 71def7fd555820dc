"""Long lists of prompts (continuous batching) and prefixes, and what is compiled for them."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from flax import nnx
from support.small_models import first_layers

from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer, pipeline
from opt_jax.generation import loop
from opt_jax.generation.generate import stream

pytestmark = pytest.mark.slow

CONFIG = OPTConfig(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    ffn_dim=40,
    max_position_embeddings=96,
    word_embed_proj_dim=16,
    init_std=0.3,
)
ENDS: dict[str, Any] = dict(eos_token_id=[2, 5, 9, 11], pad_token_id=1)  # rows end at very different times
KINDS: dict[str, dict[str, Any]] = {
    "greedy": dict(),
    "sampling": dict(do_sample=True, temperature=0.9, top_k=20, seed=list(range(50))),
    "processors": dict(
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=4,
        stop_token_ids=[[7, 8], 20],
        logprobs=2,
        presence_penalty=0.4,
        forced_eos_token_id=2,
    ),
}


@pytest.fixture(scope="module")
def model():
    return OPTForCausalLM(CONFIG, rngs=nnx.Rngs(3))


def prompts(count, longest=24, seed=0):
    rng = np.random.RandomState(seed)
    return [rng.randint(3, 61, rng.randint(1, longest)).tolist() for _ in range(count)]


def assert_same(a, b):
    width = min(a.sequences.shape[1], b.sequences.shape[1])
    np.testing.assert_array_equal(a.sequences[:, -width:], b.sequences[:, -width:])
    np.testing.assert_array_equal(a.lengths, b.lengths)
    assert a.finish_reasons == b.finish_reasons
    if a.logprobs is not None:
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_array_equal(a.top_token_ids, b.top_token_ids)
        np.testing.assert_allclose(a.top_logprobs, b.top_logprobs, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_list_gives_what_one_batch_gives(model, kind):
    rows = prompts(50, 16)
    options = KINDS[kind] | ENDS | dict(max_new_tokens=21)
    expected = model.generate(rows, **options)
    assert {"stop", "length"} == set(expected.finish_reasons) or kind == "processors"
    assert len(set(expected.lengths.tolist())) > 5  # so slots are refilled at different times
    for slots in (1, 17) if kind == "greedy" else (17,):
        assert_same(model.generate(rows, batch_size=slots, **options), expected)


def test_one_by_one(model):
    """Each prompt of a list gives what it gives alone, with its own default lengths and limits."""
    rows = [*prompts(3, 14), [5] * 85, [7] * 90]
    for options in (dict(), dict(max_length=95, min_length=92)):
        many = model.generate(rows, batch_size=2, **ENDS, **options)
        for i, row in enumerate(rows):
            one = model.generate([row], **ENDS, **options)
            n = one.lengths[0]
            assert many.lengths[i] == n and many.finish_reasons[i] == one.finish_reasons[0]
            np.testing.assert_array_equal(many.sequences[i, 90:][:n], one.sequences[0, len(row) :][:n])
    assert many.sequences[0, : 90 - len(rows[0])].tolist() == [1] * (90 - len(rows[0]))
    assert many.lengths[4] <= 5 and many.lengths[:3].min() > 70


def test_pads_of_a_list_are_pads_whatever_the_other_rows_are(model):
    for pad in (1, 2):  # 2 is an end token too, so no token counts as a pad
        options: dict[str, Any] = dict(ENDS, max_length=9, pad_token_id=pad)
        alone, both = (model.generate(rows, **options) for rows in ([[1, 7]], [[1, 7], [8]]))
        n = alone.lengths[0]
        assert both.lengths[0] == n
        np.testing.assert_array_equal(both.sequences[0, 2 : 2 + n], alone.sequences[0, 2:])


def test_one_seed_and_several_samples(model):
    rows, options = prompts(9, 16), dict(do_sample=True, seed=4, max_new_tokens=9, num_return_sequences=3, **ENDS)
    assert_same(model.generate(rows, batch_size=4, **options), model.generate(rows, **options))
    options = dict(do_sample=True, seed=4, max_new_tokens=9, num_beams=3, num_return_sequences=2, **ENDS)
    queued, together = model.generate(rows, batch_size=4, **options), model.generate(rows, **options)
    assert_same(queued, together)
    np.testing.assert_allclose(queued.sequences_scores, together.sequences_scores, atol=1e-4)


def test_ended_rows_make_room(model, monkeypatch):
    steps = []

    def recorded(*args, **kwargs):
        report = advance(*args, **kwargs)
        steps.append(int(report[0].step))
        return report

    advance = loop.advance
    monkeypatch.setattr(loop, "advance", recorded)
    rows, slots = prompts(80, 16), 17
    out = model.generate(rows, batch_size=slots, max_new_tokens=30, **ENDS)
    chunks = sum(out.lengths[i : i + slots].max() for i in range(0, 80, slots))
    assert steps[-1] <= out.lengths.sum() / slots + 30 + len(steps)  # a slot is idle only at the end of the list
    assert steps[-1] < 0.75 * chunks


def test_what_is_compiled(model, compiled):
    """No other test here has eight slots, so nothing is compiled yet."""

    def run(rows, **options):
        del compiled[:]
        model.generate(rows, max_new_tokens=10, **options)
        return sorted(name for name in compiled if re.search("begin|advance|place", name)), compiled

    # `begin` for one prompt of width 16, 24 and 32, and for the first eight prompts.
    names, _ = run(prompts(80, 30), batch_size=8)
    assert names.count("jit(advance)") == 1
    assert 3 <= names.count("jit(begin)") <= 4 and 2 <= names.count("jit(place_rows)") <= 3
    assert run(prompts(99, 30, seed=7), batch_size=8)[1] == []
    # Batches of 5 and 6 rows share a bucket.
    prefix = model.prefill([[5, 6, 7]])
    assert run(prompts(5, 16), cache=prefix)[0] == ["jit(advance)", "jit(begin)"]
    assert run(prompts(6, 16), cache=model.prefill([[9] * 8]))[1] == []


@pytest.mark.parametrize("kind", ["sampling", "processors"])
def test_a_prefix_is_as_good_as_its_tokens(model, kind):
    prefix, rows = [7, 8, 9, 10, 7], prompts(12, 16)
    options: dict[str, Any] = dict(KINDS[kind], max_new_tokens=12, **ENDS)
    if kind == "sampling":
        options["seed"] = options["seed"][:12]
    expected = model.generate([prefix + row for row in rows], **options)
    cache = model.prefill([prefix])
    longest = max(map(len, rows))
    for more in (dict(), dict(batch_size=3)):
        out = model.generate(rows, cache=cache, **options, **more)
        assert out.sequences.shape[1] == longest + expected.lengths.max()
        np.testing.assert_array_equal(out.sequences[:, longest:], expected.sequences[:, longest + 5 :])
        assert out.finish_reasons == expected.finish_reasons
        if kind == "processors":
            np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)
    if kind == "sampling":
        steps = np.stack(list(stream(model, rows, cache=cache, **options)), axis=1)
        np.testing.assert_array_equal(steps, expected.sequences[:, longest + 5 :])


def test_a_prefix_is_read_once_and_counts(model):
    cache = model.prefill([[1, 1, 7, 8, 9]], [[0, 0, 1, 1, 1]])  # pads are dropped
    assert cache.input_ids.tolist() == [[7, 8, 9]]
    again = model.generate([[4]], cache=cache, max_new_tokens=4)
    np.testing.assert_array_equal(model.generate([[4]], cache=cache, max_new_tokens=4).sequences, again.sequences)
    assert model.generate([[4]], cache=cache, max_length=9, eos_token_id=[]).lengths == 5
    with pytest.raises(ValueError, match="a prompt of 94 tokens and 3 new ones"):
        model.generate([[4]], cache=model.prefill([[5] * 93]), max_new_tokens=3)
    # The keys and values of the prefix are used, not its ids.
    wrong = dataclasses.replace(cache, cache=model.prefill([[30, 40, 50]]).cache)
    assert (model.generate([[4]], cache=wrong, max_new_tokens=4, logprobs=0).logprobs != again.logprobs).all()


def test_errors(model):
    other = OPTForCausalLM(dataclasses.replace(CONFIG, num_hidden_layers=2), rngs=nnx.Rngs(0))
    for options, words in (
        (dict(batch_size=0), "batch_size=0 must be an integer of at least 1"),
        (dict(batch_size=2.0), "batch_size=2.0"),
        (dict(progress_bar=True), "progress_bar without effect: pass batch_size"),
        (dict(cache=model.init_cache(1, 8)), "what model.prefill returns, not a KVCache"),
        (dict(cache=other.prefill([[5]])), "a model of another shape"),
        (dict(max_length=40, num_beams=2), "num_beams and prompts of different lengths: give max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate([[5, 6], [7]], **options)
    with pytest.raises(ValueError, match="one prefix, not 2 rows"):
        model.prefill([[5], [6]])
    with pytest.raises(ValueError, match="row 0 has no token"):
        model.prefill([[5, 6]], [[0, 0]])


def test_progress_bar(model, capfd):
    model.generate(prompts(20), batch_size=4, max_new_tokens=3, progress_bar=True)
    assert "20/20" in capfd.readouterr().err
    model.generate(prompts(3), batch_size=4, max_new_tokens=3, progress_bar=True)  # all fit into one batch
    assert "3/3" in capfd.readouterr().err
    model.generate(prompts(20), batch_size=4, max_new_tokens=3)
    assert capfd.readouterr().err == ""
    rows = prompts(5)
    model.generate(rows, batch_size=2, max_new_tokens=3, num_beams=2, num_return_sequences=2, progress_bar=True)
    assert "10/10" in capfd.readouterr().err


def test_a_pipeline_takes_drafts():
    generator = pipeline("text-generation", model=first_layers(), tokenizer=OPTTokenizer.from_pretrained("tiny"))
    texts = ["def a(", "x = [1, 2, 1, 2,"] * 5
    options: dict[str, Any] = dict(do_sample=False, max_new_tokens=6)
    plain = generator(texts, batch_size=10, **options)
    assert generator(texts, prompt_lookup_num_tokens=3, **options) == plain
    assert generator(texts, assistant_model=generator.model, **options) == plain
    assert generator(texts, batch_size=4, prompt_lookup_num_tokens=3, **options) == plain


def test_texts_of_a_long_list_end_at_their_stop_strings():
    generator = pipeline("text-generation", model=first_layers(), tokenizer=OPTTokenizer.from_pretrained("tiny"))
    texts = ["def a(", "import os\n", "class Foo:\n    def", "x = [", "return", "# " * 30, "if x", "for i in", "while"]
    options: dict[str, Any] = dict(
        stop_strings=["\n", "(s", " in"], max_new_tokens=24, seed=list(range(9)), return_full_text=False
    )
    expected = generator(texts, batch_size=9, **options)
    assert generator(texts, batch_size=2, **options) == expected
    ended = [any(s in row[0]["generated_text"] for s in ("\n", "(s", " in")) for row in expected]
    assert sum(ended) > 4
