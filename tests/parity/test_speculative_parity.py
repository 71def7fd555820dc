"""Tokens of `transformers`' assisted generation and prompt lookup, which take one row at a time."""

import numpy as np
import pytest
from oracle import make_hf, talkative_pair, to_jax, torch
from test_generate_parity import PROMPTS, hf_generate


@pytest.fixture(scope="module")
def pair():
    return talkative_pair("opt-125m")


@pytest.fixture(scope="module")
def assistants():
    """(HF's, our) assistant of one layer."""
    hf = make_hf("opt-125m", num_hidden_layers=1)
    return hf, to_jax(hf, "OPTForCausalLM")


def compare(pair, theirs, ours, **options):
    """Assert equal tokens. `theirs` and `ours` are the options that choose the drafts."""
    hf, model = pair
    options = dict(max_new_tokens=20) | options
    ids, mask = PROMPTS["input_ids"], PROMPTS["attention_mask"]
    drafted = model.generate(ids, mask, **ours, **options)
    for row in range(len(ids)):
        prompt = ids[row : row + 1, mask[row] > 0]
        with torch.no_grad():
            plain, new = (
                hf_generate(hf, prompt, np.ones_like(prompt), **draft, **options)[0, prompt.shape[1] :]
                for draft in ({}, theirs)
            )
        np.testing.assert_array_equal(new, plain)
        np.testing.assert_array_equal(drafted.sequences[row, ids.shape[1] :][: drafted.lengths[row]], new)
        assert drafted.lengths[row] == len(new)


# tests/generation/test_speculative.py combines both with other options, and compares with our plain generation.
def test_assistant_with_processors(pair, assistants):
    theirs, ours = assistants
    compare(pair, dict(assistant_model=theirs), dict(assistant_model=ours), repetition_penalty=1.3, min_new_tokens=12)


def test_lookup_with_end_tokens(pair):
    lookup = dict(prompt_lookup_num_tokens=4)
    compare(pair, lookup, lookup, eos_token_id=[5, 17, 40])
