"""The compiled loop against the model called without a cache. HF's `generate`: tests/parity."""

import re
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opt_jax import OPTConfig, OPTForCausalLM, OPTModel, stack_layers
from opt_jax.generation import engines, loop
from opt_jax.generation.generate import generate, stream
from opt_jax.generation.prompts import bucket
from opt_jax.generation.request import check_request

PAD, EOS = 1, 2
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
# Left-padded. The second row has no pad, the third has a hole that its mask hides.
IDS = np.array([[1, 1, 1, 7, 9], [4, 5, 6, 7, 8], [3, 9, 1, 5, 11]], np.int32)
MASK = (IDS != PAD).astype(np.int32)
# Most tests have three rows and numbers of new tokens of one bucket, and so run the same compiled programs.
FREE: dict[str, Any] = dict(max_new_tokens=20, eos_token_id=[])
SAMPLE: dict[str, Any] = FREE | dict(do_sample=True)


@pytest.fixture(scope="module")
def model():
    return OPTForCausalLM(CONFIG, rngs=nnx.Rngs(3))


def next_logits(model, row):
    """The logits after one row of real tokens.

    The row is padded on the right, where the causal mask hides it, so that one length is compiled.
    """
    ids = np.zeros((1, 64), np.int32)
    ids[0, : len(row)] = row
    return np.asarray(model(ids).logits)[0, len(row) - 1]


def by_hand(model, row, n, eos=()):
    """Greedy continuation of one row of real tokens. Each token is computed from the full sequence."""
    ids = list(row)
    while len(ids) < len(row) + n and (len(ids) == len(row) or ids[-1] not in eos):
        ids.append(int(np.argmax(next_logits(model, ids))))
    return ids[len(row) :]


@pytest.fixture(scope="module")
def free(model):
    """Greedy continuations of 20 tokens."""
    return [by_hand(model, row[mask > 0], 20) for row, mask in zip(IDS, MASK, strict=True)]


def up_to(row, ends):
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]


def test_greedy_is_the_argmax_of_the_model_called_without_a_cache(model, free):
    out = generate(model, IDS, MASK, **FREE)
    assert out.sequences.dtype == np.int32 and out.sequences.shape == (3, 25)
    np.testing.assert_array_equal(out.sequences[:, :5], IDS)
    assert len(set(map(tuple, free))) == 3 and all(len(set(row)) > 3 for row in free)  # the rows differ, and vary
    assert out.sequences[:, 5:].tolist() == free


def test_rows_end_at_their_end_token_and_are_padded(model, free):
    ends = [free[0][2], free[1][5], free[2][3]]  # each row meets one of them, at different steps
    rows = [up_to(row, ends) for row in free]
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) > 1 and max(lengths) < 20
    out = generate(model, IDS, MASK, max_new_tokens=20, eos_token_id=ends, pad_token_id=60)
    expected = [row + [60] * (max(lengths) - len(row)) for row in rows]
    assert out.sequences[:, 5:].tolist() == expected
    # One end token as a number, and the default from the config.
    one = generate(model, IDS, MASK, max_new_tokens=20, eos_token_id=ends[0])
    assert [row[:n].tolist() for row, n in zip(one.sequences[:, 5:], one.lengths, strict=True)] == [
        up_to(row, ends[:1]) for row in free
    ]
    options = check_request(model, IDS, options=dict(eos_token_id=ends[0])).options
    model.config, config = OPTConfig(**(vars(CONFIG) | {"eos_token_id": ends[0]})), model.config
    try:
        jax.tree.map(np.testing.assert_array_equal, check_request(model, IDS).options, options)
    finally:
        model.config = config


def test_min_new_tokens(model, free):
    end = free[1][0]
    assert generate(model, IDS, MASK, max_new_tokens=20, eos_token_id=end).lengths[1] == 1
    out = generate(model, IDS, MASK, max_new_tokens=20, eos_token_id=end, min_new_tokens=4)
    row = out.sequences[1, 5:]
    assert end not in row[:4] and out.lengths[1] >= 5
    # Among the other tokens the best one is chosen.
    assert row[0] == np.argsort(next_logits(model, IDS[1]))[-2]


