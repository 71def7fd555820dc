"""Prompts in other forms: padded on the right, as embeddings, and as the cache of an earlier call."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from opt_jax import OPTConfig, OPTForCausalLM
from opt_jax.generation.generate import generate, stream
from opt_jax.generation.scoring import score

pytestmark = pytest.mark.slow

PAD = 1
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
ENDS: dict[str, Any] = dict(eos_token_id=[2, 5, 9, 11], max_new_tokens=12)  # rows end at very different times
LEFT = np.array([[1, 1, 1, 7, 9], [4, 5, 6, 7, 8], [1, 3, 9, 6, 11]], np.int32)
RIGHT = np.array([[7, 9, 1, 1, 1], [4, 5, 6, 7, 8], [3, 9, 6, 11, 1]], np.int32)


@pytest.fixture(scope="module")
def model():
    return OPTForCausalLM(CONFIG, rngs=nnx.Rngs(3))


def embeddings(model, ids):
    return np.asarray(model.model.decoder.embed_tokens(np.asarray(ids)))


# Padding --------------------------------------------------------------------------------------------------------------


def test_prompts_padded_on_the_right_are_moved(model):
    expected = generate(model, LEFT, **ENDS)
    mask = (RIGHT != PAD).astype(int)
    for call in (
        lambda: generate(model, RIGHT, **ENDS),
        lambda: generate(model, RIGHT, mask, **ENDS),
        lambda: generate(model, None, mask, inputs_embeds=embeddings(model, RIGHT), **ENDS),
    ):
        with pytest.warns(UserWarning, match="^prompts padded on the right were moved") as noted:
            out = call()
        assert len(noted) == 1
        np.testing.assert_array_equal(out.sequences[:, -expected.lengths.max() :], expected.sequences[:, 5:])
        if out.sequences.shape == expected.sequences.shape:  # with ids
            np.testing.assert_array_equal(out.sequences, expected.sequences)
    with pytest.warns(UserWarning, match="^prompts padded on the right were moved"):
        steps = np.stack(list(stream(model, RIGHT, **ENDS)), axis=1)
    np.testing.assert_array_equal(steps, expected.sequences[:, 5:])
    with pytest.warns(UserWarning, match="^prompts padded on the right were moved"):  # of lists, too
        out = generate(model, [[7, 9, PAD], [4, 5, 6, 7, 8], [3, 9, 6, 11]], **ENDS)
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    np.testing.assert_array_equal(score(model, RIGHT)[mask > 0], score(model, LEFT)[LEFT != PAD])  # no note


def test_holes_stay_where_they_are(model):
    ids = np.array([[7, 1, 9, 1], [4, 5, 6, 7]], np.int32)
    with pytest.warns(UserWarning, match="padded on the right"):
        out = generate(model, ids, **ENDS)
    np.testing.assert_array_equal(out.sequences[:, :4], [[1, 7, 1, 9], [4, 5, 6, 7]])
    alone, length = generate(model, [[7, 9], [4, 5]], **ENDS), out.lengths[0]
    np.testing.assert_array_equal(alone[0, 2 : 2 + length], out[0, 4 : 4 + length])


# Going on from a cache ------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the first call, and of the second one
    "greedy": (dict(), dict(num_beams=2, logprobs=0)),
    "samples": (
        dict(do_sample=True, num_return_sequences=2, seed=[3, 4, 5], repetition_penalty=1.2),
        dict(batch_size=2, repetition_penalty=1.1, logprobs=0),
    ),
    "drafts": (dict(prompt_lookup_num_tokens=3), dict(prompt_lookup_num_tokens=2)),
}


def real_rows(out, prompts, copies) -> list[list[int]]:
    """The tokens of each row, up to its end."""
    width = out.sequences.shape[1] - out.lengths.max()
    rows = zip(np.repeat(prompts, copies, axis=0), out.sequences[:, width:], out.lengths, strict=True)
    return [[*prompt[prompt != PAD], *row[:length]] for prompt, row, length in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_gives_the_tokens_of_one_call(model, kind):
    options, more = KINDS[kind]
    options = ENDS | options
    first = generate(model, LEFT, return_cache=True, **options)
    rows = real_rows(first, LEFT, options.get("num_return_sequences", 1))
    assert first.cache is not None and len(set(first.lengths)) > 1
    assert [ids[mask].tolist() for ids, mask in zip(first.cache.input_ids, first.cache.mask, strict=True)] == rows
    turns = np.random.RandomState(1).randint(12, 61, (len(rows), 4))
    turns[0, :2] = PAD
    second = generate(model, turns, cache=first.cache, **ENDS, **more)
    joined = [row + turn[turn != PAD].tolist() for row, turn in zip(rows, turns, strict=True)]
    expected = generate(model, joined, **ENDS, **more)
    assert second.finish_reasons == expected.finish_reasons
    np.testing.assert_array_equal(second.sequences[:, :4], turns)
    np.testing.assert_array_equal(second.sequences[:, 4:], expected.sequences[:, max(map(len, joined)) :])
    if "logprobs" in more:
        assert second.logprobs is not None and expected.logprobs is not None
        np.testing.assert_allclose(second.logprobs, expected.logprobs, atol=2e-5)


def test_going_on_without_new_tokens_and_once_more(model):
    """Also one row for many prompts, and a length that counts all tokens."""
    once = generate(model, LEFT, eos_token_id=[], max_new_tokens=30)
    out = generate(model, LEFT, eos_token_id=[], max_new_tokens=10, return_cache=True)
    parts = [out.sequences]
    for _ in range(2):
        out = generate(model, cache=out.cache, eos_token_id=[], max_new_tokens=10, return_cache=True)
        parts.append(out.sequences)
    np.testing.assert_array_equal(np.hstack(parts), once.sequences)
    one = generate(model, LEFT[1:2], eos_token_id=[], max_new_tokens=10, return_cache=True)
    assert one.cache is not None and one.cache.cache.max_length == 16  # not the room for more tokens
    many = generate(model, [[7], [8, 9]], cache=one.cache, max_length=20, eos_token_id=[])
    assert many.lengths.tolist() == [4, 3]
    alone = generate(model, [[8, 9]], cache=one.cache, max_length=20, eos_token_id=[])
    np.testing.assert_array_equal(many.sequences[1, 2:5], alone.sequences[0, 2:])
    steps = np.stack(list(stream(model, cache=one.cache, eos_token_id=[], max_new_tokens=5)), axis=1)
    np.testing.assert_array_equal(steps, once.sequences[1:2, 15:20])


def test_what_going_on_compiles(model, compiled):
    def turns(prompt):
        out = generate(model, [prompt], eos_token_id=[], max_new_tokens=6, return_cache=True)
        for _ in range(2):
            out = generate(model, [[7, 8]], cache=out.cache, eos_token_id=[], max_new_tokens=6, return_cache=True)

    jax.clear_caches()  # other files compile the same programs
    turns([3, 4, 5])
    assert {"jit(begin)", "jit(advance)", "jit(_settled)"} <= set(compiled)
    del compiled[:]
    turns([4, 5])
    assert compiled == []


# Embeddings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [dict(), dict(do_sample=True, num_return_sequences=2), dict(num_beams=3)],
    ids=lambda x: "-".join(x),
)
def test_embeddings_give_the_tokens_of_their_ids(model, more):
    options = ENDS | more
    embeds, mask = embeddings(model, LEFT), LEFT != PAD
    expected = generate(model, LEFT, **options)
    out = generate(model, inputs_embeds=embeds, attention_mask=mask, **options)
    np.testing.assert_array_equal(out.sequences, expected.sequences[:, 5:])
    assert out.finish_reasons == expected.finish_reasons
    out = generate(model, LEFT, inputs_embeds=embeds, **options)
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    if not more:
        other = generate(model, LEFT, inputs_embeds=embeds[:, ::-1], **options)  # what is read are the embeddings
        assert other.lengths.tolist() != expected.lengths.tolist()
        out = generate(model, inputs_embeds=embeds, attention_mask=mask, batch_size=2, **options)
        np.testing.assert_array_equal(out.sequences, expected.sequences[:, 5:])
        out = generate(model, inputs_embeds=embeds, attention_mask=mask, prompt_lookup_num_tokens=2, **options)
        np.testing.assert_array_equal(out.sequences, expected.sequences[:, 5:])
        steps = list(stream(model, inputs_embeds=embeds, attention_mask=mask, **options))
        np.testing.assert_array_equal(np.stack(steps, axis=1), expected.sequences[:, 5:])


# Errors ---------------------------------------------------------------------------------------------------------------


def test_errors(model):
    first = generate(model, LEFT, max_new_tokens=2, return_cache=True)
    embeds, refused = embeddings(model, LEFT), "is not supported"
    cases: list[tuple[str, dict[str, Any]]] = [
        ("give input_ids or inputs_embeds: the model has read", dict(input_ids=None)),
        ("give input_ids or inputs_embeds: the model has read", dict(input_ids=None, cache=model.prefill([[5]]))),
        ("cache has 3 rows for 2 prompts", dict(input_ids=[[5], [6]], cache=first.cache)),
        ("return_cache='x' must be True or False", dict(return_cache="x")),
        ("return_cache is not supported with num_beams", dict(return_cache=True, num_beams=2)),
        ("return_cache needs all rows at a time: leave out batch_size=2", dict(return_cache=True, batch_size=2)),
        ("return_cache is not supported with inputs_embeds", dict(return_cache=True, inputs_embeds=embeds)),
        (r"inputs_embeds must be those of input_ids, \(3, 5\), not \(3, 4\)", dict(inputs_embeds=embeds[:, 1:])),
        (r"word_embed_proj_dim=16\], not of shape \(3, 5, 15\)", dict(inputs_embeds=embeds[..., 1:])),
        ("inputs_embeds and cache= cannot be combined", dict(inputs_embeds=embeds, cache=first.cache)),
        ("forced_bos_token_id looks at", dict(input_ids=None, inputs_embeds=embeds, forced_bos_token_id=3)),
        ("assistant_model reads token ids", dict(inputs_embeds=embeds, assistant_model=model)),
        (f"past_key_values=.* {refused}.* write cache=", dict(past_key_values=first.cache)),
    ]
    usual: dict[str, Any] = dict(input_ids=LEFT, max_new_tokens=2)
    for words, arguments in cases:
        with pytest.raises(ValueError, match=words):
            generate(model, **usual | arguments)
