"""Sequences and scores of `transformers`' beam search."""

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.stats
import transformers
from limits import assert_close
from oracle import make_hf, talkative_pair, to_jax, torch
from reference import SMALL, batch

# Mixed lengths, padded on the left: 10, 7, 4, 1 real tokens.
PROMPTS = {k: v for k, v in batch("opt-125m", "left", rows=4).items() if k != "labels"}
NEW, RETURNED = 14, 2
MANY = [3, 7, 11, 15, 19, 31, 50, 60]


@pytest.fixture(scope="module", params=SMALL)
def pair(request):
    return talkative_pair(request.param)


@pytest.fixture(scope="module")
def one_pair():
    return talkative_pair("opt-350m")


def hf_beams(hf, ids, mask, eos, **options):
    given = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=1, eos_token_id=eos or -1) | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on options
        out = hf.generate(
            torch.tensor(ids, dtype=torch.int64),
            attention_mask=torch.tensor(mask),
            return_dict_in_generate=True,
            output_scores=True,
            num_return_sequences=RETURNED,
            **given,
        )
    return out.sequences.numpy(), out.sequences_scores.numpy()


def our_beams(model, ids, mask, eos, **options):
    given: dict[str, Any] = dict(max_new_tokens=NEW, pad_token_id=1) | options
    return model.generate(ids, mask, eos_token_id=eos, num_return_sequences=RETURNED, **given)


def compare(pair, eos, ids=PROMPTS["input_ids"], mask=PROMPTS["attention_mask"], **options):
    """Assert that both agree. Returns our result."""
    sequences, scores = hf_beams(pair[0], ids, mask, eos, **options)
    ours = our_beams(pair[1], ids, mask, eos, **options)
    np.testing.assert_array_equal(ours.sequences, sequences)
    # With a negative length penalty scores are in the thousands, hence the relative limit.
    assert_close(ours.sequences_scores, scores, atol=1e-4, rtol=5e-7, what="scores")
    return ours


def test_all_models(pair):
    free = compare(pair, [], num_beams=4)
    assert set(free.lengths) == {NEW}
    new = free.sequences[:, PROMPTS["input_ids"].shape[1] :]
    ends = {int(row[k]) for row, k in zip(new, (3, 5, 7, 4, 2, 6, 8, 9), strict=True)}
    assert len(set(compare(pair, sorted(ends), num_beams=4).lengths)) > 1


@pytest.mark.combinations
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 2.5, 0.3])
def test_stopping_and_penalties(one_pair, early_stopping, length_penalty):
    options = dict(early_stopping=early_stopping, length_penalty=length_penalty)
    for eos, new in ((MANY, NEW), (MANY[:1], NEW), (MANY[:4], 7)):
        compare(one_pair, eos, num_beams=3, max_new_tokens=new, **options)


def test_the_options_matter(one_pair):
    """Different options give different results, so the test above can fail."""
    ids, mask = PROMPTS.values()

    def run(**options):
        out = our_beams(one_pair[1], ids, mask, MANY, num_beams=3, **options)
        return out.sequences[:, ids.shape[1] :].tolist(), out.lengths.tolist()

    seen = [
        run(early_stopping=early, length_penalty=penalty)
        for early, penalty in [(False, 1.0), (True, 1.0), ("never", 1.0), (False, 0.0), (False, 2.5), ("never", 2.5)]
    ]
    assert len({str(x) for x in seen}) >= 4
    assert len({length for _, lengths in seen for length in lengths}) > 4, seen


@pytest.mark.parametrize(("num_beams", "slots", "early_stopping"), [(2, 8, False), (6, 24, "never")])
def test_random_combinations(one_pair, num_beams, slots, early_stopping):
    random = np.random.RandomState(num_beams)
    for _ in range(5):
        ids = random.randint(3, 99, (3, 8))
        mask = np.arange(8) >= random.randint(0, 8, (3, 1))
        ids[~mask] = 1
        eos = random.choice(np.arange(3, 99), random.randint(slots - 7, slots + 1), replace=False).tolist()
        compare(
            one_pair,
            eos,
            ids,
            mask.astype(np.int64),
            num_beams=num_beams,
            early_stopping=early_stopping,
            length_penalty=random.uniform(-0.5, 3),
            max_new_tokens=int(random.randint(1, NEW + 1)),
        )