def test_lengths(model, free):
    assert generate(model, IDS, MASK, eos_token_id=[]).sequences.shape == (3, 25)  # HF v5: 20 new tokens
    assert generate(model, IDS, MASK, max_length=22, eos_token_id=[]).sequences.shape == (3, 22)
    one = generate(model, IDS, MASK, max_new_tokens=1, eos_token_id=[]).sequences
    assert one[:, 5:].tolist() == [row[:1] for row in free]
    long = np.random.RandomState(0).randint(3, 61, (1, 50)).astype(np.int32)
    full = generate(model, long, eos_token_id=[])  # as many as fit into the context
    assert full.sequences.shape == (1, 64)
    assert full.sequences[0, 50:].tolist() == by_hand(model, long[0], 14)
    # Pads take up no position.
    padded = np.pad(long[:, :49], ((0, 0), (15, 0)), constant_values=PAD)
    out = generate(model, padded, max_new_tokens=15, eos_token_id=[]).sequences
    assert out[0, 64:].tolist() == by_hand(model, long[0, :49], 15)


def test_inputs_of_every_kind(model):
    expected = generate(model, IDS, MASK, max_new_tokens=5).sequences
    for kind in (np.ndarray.tolist, partial(np.asarray, dtype=np.int64), jnp.asarray):
        np.testing.assert_array_equal(model.generate(kind(IDS), kind(MASK), max_new_tokens=5).sequences, expected)
    # As in HF, without a mask pads are known by their id, unless the pad token is an end token.
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=5).sequences, expected)
    unmasked = model.generate(IDS, np.ones_like(IDS), max_new_tokens=5).sequences
    assert not np.array_equal(unmasked, expected)
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=5, pad_token_id=EOS).sequences, unmasked)


def test_output_is_read_like_a_tensor(model):
    out = model.generate(IDS, MASK, max_new_tokens=4)
    assert len(out) == 3 and [row.tolist() for row in out] == out.sequences.tolist()
    np.testing.assert_array_equal(out[0], out.sequences[0])
    np.testing.assert_array_equal(out[:, 5:], out.sequences[:, 5:])


def test_sampling_is_repeatable_and_depends_on_the_seed(model):
    one, again, other = (model.generate(IDS, MASK, **SAMPLE, seed=seed).sequences for seed in (1, 1, 2**32 - 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    greedy = model.generate(IDS, MASK, **FREE).sequences
    assert not np.array_equal(one, greedy)
    noise = model.generate(IDS, MASK, **SAMPLE, temperature=1e6).sequences[:, 5:]  # nearly uniform
    assert all(len(set(row)) > 6 for row in noise)
    for limit in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)):
        np.testing.assert_array_equal(model.generate(IDS, MASK, **SAMPLE, **limit).sequences, greedy)


def test_a_row_does_not_depend_on_the_others_or_on_padding(model):
    out = model.generate(IDS, MASK, **SAMPLE, seed=9).sequences[:, 5:]
    changed = IDS.copy()
    changed[0], changed[2] = 33, 44
    np.testing.assert_array_equal(model.generate(changed, **SAMPLE, seed=9).sequences[1, 5:], out[1])
    short = np.tile(IDS[:1, 3:], (3, 1))
    np.testing.assert_array_equal(model.generate(short, **SAMPLE, seed=9).sequences[0, 2:], out[0])
    wide = [np.pad(x, ((0, 0), (30, 0)), constant_values=value) for x, value in ((IDS, PAD), (MASK, 0))]
    np.testing.assert_array_equal(model.generate(*wide, **SAMPLE, seed=9).sequences[:, 35:], out)
    # Rows with the same prompt draw different tokens.
    same = model.generate(np.tile(IDS[1], (3, 1)), **SAMPLE).sequences
    assert len({tuple(row) for row in same}) == 3


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True, top_k=9, seed=4)], ids=["greedy", "sampling"])
def test_stream_gives_the_same_tokens(model, options):
    free = generate(model, IDS, MASK, max_new_tokens=20, eos_token_id=[], **options).sequences[:, 5:]
    for ends in ([], [free[0, 3], free[1, 6], free[2, 6]]):
        out = generate(model, IDS, MASK, max_new_tokens=20, eos_token_id=ends, **options).sequences[:, 5:]
        steps = list(stream(model, IDS, MASK, max_new_tokens=20, eos_token_id=ends, **options))
        assert all(step.dtype == np.int32 and step.shape == (3,) for step in steps)
        np.testing.assert_array_equal(np.stack(steps, axis=1), out)
        assert (out.shape[1] < 20) == bool(ends)


