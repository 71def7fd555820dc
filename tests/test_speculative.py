"""Drafts change how fast tokens come, not which: against plain generation, and against the exact distribution."""

import itertools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from opt_jax import OPTConfig, OPTForCausalLM, OPTModel, drafts, named_parameters, speculative, stack_layers
from opt_jax import generate as module
from opt_jax.generate import generate, stream
from opt_jax.processors import History
from opt_jax.request import check_request
from opt_jax.sharding import make_mesh, param_sharding
from opt_jax.text import OPTTokenizer

pytestmark = pytest.mark.slow

_SHAPE: dict[str, Any] = dict(
    vocab_size=61, hidden_size=24, num_attention_heads=3, ffn_dim=40, max_position_embeddings=64, init_std=0.3
)
CONFIG = OPTConfig(**_SHAPE, num_hidden_layers=2)
PAD = 1
# Left-padded: 1 to 9 tokens.
IDS = np.random.RandomState(0).randint(3, 61, (5, 9)).astype(np.int32)
IDS[np.arange(9) < np.array([[3], [0], [8], [5], [1]])] = PAD
FREE: dict[str, Any] = dict(eos_token_id=[], max_new_tokens=43)


@pytest.fixture(scope="module")
def model():
    return OPTForCausalLM(CONFIG, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module")
def good(model):
    """A draft model that is right most of the time."""
    copy = nnx.clone(model)
    for i, param in enumerate(named_parameters(copy).values()):
        value = param.get_value()
        param.set_value(value + 0.02 * value.std() * jax.random.normal(jax.random.key(i), value.shape))
    return copy


@pytest.fixture(scope="module")
def bad():
    """One of the same shape that is hardly ever right."""
    return OPTForCausalLM(CONFIG, rngs=nnx.Rngs(4))


@pytest.fixture
def compactions(monkeypatch):
    """How often holes are removed, where there is hardly a column to spare."""
    calls, compact = [], speculative.compact
    monkeypatch.setattr(drafts, "_SPARE_STEPS", 0)
    monkeypatch.setattr(speculative, "compact", lambda s: calls.append(1) or compact(s))
    return calls


def assert_equal(out, plain):
    np.testing.assert_array_equal(out.sequences, plain.sequences)
    np.testing.assert_array_equal(out.lengths, plain.lengths)
    assert out.finish_reasons == plain.finish_reasons


# The same tokens ----------------------------------------------------------------------------------------------


def test_greedy(model, good, bad, compactions):
    """With drafts that are right, wrong, or both by turns; rows that go on, and rows that end at different steps."""
    plain = model.generate(IDS, **FREE)
    assert all(len(set(row)) > 8 for row in plain.sequences[:, 9:].tolist())  # else the test is no test
    rates, holes = [], []
    for assistant in (model, good, bad):
        del compactions[:]
        out = model.generate(IDS, assistant_model=assistant, **FREE)
        assert_equal(out, plain)
        rates.append(out.acceptance_rate)
        holes.append(len(compactions))
    assert rates[0] == 1 and 0.3 < rates[1] < 0.95 and 0 <= rates[2] < 0.1
    # 42 tokens after the first, 6 at a time, none of them alone
    out = model.generate(IDS, assistant_model=model, **FREE)
    assert out.accepted.tolist() == out.drafted.tolist() == [35] * 5
    assert holes[0] == 0 and holes[1] > 0
    ends = sorted({int(row[9 + k]) for row, k in zip(plain.sequences, (2, 7, 12, 20), strict=False)})
    short = FREE | dict(eos_token_id=ends, pad_token_id=60)
    plain = model.generate(IDS, **short)
    assert len(set(plain.lengths)) > 2 and max(plain.lengths) < 20
    assert plain.acceptance_rate is None and plain.drafted is None
    for assistant in (model, good, bad):
        out = model.generate(IDS, assistant_model=assistant, **short)
        assert_equal(out, plain)
        assert (out.accepted <= out.drafted).all() and (out.accepted < out.lengths).all()


def test_a_row_of_one_wastes_no_column(model, good, compactions):
    """Exactly as many columns as tokens and drafts need."""
    out = model.generate(IDS[1:2], assistant_model=good, **FREE)
    assert_equal(out, model.generate(IDS[1:2], **FREE))
    assert not compactions and 0 < out.acceptance_rate < 1


PROCESSORS = [
    dict(repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2, no_repeat_ngram_size=2, logprobs=2),
    dict(
        bad_words_ids=[[5], [11, 12]], suppress_tokens=[7], begin_suppress_tokens=[9], min_new_tokens=6,
        forced_bos_token_id=8, forced_eos_token_id=2, stop_token_ids=[[7, 8], 33], eos_token_id=[2, 13, 40],
    ),
]  # fmt: skip


@pytest.mark.parametrize("options", PROCESSORS, ids=["penalties-logprobs", "bans-forced-stops"])
def test_greedy_with_processors(model, good, options):
    """Each position sees the tokens that it would see in plain generation; so do the assistant's."""
    options = FREE | dict(max_new_tokens=20) | options
    plain = model.generate(IDS, **options)
    assert_differs(model, plain, options)
    out = model.generate(IDS, assistant_model=good, num_assistant_tokens=3, **options)
    assert_equal(out, plain)
    assert out.acceptance_rate is not None and out.acceptance_rate > 0.3
    if "logprobs" in options:
        np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=1e-4)
        np.testing.assert_allclose(out.top_logprobs, plain.top_logprobs, atol=1e-4)
        np.testing.assert_array_equal(out.top_token_ids, plain.top_token_ids)


