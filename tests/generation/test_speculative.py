"""Drafts change the speed, not the tokens: against plain generation. Distributions: test_speculative_sampling.py."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.small_models import first_layers, on_mesh

from opt_jax import OPTConfig, OPTForCausalLM, OPTModel, named_parameters, stack_layers
from opt_jax.generation import drafts, speculative
from opt_jax.generation.generate import generate, stream
from opt_jax.generation.loop import FlatModel
from opt_jax.generation.processors import History
from opt_jax.generation.request import check_request
from opt_jax.parallel.mesh import make_mesh
from opt_jax.text.tokenizer import OPTTokenizer

pytestmark = pytest.mark.slow

# The sizes divide over the meshes.
_SHAPE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, num_attention_heads=4, ffn_dim=40, max_position_embeddings=52, init_std=0.35
)
CONFIG = OPTConfig(**_SHAPE, num_hidden_layers=2)
PAD = 1
# Left-padded prompts of 1 to 9 tokens. Most tests share the batch, the lengths and the number of drafts, and so share
# compiled programs. The row without pads ends at the end of the context.
IDS = np.random.RandomState(0).randint(3, 61, (5, 9)).astype(np.int32)
IDS[np.arange(9) < np.array([[3], [0], [8], [5], [1]])] = PAD
FREE: dict[str, Any] = dict(eos_token_id=[], max_new_tokens=43)
assert IDS.shape[1] + FREE["max_new_tokens"] == CONFIG.max_position_embeddings
SAMPLES: dict[str, Any] = FREE | dict(do_sample=True, num_return_sequences=2, seed=[5, 6, 7, 8, 9])


@pytest.fixture(scope="module")
def model():
    return OPTForCausalLM(CONFIG, rngs=nnx.Rngs(14))


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
    """A draft model of the same shape that is hardly ever right."""
    return OPTForCausalLM(CONFIG, rngs=nnx.Rngs(4))


@pytest.fixture
def compactions(monkeypatch):
    """A list that grows each time that holes are removed. The cache has hardly a column more than needed."""
    calls, compact = [], speculative.compact
    monkeypatch.setattr(drafts, "_STEPS_OF_HOLES", 0)
    monkeypatch.setattr(speculative, "compact", lambda s: calls.append(1) or compact(s))
    return calls


def assert_equal(out, plain):
    np.testing.assert_array_equal(out.sequences, plain.sequences)
    np.testing.assert_array_equal(out.lengths, plain.lengths)
    assert out.finish_reasons == plain.finish_reasons


# The same tokens ----------------------------------------------------------------------------------------------


def test_greedy(model, good, bad, compactions):
    """Drafts are right, wrong, or both in turn. Rows end together, or at different steps.

    Drafts beyond the last position of the context are not used.
    """
    plain = model.generate(IDS, **FREE)
    assert all(len(set(row)) > 8 for row in plain.sequences[:, 9:].tolist())  # or repetitions could hide a mistake
    rates, holes = [], []
    for assistant in (model, good, bad):
        del compactions[:]
        out = model.generate(IDS, assistant_model=assistant, **FREE)
        assert_equal(out, plain)
        rates.append(out.acceptance_rate)
        holes.append(len(compactions))
    assert rates[0] == 1 and 0.3 < rates[1] < 0.95 and 0 <= rates[2] < 0.1
    # After the first, 42 tokens come in steps of 6: five drafts and the token after them.
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
    """The cache has exactly as many columns as tokens and drafts need."""
    out = model.generate(IDS[1:2], assistant_model=good, **FREE)
    assert_equal(out, model.generate(IDS[1:2], **FREE))
    assert not compactions and 0 < out.acceptance_rate < 1


PROCESSORS = [
    dict(repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2, no_repeat_ngram_size=2, logprobs=2),
    dict(
        bad_words_ids=[[5], [11, 12]],
        suppress_tokens=[31],
        begin_suppress_tokens=[9],
        min_new_tokens=6,
        forced_bos_token_id=8,
        forced_eos_token_id=2,
        stop_token_ids=[[7, 8], 33],
        eos_token_id=[2, 13, 40],
    ),
]


@pytest.mark.usefixtures("compactions")
@pytest.mark.parametrize("options", PROCESSORS, ids=["penalties-logprobs", "bans-forced-stops"])
def test_greedy_with_processors(model, good, options):
    """The processors of each position, and of the assistant, see the tokens that they see in plain generation."""
    options = FREE | options
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
    unprocessed = model.generate(IDS, **FREE | dict(eos_token_id=options["eos_token_id"])).sequences
    assert all(not np.array_equal(a[9:], b[9 : len(a)]) for a, b in zip(plain.sequences, unprocessed, strict=True))


@pytest.mark.usefixtures("compactions")
def test_prompt_lookup(model):
    """Drafts come from the real tokens of the same row, which repeats itself."""
    plain = model.generate(IDS, **FREE)
    repeated = np.concatenate([IDS[:, -6:], plain.sequences[:, 9:13], IDS[:, -6:]], axis=1)  # with its continuation
    repeated = [row[row != PAD] for row in repeated]
    options: dict[str, Any] = FREE | dict(max_new_tokens=36)
    out = model.generate(repeated, prompt_lookup_num_tokens=4, **options)
    assert_equal(out, model.generate(repeated, **options))
    assert out.drafted is not None and out.drafted.min() > 0
    assert_equal(model.generate(IDS, prompt_lookup_num_tokens=4, max_matching_ngram_size=3, **FREE), plain)
    assert_equal(model.generate(IDS, prompt_lookup_num_tokens=0, **FREE), plain)


def test_what_is_looked_up():
    """The longest n-gram wins, then its first occurrence, as in HF's PromptLookupCandidateGenerator."""
    rows = [[9, 4, 5, 6, 7, 4, 5, 8, 4, 5], [0, 0, 5, 1, 6, 5, 2, 6, 5], [0, 0, 0, 0, 0, 0, 0, 3, 4], [5, 5, 5, 5]]
    starts = [0, 2, 7, 0]
    tokens = np.zeros((4, 12), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    end = np.array([len(row) for row in rows], np.int32)
    columns = np.arange(12)
    valid = (columns >= np.array(starts)[:, None]) & (columns < end[:, None])
    history = History(*map(jnp.asarray, (tokens, valid, end, end)))
    look_up = jax.jit(speculative._look_up, static_argnums=2)
    looked_up = {n: look_up(history, jnp.int32(n), 3) for n in (1, 2, 3)}

    def drafts_of(n, row):
        return looked_up[n][0][row][: looked_up[n][1][row]].tolist()

    assert drafts_of(1, 0) == drafts_of(2, 0) == drafts_of(3, 0) == [6, 7, 4]
    assert drafts_of(1, 1) == [1, 6, 5] and drafts_of(2, 1) == [2, 6, 5]
    assert drafts_of(2, 2) == []
    assert drafts_of(1, 3) == [5, 5, 5] and drafts_of(2, 3) == [5, 5] and drafts_of(3, 3) == [5]


@pytest.mark.usefixtures("compactions")
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


@pytest.mark.usefixtures("compactions")
def test_stop_strings():
    """With a trained model, whose text repeats itself."""
    tokenizer, model = OPTTokenizer.from_pretrained("tiny"), first_layers()
    inputs = tokenizer(["def main():\n    return main(", "import os\nimport"])
    width = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, **dict[str, Any](FREE, max_new_tokens=24)).sequences[:, width:]
    strings = [tokenizer.decode(row)[at : at + 3] for row, at in zip(free, (4, 20), strict=True)]
    options: dict[str, Any] = dict(max_new_tokens=24, stop_strings=strings, tokenizer=tokenizer)
    plain = model.generate(**inputs, **options)
    assert "stop" in plain.finish_reasons
    out = model.generate(**inputs, prompt_lookup_num_tokens=4, **options)
    assert_equal(out, plain)
    assert out.acceptance_rate
    steps = list(stream(model, **inputs, prompt_lookup_num_tokens=4, **options))
    np.testing.assert_array_equal(np.stack(steps, axis=1), plain.sequences[:, width:])