def test_stream_checks_at_once_and_can_be_left(model):
    with pytest.raises(ValueError, match="top_k"):
        stream(model, IDS, MASK, top_k=3)
    tokens = stream(model, IDS, MASK, max_new_tokens=20)
    first = next(tokens)
    tokens.close()
    np.testing.assert_array_equal(first, generate(model, IDS, MASK, max_new_tokens=1).sequences[:, 5])


def test_stream_has_the_next_step_under_way_when_it_gives_a_token(model, monkeypatch):
    """So the device computes while the caller works, and the host waits only for the token that it yields.

    The first token does not wait for a step, which may have to be compiled.
    """
    calls, advance = [], loop.advance
    monkeypatch.setattr(loop, "advance", lambda *args, **kwargs: calls.append(1) or advance(*args, **kwargs))
    under_way = [len(calls) for _ in stream(model, IDS, MASK, max_new_tokens=5, eos_token_id=[])]
    assert under_way == [0, 2, 3, 4, 4]  # the prefill gives the first token


@pytest.mark.parametrize("options", [dict(), dict(num_beams=2), dict(prompt_lookup_num_tokens=2)], ids=str)
def test_the_first_token_compiles_no_step(model, compiled, options):
    """No other test here has 17 rows, so nothing is compiled yet."""
    ids = np.random.RandomState(3).randint(3, 61, (17, 12))
    out = model.generate(ids, np.ones_like(ids), max_new_tokens=1, eos_token_id=[], return_cache=not options, **options)
    assert "jit(begin)" in compiled or "jit(_begin)" in compiled
    assert "jit(advance)" not in compiled
    assert out.lengths.tolist() == [1] * 17 and out.finish_reasons == ["length"] * 17
    few = model.generate(ids, np.ones_like(ids), max_new_tokens=1, eos_token_id=[], batch_size=3, **options)
    np.testing.assert_array_equal(few.sequences, out.sequences)
    if "num_beams" not in options:
        more = model.generate(ids, np.ones_like(ids), max_new_tokens=3, eos_token_id=[], **options).sequences
        np.testing.assert_array_equal(out.sequences, more[:, :13])
        steps = stream(model, ids[:9], np.ones_like(ids[:9]), max_new_tokens=3, eos_token_id=[], **options)
        del compiled[:]
        np.testing.assert_array_equal(next(steps), out.sequences[:9, 12])
        assert "jit(advance)" not in compiled
        np.testing.assert_array_equal(np.stack([*steps], axis=1), more[:9, 13:])
        if not options:
            rest = model.generate(cache=out.cache, max_new_tokens=2, eos_token_id=[]).sequences
            np.testing.assert_array_equal(rest, more[:, 13:])


@pytest.mark.slow
def test_compiles_once_per_bucket_batch_and_kind(model, compiled):
    """No other test here has two or six rows, so nothing is compiled yet."""
    rows = np.random.RandomState(0).randint(3, 61, (6, 32)).astype(np.int32)

    def run(batch, length, **options):
        del compiled[:]
        model.generate(rows[:batch, :length], **options)
        return sorted(name for name in compiled if re.search("begin|advance", name)), compiled

    both = ["jit(advance)", "jit(begin)"]
    assert run(2, 10, max_new_tokens=8)[0] == both
    for length in (1, 9, 16):
        for options in (
            dict(max_new_tokens=5, eos_token_id=7, pad_token_id=5),
            dict(max_new_tokens=8, eos_token_id=[3, 4, 5], min_new_tokens=2),
            dict(max_length=length + 3, eos_token_id=[]),
        ):
            assert run(2, length, **options)[1] == [], (length, options)
    list(stream(model, rows[:2, :10], max_new_tokens=7))
    assert compiled == []

    assert run(2, 10, max_new_tokens=8, do_sample=True)[0] == both
    for options in (
        dict(temperature=0.3),
        dict(top_k=5),
        dict(top_p=0.7),
        dict(seed=11),
        dict(eos_token_id=[7]),
        dict(temperature=2, top_k=3, top_p=0.2, seed=2**32 - 1, min_new_tokens=3),
    ):
        assert run(2, 11, max_new_tokens=6, do_sample=True, **options)[1] == [], options
    # Another kind of decoding is another program. It serves all values of its options.
    kind: dict[str, Any] = dict(repetition_penalty=1.2, stop_token_ids=[[5, 6]], suppress_tokens=[9], logprobs=2)
    assert run(2, 10, max_new_tokens=8, **kind)[0] == both
    kind = dict(repetition_penalty=0.7, stop_token_ids=[[7, 8], 3], suppress_tokens=[4, 5, 6], logprobs=2)
    assert run(2, 12, max_new_tokens=6, **kind)[1] == []
    # The next buckets of batch, prompt and new tokens.
    assert run(6, 17, max_new_tokens=20)[0] == both
    assert run(5, 24, max_new_tokens=9)[1] == []