def assert_differs(model, plain, options):
    unprocessed = model.generate(IDS, max_new_tokens=20, eos_token_id=options["eos_token_id"]).sequences
    assert all(not np.array_equal(a[9:], b[9 : len(a)]) for a, b in zip(plain.sequences, unprocessed, strict=True))


def test_prompt_lookup(model, compactions):
    """Of a row that has said it before, by tokens that are its own."""
    plain = model.generate(IDS, **FREE)
    repeated = np.concatenate([IDS, plain.sequences[:, 9:29], IDS], axis=1)  # as long as it goes, twice
    repeated = [row[row != PAD] for row in repeated]
    options: dict[str, Any] = dict(eos_token_id=[], max_new_tokens=12)
    out = model.generate(repeated, prompt_lookup_num_tokens=4, **options)
    assert_equal(out, model.generate(repeated, **options))
    assert out.drafted.min() > 0
    assert_equal(model.generate(IDS, prompt_lookup_num_tokens=4, max_matching_ngram_size=3, **FREE), plain)
    assert_equal(model.generate(IDS, prompt_lookup_num_tokens=0, **FREE), plain)


def test_what_is_looked_up():
    """The longest n-gram first, of several places the first, as HF's PromptLookupCandidateGenerator."""
    rows = [[9, 4, 5, 6, 7, 4, 5, 8, 4, 5], [0, 0, 5, 1, 6, 5, 2, 6, 5], [0, 0, 0, 0, 0, 0, 0, 3, 4], [5, 5, 5, 5]]
    starts = [0, 2, 7, 0]
    tokens = np.zeros((4, 12), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    end = np.array([len(row) for row in rows], np.int32)
    columns = np.arange(12)
    valid = (columns >= np.array(starts)[:, None]) & (columns < end[:, None])
    history = History(*map(jnp.asarray, (tokens, valid, end, end)))
    found = {n: speculative._look_up(history, jnp.int32(n), 3) for n in (1, 2, 3)}

    def drafts_of(n, row):
        return found[n][0][row][: found[n][1][row]].tolist()

    assert drafts_of(1, 0) == drafts_of(2, 0) == drafts_of(3, 0) == [6, 7, 4]
    assert drafts_of(1, 1) == [1, 6, 5] and drafts_of(2, 1) == [2, 6, 5]
    assert drafts_of(2, 2) == []
    assert drafts_of(1, 3) == [5, 5, 5] and drafts_of(2, 3) == [5, 5] and drafts_of(3, 3) == [5]


def test_the_end_of_the_context(model, good):
    """Drafts that would stand behind the last position are not read."""
    ids = np.random.RandomState(1).randint(3, 61, (2, 50)).astype(np.int32)
    ids[0, :3] = PAD
    plain = model.generate(ids, max_new_tokens=14, eos_token_id=[])
    assert_equal(model.generate(ids, max_new_tokens=14, eos_token_id=[], assistant_model=good), plain)


def test_prefix_and_stream(model, good):
    cache = model.prefill(IDS[1:2])
    options: dict[str, Any] = FREE | dict(max_new_tokens=20, cache=cache)
    plain = model.generate(IDS, **options)
    assert_equal(model.generate(IDS, assistant_model=good, **options), plain)
    options["eos_token_id"] = plain.sequences[[0, 1, 2], [12, 17, 17]]
    plain = model.generate(IDS, **options).sequences[:, 9:]
    steps = list(stream(model, IDS, assistant_model=good, **options))
    assert steps[0].dtype == np.int32
    np.testing.assert_array_equal(np.stack(steps, axis=1), plain)


def test_stop_strings():
    """Of a model that says something, with a draft of its first layers."""
    tokenizer, model = OPTTokenizer.from_pretrained("tiny"), OPTForCausalLM.from_pretrained("tiny")
    inputs = tokenizer(["def main():\n    return main(", "import os\nimport"])
    options: dict[str, Any] = dict(max_new_tokens=24, stop_strings=["(self", "):\n", "\n\n"], tokenizer=tokenizer)
    plain = model.generate(**inputs, **options)
    assert "stop" in plain.finish_reasons
    out = model.generate(**inputs, prompt_lookup_num_tokens=4, **options)
    assert_equal(out, plain)
    assert out.acceptance_rate
    steps = list(stream(model, **inputs, prompt_lookup_num_tokens=4, **options))
    np.testing.assert_array_equal(np.stack(steps, axis=1), plain.sequences[:, inputs["input_ids"].shape[1] :])


# The same distribution ----------------------------------------------------------------------------------------

TOKENS, NEW, ROWS = 6, 4, 24576
SAMPLE: dict[str, Any] = dict(
    do_sample=True, temperature=0.8, top_k=4, repetition_penalty=1.2, eos_token_id=[], max_new_tokens=NEW
)


def small(layers, seed):
    shape: dict[str, Any] = dict(hidden_size=8, num_attention_heads=2, ffn_dim=16, max_position_embeddings=32)
    config = OPTConfig(vocab_size=TOKENS, num_hidden_layers=layers, init_std=0.5, tie_word_embeddings=False, **shape)
    return OPTForCausalLM(config, rngs=nnx.Rngs(seed))


def exact(model, prompt):
    """The probability of each continuation by NEW tokens, [TOKENS] * NEW, by definition, in NumPy."""
    rows = np.array([[*prompt, *new] for new in itertools.product(range(TOKENS), repeat=NEW - 1)])
    logits = np.asarray(model(rows).logits, np.float64)[:, len(prompt) - 1 :]
    result = np.ones([TOKENS] * NEW)
    for i in range(NEW):
        at = logits[:, i].copy()
        for row, x in zip(rows, at, strict=True):
            seen = list(set(row[: len(prompt) + i].tolist()))
            x[seen] = np.where(x[seen] < 0, x[seen] * 1.2, x[seen] / 1.2)
        at /= 0.8
        at[at < np.sort(at, axis=1)[:, -4][:, None]] = -np.inf
        p = np.exp(at - at.max(1, keepdims=True))
        p = (p / p.sum(1, keepdims=True)).reshape(*[TOKENS] * (NEW - 1), TOKENS)
        p = p[(*[slice(None)] * i, *[0] * (NEW - 1 - i))]  # what comes later makes no difference
        result *= p.reshape(*p.shape, *[1] * (NEW - 1 - i))
    return result


def p_value(new, probabilities):
    """Of the chi-square test that the rows are drawn from these; impossible rows: 0."""
    counts = np.zeros(probabilities.shape)
    np.add.at(counts, tuple(new.T), 1)
    if counts[probabilities == 0].any():
        return 0.0
    counts, expected = counts.ravel(), probabilities.ravel() * len(new)
    order = np.argsort(expected)
    few = order[np.cumsum(expected[order]) < 8]  # together one cell
    kept = order[len(few) :]
    counts = np.append(counts[kept], counts[few].sum())
    expected = np.append(expected[kept], max(expected[few].sum(), 1e-9))
    return float(scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("kind", ["assistant", "lookup"])
def test_sampling_is_from_the_distribution_of_the_model(kind):
    """All tokens of a row together, 256 continuations. (Seen to fail, with p-values of less than 1e-20: always
    accepting; drawing from p after a rejection; one key for drafting and for accepting.)"""
    model, assistant = small(2, 3), small(1, 8)
    prompt = [3, 4, 0, 3, 4, 1, 3, 5, 2, 5, 0, 2, 1, 1, 4]  # each token has been followed by another
    how: dict[str, Any] = dict(assistant_model=assistant, num_assistant_tokens=2)
    if kind == "lookup":
        how = dict(prompt_lookup_num_tokens=2, max_matching_ngram_size=1)
    out = model.generate([prompt], [[1] * len(prompt)], num_return_sequences=ROWS, seed=5, **SAMPLE, **how)
    assert out.acceptance_rate is not None and 0.05 < out.acceptance_rate < 0.9
    new, target = out.sequences[:, len(prompt) :], exact(model, prompt)
    assert p_value(new, target) > 0.01
    # the test can tell a distribution like it
    near = target**1.1
    assert p_value(new, near / near.sum()) < 1e-6
    assert p_value(new, exact(assistant, prompt)) < 1e-10


def test_seeds():
    """What a row draws depends on its seed and its sample, not on its batch mates."""
    model, assistant = small(1, 3), small(1, 8)
    options: dict[str, Any] = dict(
        do_sample=True, max_new_tokens=12, eos_token_id=[], num_return_sequences=2, assistant_model=assistant
    )
    ids, seeds = np.arange(12).reshape(3, 4) % 5 + 1, [5, 6, 7]
    out = model.generate(ids, np.ones_like(ids), seed=seeds, **options)
    assert len({tuple(row) for row in out.sequences[:, 4:]}) == 6
    assert out.accepted is not None and out.acceptance_rate is not None and 0 < out.acceptance_rate < 1
    alone = model.generate(ids[2:], np.ones_like(ids[2:]), seed=seeds[2:], **options)
    np.testing.assert_array_equal(alone.sequences, out.sequences[4:])
    np.testing.assert_array_equal(alone.accepted, out.accepted[4:])


# Compiled once, in place --------------------------------------------------------------------------------------


def test_compiles_once_per_bucket_batch_and_kind(model, good, bad, compiled):
    jax.clear_caches()

    def run(batch, length, **options):
        del compiled[:]
        model.generate(np.full((batch, length), 5), **options)
        return sorted(name for name in compiled if re.search("begin|advance|compact", name)), compiled

    each = ["jit(_begin)", "jit(advance)", "jit(begin)"]
    first = run(2, 10, max_new_tokens=8, assistant_model=good)[0]
    assert [name for name in first if "compact" not in name] == each
    for options in (dict(max_new_tokens=9), dict(max_new_tokens=8, eos_token_id=[4, 7], min_new_tokens=2)):
        for assistant in (good, bad):
            assert set(run(2, 12, assistant_model=assistant, **options)[1]) <= {"jit(compact)"}
    assert run(2, 10, max_new_tokens=8, assistant_model=good, num_assistant_tokens=3)[0][-3:] != []
    assert "jit(advance)" in run(2, 10, max_new_tokens=8, prompt_lookup_num_tokens=5)[0]
    assert run(2, 9, max_new_tokens=6, prompt_lookup_num_tokens=5, max_matching_ngram_size=4)[1] == []
    assert "jit(advance)" in run(2, 10, max_new_tokens=8, prompt_lookup_num_tokens=5, do_sample=True)[0]
    assert run(2, 9, max_new_tokens=6, prompt_lookup_num_tokens=5, do_sample=True, top_p=0.5, seed=4)[1] == []


@pytest.mark.parametrize("kind", ["assistant", "lookup"])
def test_the_loop_updates_both_caches_in_place(model, good, kind):
    how = dict(num_assistant_tokens=3) if kind == "assistant" else dict(prompt_lookup_num_tokens=3)
    request = check_request(model, IDS[:3], options=dict(max_new_tokens=30) | how)
    source = drafts.check_drafts(model, request, good if kind == "assistant" else None)
    assert source is not None
    options, (state, _, _) = module._start(model, request, source.spare(3))
    speculation = speculative._start(source, state, 1)
    arguments = model, source, speculation, options, np.int32(30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a donated buffer that cannot be used
        program = speculative.advance.lower(*arguments, do_sample=False).compile()
    caches = [state.cache] if speculation.cache is None else [state.cache, speculation.cache]
    for cache in caches:
        shape = ",".join(map(str, cache.k[0].shape))
        results = re.findall(rf"= f32\[{shape}\]\S* ([\w-]+)\(", program.as_text() or "")
        assert results and not {"copy", "select", "gather", "concatenate"} & set(results), results
    arrays = jax.tree.leaves([(cache.k, cache.v) for cache in caches])
    size = sum(x.nbytes for x in arrays)
    memory = program.memory_analysis()
    assert memory and memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < size
    speculative.advance(*arguments, do_sample=False)
    assert all(x.is_deleted() for x in arrays)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("spec", ["fsdp=8", "data=4,tensor=2"])
def test_same_tokens_on_a_mesh(spec):
    shape: dict[str, Any] = _SHAPE | dict(vocab_size=96, hidden_size=32, num_attention_heads=8)
    pair = [OPTForCausalLM(OPTConfig(**shape, num_hidden_layers=n), rngs=nnx.Rngs(3)) for n in (2, 1)]
    mesh = make_mesh(spec, jax.devices()[:8])
    meshed = [nnx.clone(model) for model in pair]
    for copy in meshed:
        for path, param in named_parameters(copy).items():
            value = param.get_value()
            param.set_value(jax.device_put(value, param_sharding(path, value.shape, mesh)))
    for options in (dict(eos_token_id=[5, 40]), dict(do_sample=True, seed=3, eos_token_id=[])):
        expected = pair[0].generate(IDS, max_new_tokens=20, assistant_model=pair[1], **options)
        out = meshed[0].generate(IDS, max_new_tokens=20, assistant_model=meshed[1], **options)
        assert_equal(out, expected)
        np.testing.assert_array_equal(out.accepted, expected.accepted)


# Errors -------------------------------------------------------------------------------------------------------


def other(**changes: Any):
    shape: dict[str, Any] = _SHAPE | dict(num_hidden_layers=1) | changes
    return OPTForCausalLM(OPTConfig(**shape), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(assistant_model=other(vocab_size=60)), "vocabulary of 60 tokens, the model one of 61: .*same tokenizer"),
        (dict(assistant_model=OPTModel(CONFIG, rngs=nnx.Rngs(0))), "assistant_model must be .*not a OPTModel"),
        (dict(assistant_model="tiny"), "assistant_model must be .*not a str"),
        (dict(assistant_model=stack_layers(other())), "assistant_model .*unstack_layers"),
        (dict(assistant_model=other(max_position_embeddings=28)), "max_position_embeddings=28.* up to 29: shorten"),
        (dict(assistant_model=other(), prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens=3, not both"),
        (dict(assistant_model=other(), num_beams=2), "assistant_model is not supported with num_beams"),
        (dict(prompt_lookup_num_tokens=3, num_beams=2), "prompt_lookup_num_tokens is not supported with num_beams"),
        (dict(assistant_model=other(), batch_size=2), "batch_size=2 is not supported with drafts"),
        (dict(num_assistant_tokens=3), "num_assistant_tokens without effect: pass assistant_model"),
        (dict(prompt_lookup_num_tokens=3, num_assistant_tokens=3), "num_assistant_tokens without effect"),
        (dict(max_matching_ngram_size=3), "max_matching_ngram_size without effect: pass prompt_lookup_num_tokens"),
        (dict(assistant_model=other(), max_matching_ngram_size=3), "max_matching_ngram_size without effect"),
        (dict(assistant_model=other(), num_assistant_tokens=0), "num_assistant_tokens=0 must be .*at least 1"),
        (dict(prompt_lookup_num_tokens=-1), "prompt_lookup_num_tokens=-1"),
        (dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=0), "max_matching_ngram_size=0"),
        (dict(assistant_model=other(), assistant_early_exit=4), "assistant_early_exit=4 is not supported"),
        (dict(assistant_model=other(), num_assistant_tokens_schedule="heuristic"), "schedule='heuristic' is not"),
    ],
)
def test_errors(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, IDS, max_new_tokens=20, **options)


def test_errors_of_stream(model):
    with pytest.raises(ValueError, match="without effect"):
        stream(model, IDS, num_assistant_tokens=3)
    with pytest.raises(ValueError, match="vocabulary"):
        stream(model, IDS, assistant_model=other(vocab_size=60))


def test_checkpoints_may_say_how_to_draft(model, good):
    """Of the assistant: how many, as in HF. Of the model: what has no effect without drafts is left out."""

    def count(text, options=None):
        good.generation_config_json = text
        try:
            source = drafts.check_drafts(model, check_request(model, IDS, options=options or {}), good)
            return source and source.count
        finally:
            good.generation_config_json = None

    assert count('{"num_assistant_tokens": 7}') == 7
    assert count('{"num_assistant_tokens": 7}', dict(num_assistant_tokens=3)) == 3
    assert count(None) == count("{}") == 5
    with pytest.raises(ValueError, match="generation_config.json: num_assistant_tokens='many'"):
        count('{"num_assistant_tokens": "many"}')
    good.generation_config_json = '{"num_assistant_tokens": 20, "max_matching_ngram_size": 2}'
    try:
        assert drafts.check_drafts(good, check_request(good, IDS, options={}), None) is None
    finally:
        good.generation_config_json = None