@pytest.mark.parametrize("kind", ["assistant", "lookup", "sampling"])
def test_rows_make_room(model, good, compactions, kind):
    """Continuous batching: a prompt gives the same beside rows that began earlier, with holes or without."""
    random = np.random.RandomState(4)
    prompts = [random.randint(3, 61, random.randint(1, 10)).tolist() for _ in range(14)]
    options: dict[str, Any] = dict(max_new_tokens=40, eos_token_id=list(range(3, 64, 6)), logprobs=1)
    options |= dict(prompt_lookup_num_tokens=3) if kind == "lookup" else dict(assistant_model=good)
    if kind == "sampling":
        options |= dict(do_sample=True, num_return_sequences=2, seed=list(range(14)))
    together = model.generate(prompts, **options)
    assert len(set(together.lengths.tolist())) > 5
    for slots in (1, 5):
        del compactions[:]
        out = model.generate(prompts, batch_size=slots, **options)
        assert_equal(out, together)
        np.testing.assert_allclose(out.logprobs, together.logprobs, atol=1e-4)
        np.testing.assert_array_equal(out.accepted, together.accepted)
        np.testing.assert_array_equal(out.drafted, together.drafted)
        assert compactions or slots == 1


@pytest.mark.usefixtures("compactions")
def test_seeds(model, good):
    """What a row draws depends on its seed and the number of its sample, not on the other rows."""
    out = model.generate(IDS, assistant_model=good, **SAMPLES)
    assert len({tuple(row) for row in out.sequences[:, 9:]}) == 10
    assert out.accepted is not None and out.acceptance_rate is not None and 0 < out.acceptance_rate < 1
    mates = np.where(IDS == PAD, 44, IDS[::-1])
    mates[1] = IDS[3]
    other = model.generate(mates, assistant_model=good, **SAMPLES | dict(seed=[50, 8, 70, 80, 90]))
    np.testing.assert_array_equal(other.sequences[2:4], out.sequences[6:8])
    np.testing.assert_array_equal(other.accepted[2:4], out.accepted[6:8])
    assert (other.sequences[:2] != out.sequences[:2]).any()