def test_buckets(model):
    sizes = [bucket(n) for n in range(1, 2049)]
    assert sorted(set(sizes)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(n <= size and (size == 16 or 2 * size <= 3 * n) for n, size in enumerate(sizes, 1))
    for length in (17, 33, 60):  # a bucket is never longer than the context
        ids = np.full((1, length), 5, np.int32)
        assert check_request(model, ids).prompts.mask.shape[1] <= 64


def plain_engine(model, request):
    return engines.PlainEngine(loop.FlatModel.of(model), request)


@pytest.mark.slow
def test_a_gpu_decodes_one_row_as_two(model, monkeypatch):
    ids = IDS[1:2]
    options: dict[str, Any] = dict(max_new_tokens=10, do_sample=True, seed=[3], logprobs=2)
    alone = generate(model, ids, **options)
    monkeypatch.setattr(engines, "platform_of", lambda model: "gpu")

    def rows(**more):
        request = check_request(model, ids, options=options | more)
        slots, _ = plain_engine(model, request).begin(np.arange(request.rows))
        return len(slots.state.lengths)

    assert rows() == 2 and rows(num_return_sequences=3) == 3
    out = generate(model, ids, **options)
    assert out.top_logprobs is not None and alone.top_logprobs is not None
    assert (out.sequences == alone.sequences).all() and out.finish_reasons == alone.finish_reasons
    np.testing.assert_allclose(out.top_logprobs, alone.top_logprobs, atol=1e-5)
    assert len(list(stream(model, ids, max_new_tokens=8))[0]) == 1


PROCESSORS = dict(repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[5, 6]], stop_token_ids=[[7, 8]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, dict(do_sample=True), PROCESSORS | dict(logprobs=2)], ids=lambda o: "-".join(o)
)
def test_the_loop_updates_the_cache_in_place(model, options):
    do_sample = "do_sample" in options
    request = check_request(model, IDS, MASK, options=dict(max_new_tokens=30) | options)
    slots, _ = plain_engine(model, request).begin(np.arange(len(IDS)))
    state = slots.state
    arguments = model, state, slots.options, np.int32(30), np.int32(len(IDS))
    lowered = loop.advance.lower(*arguments, do_sample=do_sample)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a donated buffer that cannot be used
        program = lowered.compile()
    shape = ",".join(map(str, state.cache.k[0].shape))
    results = re.findall(rf"= f32\[{shape}\]\S* ([\w-]+)\(", program.as_text() or "")
    assert results and not {"copy", "select", "gather", "concatenate"} & set(results), results
    arrays = [*jax.tree.leaves((state.cache.k, state.cache.v)), state.tokens]
    cache = sum(x.nbytes for x in arrays[:-1])
    memory = program.memory_analysis()
    assert memory and memory.alias_size_in_bytes >= cache and memory.temp_size_in_bytes < cache / 2
    program(*arguments)
    assert all(x.is_deleted() for x in arrays)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(temperature=0.0, do_sample=True), "temperature=0.0 .*do_sample=False"),
        (dict(temperature=-1, do_sample=True), "temperature=-1"),
        (dict(temperature=1e-40, do_sample=True), "temperature=1e-40 .*at least 1e-30 .*do_sample=False"),
        (dict(temperature=float("nan"), do_sample=True), "temperature"),
        (dict(top_p=0.0, do_sample=True), "top_p=0.0"),
        (dict(top_p=1.1, do_sample=True), "top_p=1.1"),
        (dict(top_k=-1, do_sample=True), "top_k=-1"),
        (dict(temperature=0.5), "temperature without effect: .*do_sample=True"),
        (dict(top_k=5, top_p=0.5), "top_k, top_p without effect"),
        (dict(max_new_tokens=0), "max_new_tokens=0 must be an integer of at least 1"),
        (dict(max_length=5), "max_length=5 leaves no new token"),
        (dict(max_new_tokens=5, max_length=20), "not both"),
        (dict(max_new_tokens=60), "5 tokens and 60 new ones .*max_position_embeddings=64"),
        (dict(max_new_tokens=5, min_new_tokens=6), "min_new_tokens=6"),
        (dict(min_new_tokens=-1), "min_new_tokens=-1"),
        (dict(eos_token_id=61), "eos_token_id holds 61"),
        (dict(eos_token_id=[2, -1]), r"eos_token_id holds -1.*\[\]"),
        (dict(pad_token_id=-100), "pad_token_id holds -100"),
        (dict(seed=-1), "seed=-1"),
        (dict(bos_token_id=5), "bos_token_id=5 without effect: put it into input_ids"),
        (dict(seed=2**32), "seed"),
        (dict(attention_mask=MASK[:2]), r"\(3, 5\), not \(2, 5\)"),
        (dict(attention_mask=MASK * [[1], [0], [1]]), "row 1 has no token.*BOS"),
        (dict(input_ids=[[PAD, PAD]]), "row 0 has no token"),
        (dict(input_ids=np.zeros((1, 0), np.int32)), "empty"),
        (dict(input_ids=np.zeros((0, 4), np.int32)), "empty"),
        (dict(input_ids=[5, 6]), "batch, tokens"),
        (dict(input_ids=[[5], [5, 6]], attention_mask=[[1], [1, 1]]), "different lengths"),
        (dict(input_ids=[[5], []]), "row 1 has no token"),
        (dict(input_ids=[[5], [PAD, PAD]]), "row 1 has no token"),
        (dict(input_ids=[[5], [5.0, 6]]), "row 1 of input_ids must be integers"),
        (dict(input_ids=[[5], [[5], [6]]]), "row 1 of input_ids must be a sequence of token ids"),
        (dict(input_ids=[[5], np.array([5, 2**32 + 5], np.uint64)]), "row 1 of input_ids holds 4294967301"),
        (dict(attention_mask=np.where(MASK, 0.0, -np.inf)), "attention_mask holds -inf"),
        (dict(attention_mask=[["0"] * 5] * 3), "attention_mask must be numbers"),
        (dict(bad_words_ids=[np.array([2**32 + 5], np.uint64)]), "bad_words_ids holds 4294967301"),
        (dict(eos_token_id=np.uint64(2**32 + 5)), "eos_token_id holds 4294967301"),
        (dict(suppress_tokens=np.array([5.0])), "suppress_tokens=.* must be a token id"),
        (dict(input_ids=[[5.0]]), "integers"),
        (dict(input_ids=[[61]]), "61"),
        (dict(input_ids=np.full((1, 65), 5)), "65 tokens"),
        (dict(input_ids=np.full((1, 64), 5)), "64 tokens and 1 new ones"),
    ],
)
def test_errors(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(model, **(dict(input_ids=IDS) | arguments))


def test_unsuitable_models():
    with pytest.raises(ValueError, match="unstack_layers"):
        generate(stack_layers(OPTForCausalLM(CONFIG, rngs=nnx.Rngs(0))), IDS)
    with pytest.raises(ValueError, match="OPTForCausalLM"):
        generate(OPTModel(CONFIG, rngs=nnx.Rngs(0)), IDS)  # type: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="penalty_alpha=0.6 is not supported"):
        generate(OPTForCausalLM(CONFIG, rngs=nnx.Rngs(0)), IDS, penalty_alpha=0.6)
