"""Tokens of `transformers`' `generate`, and logits of its processors."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import make_hf, to_jax, torch, transformers
from reference import CONFIGS, SMALL, batch

from opt_jax import sampling

# Mixed lengths, padded on the left: 10, 7, 4, 1 real tokens.
PROMPTS = {k: v for k, v in batch("opt-125m", "left", rows=4).items() if k != "labels"}
NEW = 40


def talkative_pair(name):
    """As `make_pair`, but position counts for more, constants for less, or they would say one token for ever."""
    hf = make_hf(name)
    with torch.no_grad():
        for parameter, value in hf.named_parameters():
            value *= 4 if "embed_positions" in parameter else 0.1 if parameter.endswith("bias") else 1
    return hf, to_jax(hf, "OPTForCausalLM")


@pytest.fixture(scope="module", params=SMALL)
def pair(request):
    return talkative_pair(request.param)


def hf_generate(hf, input_ids, attention_mask=None, **options):
    mask = {} if attention_mask is None else {"attention_mask": torch.tensor(attention_mask)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on options
        return hf.generate(torch.tensor(input_ids, dtype=torch.int64), **mask, **options).numpy()


def both(pair, *inputs, **options):
    hf, ours = pair
    return hf_generate(hf, *inputs, **options), ours.generate(*inputs, **options).sequences


def test_greedy(pair):
    ids, mask = PROMPTS.values()
    theirs = hf_generate(pair[0], ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    new = theirs[:, ids.shape[1] :]
    assert new.shape[1] == NEW and all(len(set(row)) > 4 for row in new)
    np.testing.assert_array_equal(pair[1].generate(ids, mask, max_new_tokens=NEW, eos_token_id=[]).sequences, theirs)


def test_greedy_with_end_tokens(pair):
    ids, mask = PROMPTS.values()
    width = ids.shape[1]
    free = hf_generate(pair[0], ids, mask, max_new_tokens=NEW, eos_token_id=-1)[:, width:]
    ends = sorted({int(row[k]) for row, k in zip(free, (3, 7, 12, 16), strict=True)})  # so that every row ends
    options = dict(max_new_tokens=NEW, eos_token_id=ends)
    theirs, ours = both(pair, ids, mask, **options)
    assert width < theirs.shape[1] < width + NEW and (theirs[:, width:] == 1).any()
    np.testing.assert_array_equal(ours, theirs)
    for more in (dict(pad_token_id=50), dict(min_new_tokens=9), dict(eos_token_id=ends[0]), dict(max_new_tokens=33)):
        theirs, ours = both(pair, ids, mask, **(options | more))
        np.testing.assert_array_equal(ours, theirs)


def test_defaults_of_length_and_mask():
    pair = talkative_pair("opt-350m")
    ids = PROMPTS["input_ids"]
    for options in (dict(), dict(max_length=15), dict(pad_token_id=2), dict(eos_token_id=5)):
        theirs, ours = both(pair, ids, **options)
        np.testing.assert_array_equal(ours, theirs)
    long = np.random.RandomState(0).randint(3, 99, (2, 55))  # 9 positions are left
    theirs, ours = both(pair, long)
    assert theirs.shape == (2, CONFIGS["opt-350m"].max_position_embeddings)
    np.testing.assert_array_equal(ours, theirs)


OPTIONS = [
    dict(temperature=0.3),
    dict(temperature=2.5),
    dict(top_k=1),
    dict(top_k=40),
    dict(top_k=5000),
    dict(top_p=1e-4),
    dict(top_p=0.3),
    dict(top_p=0.95),
    dict(min_new_tokens=4),
    dict(temperature=0.7, top_k=50, top_p=0.9),
    dict(temperature=3.0, top_k=200, top_p=0.6, min_new_tokens=4),
    dict(temperature=0.5, top_p=0.5, min_new_tokens=3),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_processors(options):
    """The chain that HF builds for these options, on random logits, at a step with and one without end tokens."""
    vocabulary, prompt, ends = 1000, 6, [2, 17]
    logits = np.random.RandomState(1).standard_normal((5, vocabulary)).astype(np.float32) * 3
    logits[:, ends] += 8  # likely, so that their suppression shows
    config = transformers.GenerationConfig(do_sample=True, eos_token_id=ends, **({"top_k": 0} | options))
    config._eos_token_tensor = torch.tensor(ends)
    chain = make_hf_chain(config, prompt)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_new_tokens": 0} | options
    ours_options = sampling.SamplingOptions(
        temperature=jnp.float32(full["temperature"]),
        top_k=jnp.int32(full["top_k"]),
        top_p=jnp.float32(full["top_p"]),
        min_new_tokens=jnp.int32(full["min_new_tokens"]),
        seed=jnp.uint32(0),
        eos_token_ids=jnp.array([*ends, vocabulary]),
        pad_token_id=jnp.int32(1),
    )
    process = jax.jit(sampling.process, static_argnums=3)
    for step in (3, 4):
        theirs = chain(torch.zeros((5, prompt + step), dtype=torch.int64), torch.from_numpy(logits)).numpy()
        ours = np.asarray(process(logits, jnp.int32(step), ours_options, True))
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def make_hf_chain(config, prompt):
    return make_hf("opt-125m")._get_logits_processor(generation_config=config, input_ids_seq_length=prompt)
