"""`hooks=` of generate, stream and score."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from reference import our_model
from support.hooked_models import INPUTS, OTHER, RESID, VECTOR, assert_near, edited, separate

from opt_jax import Add, Zero
from opt_jax.generation.generate import stream

FIRST = "blocks.0.hook_resid_post"
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13, 11, 12], [20, 30, 40, 50, 60]]
GENERATION: dict[str, dict[str, Any]] = {
    "plain": {},
    "beams": dict(num_beams=3),
    "lookup": dict(prompt_lookup_num_tokens=3),
    "assistant": dict(num_assistant_tokens=2),
    "continuous": dict(batch_size=2, do_sample=True, num_return_sequences=2),
}


def edits_of_generation(newest: bool):
    """Hooks that do what other weights would do: those of `other_weights`."""
    last = Add(OTHER, positions=-1) if newest else Add(OTHER, positions=[4, 5, 6, 7, 8, 9])
    return {
        "blocks.0.hook_mlp_out": Add(2 * VECTOR),
        "hook_pos_embed": (Add(-3 * VECTOR[::-1], positions=[1, 6, 7]), last),
    }


@cache
def other_weights():
    changed = our_model("opt-125m", num_hidden_layers=1)
    bias, table = changed.model.decoder.layers[0].fc2.bias, changed.model.decoder.embed_positions.embedding
    bias.set_value(bias.get_value() + 2 * VECTOR)
    rows = np.arange(64 + 2) - 2
    change = -3 * VECTOR[::-1] * np.isin(rows, [1, 6, 7])[:, None] + OTHER * (rows >= 4)[:, None]
    table.set_value(table.get_value() + change.astype(np.float32))
    return changed


@pytest.mark.parametrize("kind", GENERATION)
def test_generation(kind):
    """The tokens are those of a model whose weights are changed instead. A prompt has five tokens."""
    model, options = separate(1), GENERATION[kind] | dict[str, Any](max_new_tokens=5, eos_token_id=98)
    if kind == "assistant":
        options["assistant_model"] = model
    hooks = edits_of_generation(newest=kind not in ("lookup", "assistant"))
    got = model.generate(PROMPTS, hooks=hooks, **options).sequences
    np.testing.assert_array_equal(got, other_weights().generate(PROMPTS, **options).sequences)
    assert (got != model.generate(PROMPTS, **options).sequences).any()
    if kind == "plain":
        steps = np.stack([*stream(model, PROMPTS, hooks=hooks, **options)], 1)
        np.testing.assert_array_equal(steps, got[:, 5:])
        # Each token is the most likely one where the whole sequence is read at once.
        logits = edited(model, edits_of_generation(newest=False), got, None)
        np.testing.assert_array_equal(logits[:, 4:-1].argmax(-1), got[:, 5:])


def test_new_values_compile_nothing(compiled):
    def run(number):
        hooks = {FIRST: Add(number * VECTOR, scale=np.float32(number), positions=[number, -number])}
        return separate(1).generate(PROMPTS, hooks=hooks, max_new_tokens=3).sequences

    one = run(1)
    assert compiled
    compiled.clear()
    assert (run(2) != one).any() and compiled == []


def test_score():
    """The log-probabilities of `run_with_hooks`; -1 is the last token of a row, which no other follows."""
    model = separate(1)
    hooks = {"hook_embed": Add(VECTOR, positions=[-2, 0]), FIRST: Add(VECTOR, rows=-1)}
    rows = np.tile(np.arange(3), 2)[:5]  # five rows are padded to six
    for padding in ("left", "right"):
        ids, mask = (INPUTS[padding][name][rows] for name in ("input_ids", "attention_mask"))
        logprobs = np.asarray(jax.nn.log_softmax(edited(model, hooks, ids, mask)))
        expected = np.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], 2)[..., 0]
        got = model.score(ids, mask, hooks=hooks)[:, 1:]
        real = ~np.isnan(got)
        assert_near(got[real], expected[real], 1e-5)
    last = {"hook_embed": Add(VECTOR, positions=[-1, -1]), FIRST: Add(VECTOR * 0, rows=-1)}
    assert_near(*(np.nan_to_num(x) for x in (model.score(ids, mask, hooks=last), model.score(ids, mask))))


def test_rows_of_generation():
    """Five prompts run in a batch of six."""
    model, prompts, options = separate(1), [*PROMPTS, *PROMPTS][:5], dict[str, Any](max_new_tokens=4, eos_token_id=98)
    plain = model.generate(prompts, **options).sequences
    every, got = (
        model.generate(prompts, hooks={FIRST: Add(VECTOR, rows=rows)}, **options).sequences
        for rows in ([0, 1, 2, 3, 4], [0, -1, -1, 2, 2])
    )
    np.testing.assert_array_equal(got, [every[i] if i in (0, 2, 4) else plain[i] for i in range(5)])
    assert (every != plain).any()


@pytest.mark.parametrize(
    ("edit", "options", "words"),
    [
        (Zero(rows=0), dict(batch_size=2), "rows= cannot be combined with batch_size"),
        (Zero(rows=0), dict(num_return_sequences=2, do_sample=True), "combined with num_return_sequences above 1"),
        (Zero(rows=3), {}, "rows=3: there are 3"),
        (Zero(positions=[2, -1]), dict(assistant_model=separate), "positions= cannot be combined with assistant_model"),
        (Zero(positions=-1), dict(prompt_lookup_num_tokens=2), "combined with prompt_lookup_num_tokens"),
        (Zero(heads=0), {}, "has no heads"),
    ],
)
def test_generation_refuses(edit, options: dict[str, Any], words):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=words):
        separate().generate(PROMPTS, hooks={RESID: edit}, **options)
