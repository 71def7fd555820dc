"""Tokens of `transformers`' assisted generation and prompt lookup, one row at a time: it takes no more."""

import numpy as np
import pytest
from oracle import make_hf, to_jax, torch
from test_generate_parity import PROMPTS, hf_generate, talkative_pair

OPTIONS = [
    dict(max_new_tokens=20, eos_token_id=[5, 17, 40]),
    dict(max_new_tokens=20, repetition_penalty=1.3, min_new_tokens=12),
]


@pytest.fixture(scope="module")
def pair():
    return talkative_pair("opt-125m")


@pytest.fixture(scope="module")
def assistants():
    """A model of two layers, of theirs and of ours."""
    hf = make_hf("opt-125m", num_hidden_layers=2)
    return hf, to_jax(hf, "OPTForCausalLM")


@pytest.mark.parametrize("options", OPTIONS, ids=["ends", "penalty"])
def test_same_tokens(pair, assistants, options):
    (hf, model), (hf_assistant, assistant) = pair, assistants
    ids, mask = PROMPTS["input_ids"], PROMPTS["attention_mask"]
    drafted = model.generate(ids, mask, assistant_model=assistant, **options)
    looked_up = model.generate(ids, mask, prompt_lookup_num_tokens=4, **options)
    for row in range(len(ids)):
        prompt = ids[row : row + 1, mask[row] > 0]
        with torch.no_grad():
            plain = hf_generate(hf, prompt, np.ones_like(prompt), **options)[0, prompt.shape[1] :]
            assisted = hf_generate(hf, prompt, np.ones_like(prompt), assistant_model=hf_assistant, **options)
            lookup = hf_generate(hf, prompt, np.ones_like(prompt), prompt_lookup_num_tokens=4, **options)
        for theirs, ours in ((assisted, drafted), (lookup, looked_up)):
            new = theirs[0, prompt.shape[1] :]
            np.testing.assert_array_equal(new, plain)
            np.testing.assert_array_equal(ours.sequences[row, ids.shape[1] :][: ours.lengths[row]], new)
            assert ours.lengths[row] == len(new)
