"""Tokens of `transformers`' `generate`. Its processors: test_processors_parity.py."""

import warnings

import numpy as np
import pytest
from limits import assert_close
from oracle import talkative_pair, torch, transformers
from reference import CONFIGS, SMALL, batch

from opt_jax import GenerationConfig

# Mixed lengths, padded on the left: 10, 7, 4, 1 real tokens.
PROMPTS = {k: v for k, v in batch("opt-125m", "left", rows=4).items() if k != "labels"}
NEW = 40


@pytest.fixture(scope="module", params=SMALL)
def pair(request):
    return talkative_pair(request.param)


@pytest.fixture(scope="module")
def one_pair():
    return talkative_pair("opt-125m")


def hf_generate(hf, input_ids, attention_mask=None, **options):
    mask = {} if attention_mask is None else {"attention_mask": torch.tensor(attention_mask)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on options
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


@pytest.mark.parametrize(
    "options",
    [
        dict(
            repetition_penalty=0.8,
            no_repeat_ngram_size=3,
            min_new_tokens=3,
            suppress_tokens=[7, 8, 9],
            begin_suppress_tokens=[2, 50],
        ),
        dict(bad_words_ids=[[5], [11, 12], [30]], forced_eos_token_id=2, min_length=14),
        dict(max_length=30, forced_eos_token_id=[40, 41], eos_token_id=[3, 4]),
    ],
    ids=lambda o: "-".join(o),
)
def test_greedy_with_processors(one_pair, options):
    pair = one_pair
    ids, mask = PROMPTS.values()
    length = {} if "max_length" in options else {"max_new_tokens": 20}
    theirs = hf_generate(pair[0], ids, mask, **(length | options))
    ends = {"eos_token_id": []} if options.get("eos_token_id") == -1 else {}
    ours = pair[1].generate(ids, mask, **(length | options | ends)).sequences
    np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(pair[1].generate(ids, mask, max_new_tokens=20).sequences, ours)


def test_stop_strings():
    """On random texts and bytes we stop after the same token as HF, also where a string begins in the prompt."""
    from support.stop_strings import stop_lengths

    from opt_jax import OPTTokenizer
    from opt_jax.checkpoints import hub
    from opt_jax.text.streaming import StopStrings

    tok = OPTTokenizer.from_pretrained("tiny")
    folder = hub.resolve("tiny")
    theirs = transformers.GPT2Tokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
    )
    random = np.random.RandomState(0)
    rows = random.randint(3, len(tok), (60, 30))
    rows[30:] = random.choice([i for i in range(len(tok)) if len(tok.token_bytes(i)) == 1], (30, 30))
    text = b"".join(map(tok.token_bytes, rows[0].tolist())).decode(errors="ignore")
    for strings in ("e", ["re", "\n", "zq"], [text[9:14], text[40:41], "on"], "é", [text[15:40], "ta"]):
        criterion = transformers.StopStringCriteria(theirs, strings)
        prompt, new = rows[:, :10], rows[:, 10:]
        expected = np.full(60, np.iinfo(np.int32).max)
        for n in range(20, 0, -1):
            expected[criterion(torch.tensor(rows[:, : 10 + n]), None).numpy()] = n
        ours = stop_lengths(StopStrings.of(tok, strings, list(prompt), len(tok)), new)
        assert ours == [n if n <= 20 else None for n in expected.tolist()], strings
        assert strings == "é" or (expected < 20).any()


def test_every_option_of_hf_is_known():
    """We know each option by name and accept its default. So this fails when transformers adds an option."""
    config = transformers.GenerationConfig()
    options = config.to_dict() | {k: v for k, v in config._get_default_generation_params().items() if k != "top_k"}
    GenerationConfig.from_dict(options)
    checkpoint = {"_from_model_config": True, "bos_token_id": 2, "transformers_version": "5.0.0"}
    assert GenerationConfig.from_dict(checkpoint).to_dict() == {}


@pytest.mark.parametrize(
    "options",
    [
        dict(num_return_sequences=3, length_penalty=0.3),
        dict(early_stopping=True, no_repeat_ngram_size=2),
        dict(early_stopping="never", repetition_penalty=1.3, min_new_tokens=5, length_penalty=-1.0),
    ],
)
def test_beams(one_pair, options):
    """`generate` with processors. The search by itself, with all models: test_beams_parity.py."""
    ids, mask = PROMPTS.values()
    options |= dict(num_beams=3, max_new_tokens=12, eos_token_id=[5, 17, 40])
    hf, model = one_pair
    with torch.no_grad():
        theirs = hf.generate(
            torch.tensor(ids, dtype=torch.int64),
            attention_mask=torch.tensor(mask),
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    ours = model.generate(ids, mask, **options)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences.numpy())
    assert_close(ours.sequences_scores, theirs.sequences_scores.numpy(), atol=1e-4, rtol=5e-7, what="scores")
    for row, length, reason in zip(ours.sequences, ours.lengths, ours.finish_reasons, strict=True):
        assert (row[ids.shape[1] + length - 1] in (5, 17, 40)) == (reason == "stop")