def test_process(one_pair):
    """Processors see log-probabilities, not logits, and all earlier tokens of their beam."""
    ids = PROMPTS["input_ids"][:2, 3:]  # without pads, because HF's processors see them as tokens
    ids = np.where(ids == 1, 5, ids)
    plain = hf_beams(one_pair[0], ids, np.ones_like(ids), MANY, num_beams=3)
    sequences, scores = hf_beams(one_pair[0], ids, np.ones_like(ids), MANY, num_beams=3, repetition_penalty=1.7)
    assert plain[0].shape != sequences.shape or (plain[0] != sequences).any()
    ours = our_beams(one_pair[1], ids, np.ones_like(ids), MANY, num_beams=3, repetition_penalty=1.7)
    np.testing.assert_array_equal(ours.sequences, sequences)
    assert_close(ours.sequences_scores, scores, atol=1e-4, rtol=5e-7, what="scores")


def test_stop_strings():
    """A stop string ends a beam, as an end token does."""
    from opt_jax import OPTTokenizer
    from opt_jax.checkpoints import hub

    tok = OPTTokenizer.from_pretrained("tiny")
    folder = hub.resolve("tiny")
    files: dict[str, Any] = dict(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    names: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>") | dict(pad_token="<pad>")
    theirs = transformers.GPT2Tokenizer(**files, **names)
    hf, model = talkative_pair("opt-125m", vocab_size=len(tok))
    ids = np.random.RandomState(0).randint(3, len(tok), (3, 6))
    plain = our_beams(model, ids, np.ones_like(ids), [], num_beams=3)
    texts = [tok.decode(row[6:]) for row in plain.sequences]
    strings = [texts[0][3:5], texts[3][4:7], texts[4][6:8]]
    sequences, scores = hf_beams(
        hf, ids, np.ones_like(ids), [], num_beams=3, stop_strings=strings, tokenizer=theirs, max_new_tokens=NEW
    )
    ours = our_beams(model, ids, np.ones_like(ids), [], num_beams=3, stop_strings=strings, tokenizer=tok)
    assert plain.sequences.shape != ours.sequences.shape or (plain.sequences != ours.sequences).any()
    np.testing.assert_array_equal(ours.sequences, sequences)
    assert_close(ours.sequences_scores, scores, atol=1e-4, rtol=5e-7, what="scores")
    assert "stop" in ours.finish_reasons


@pytest.mark.parametrize(
    ("eos", "options"),
    [
        ([3], dict(max_new_tokens=2)),
        ([], dict(max_new_tokens=3, early_stopping="never", length_penalty=2.0, top_p=0.5)),
        ([], dict(max_new_tokens=3, top_k=1)),  # with beams, top_k=1 keeps two tokens
    ],
    ids=["free", "top_p", "top_k"],
)
def test_sampling(eos, options):
    """Pairs of sequences have the same distribution. Chi-square."""
    hf = make_hf("opt-125m", vocab_size=7, num_hidden_layers=1)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter *= 0.4  # or one sequence would have nearly all probability
    rows = 4000
    ids = np.tile([[4, 5, 3]], (rows, 1))
    options = dict(num_beams=2, do_sample=True, top_k=0) | options
    torch.manual_seed(0)
    theirs, _ = hf_beams(hf, ids, np.ones_like(ids), eos, **options)
    ours = to_jax(hf, "OPTForCausalLM").generate(
        ids, np.ones_like(ids), eos_token_id=eos, pad_token_id=1, num_return_sequences=RETURNED, seed=1, **options
    )
    assert ours.sequences.shape == theirs.shape
    both = np.concatenate([x[:, 3:].reshape(rows, -1) for x in (theirs, ours.sequences)])
    _, which = np.unique(both, axis=0, return_inverse=True)
    counts = np.stack([np.bincount(x, minlength=which.max() + 1) for x in np.split(which.ravel(), 2)])
    few = counts.sum(0) < 16  # these are one cell
    counts = np.column_stack([counts[:, ~few], counts[:, few].sum(1)])
    counts = counts[:, counts.sum(0) > 0]
    if options["top_k"] == 1:
        assert counts.shape[1] == 1  # all pairs are the same
    else:
        result: Any = scipy.stats.chi2_contingency(counts)
        assert counts.shape[1] > 5 and result.pvalue > 0.01