# Compiled once, in place --------------------------------------------------------------------------------------


def test_compiles_once_per_bucket_batch_and_kind(model, good, bad, compiled):
    """No other test here has two rows, so nothing is compiled yet."""

    def run(length, **options):
        del compiled[:]
        model.generate(np.full((2, length), 5), **options)
        return sorted(name for name in compiled if re.search("begin|advance|compact", name)), compiled

    each = ["jit(_begin)", "jit(advance)", "jit(begin)"]
    first = run(10, max_new_tokens=8, assistant_model=good)[0]
    assert [name for name in first if "compact" not in name] == each
    for options in (dict(max_new_tokens=9), dict(max_new_tokens=8, eos_token_id=[4, 7], min_new_tokens=2)):
        for assistant in (good, bad):
            assert set(run(12, assistant_model=assistant, **options)[1]) <= {"jit(compact)"}
    lookup: dict[str, Any] = dict(prompt_lookup_num_tokens=5, do_sample=True)
    assert run(10, max_new_tokens=8, **lookup)[0].count("jit(advance)") == 1
    assert run(9, max_new_tokens=6, max_matching_ngram_size=4, top_p=0.5, seed=4, **lookup)[1] == []


@pytest.mark.usefixtures("compactions")
@pytest.mark.parametrize("kind", ["assistant", "lookup"])
def test_the_loop_updates_both_caches_in_place(model, good, kind):
    how = dict(num_assistant_tokens=3) if kind == "assistant" else dict(prompt_lookup_num_tokens=3)
    request = check_request(model, IDS, options=FREE | how)
    source = drafts.check_drafts(model, request, good if kind == "assistant" else None)
    assert source is not None
    slots, _ = speculative.DraftingEngine(FlatModel.of(model), request, source, len(IDS)).begin(np.arange(len(IDS)))
    speculation, state = slots.state, slots.state.state
    arguments = model, source, speculation, slots.options, np.int32(30), np.int32(len(IDS))
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
    program(*arguments)
    assert all(x.is_deleted() for x in arrays)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.usefixtures("compactions")
@pytest.mark.parametrize(
    ("spec", "options"), [("fsdp=4", FREE | dict(eos_token_id=[5, 40])), ("data=2,tensor=2", SAMPLES)]
)
def test_same_tokens_on_a_mesh(model, good, spec, options):
    mesh = make_mesh(spec, jax.devices()[:4])
    expected = model.generate(IDS, assistant_model=good, **options)
    out = on_mesh(model, mesh).generate(IDS, assistant_model=on_mesh(good, mesh), **options)
    assert_equal(out, expected)
    np.testing.assert_array_equal(out.accepted, expected.accepted)


# Errors -------------------------------------------------------------------------------------------------------


def other(**changes: Any):
    shape: dict[str, Any] = _SHAPE | dict(num_hidden_layers=1) | changes
    return OPTForCausalLM(OPTConfig(**shape), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(assistant_model=other(vocab_size=60)), "vocabulary of 60 tokens, the model one of 64: .*same tokenizer"),
        (dict(assistant_model=OPTModel(CONFIG, rngs=nnx.Rngs(0))), "assistant_model must be .*not a OPTModel"),
        (dict(assistant_model="tiny"), "assistant_model must be .*not a str"),
        (dict(assistant_model=stack_layers(other())), "assistant_model .*unstack_layers"),
        (dict(assistant_model=other(max_position_embeddings=28)), "max_position_embeddings=28.* up to 29: shorten"),
        (dict(assistant_model=other(), prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens=3, not both"),
        (dict(assistant_model=other(), num_beams=2), "assistant_model is not supported with num_beams"),
        (dict(prompt_lookup_num_tokens=3, num_beams=2), "prompt_lookup_num_tokens is not supported with num_beams"),
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
    """As in HF, the assistant's file gives the number of drafts. Without drafts, that of the model is ignored."""

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
