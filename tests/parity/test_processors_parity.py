"""Logits after our processors, inside `jax.jit`, and after those that `transformers` builds from the same options.

HF sees each row alone, without padding. We see the rows of one batch, padded. So pads must not count.
"""

from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from limits import assert_close
from oracle import make_hf, torch, transformers
from reference import our_model

from opt_jax.generation import sampling
from opt_jax.generation.config import SAMPLING
from opt_jax.generation.processors import History
from opt_jax.generation.request import check_request

VOCABULARY, NEW, COLUMNS = 99, 12, 40  # of reference.CONFIGS["opt-125m"]
ENDS = [2, 17]
LENGTHS = (9, 6, 3, 1)  # of the prompts


@lru_cache
def models():
    return make_hf("opt-125m"), our_model("opt-125m")


def draw_case(seed: int, step: int) -> tuple[np.ndarray, list[list[int]], list[list[int]]]:
    """(logits, prompts, new tokens). They have few different tokens, so that n-grams and words repeat."""
    random = np.random.RandomState(seed)
    logits = random.standard_normal((len(LENGTHS), VOCABULARY)).astype(np.float32) * 3
    logits[:, ENDS] += 6  # likely, so that suppressing them matters
    rows = [random.randint(3, 8, n + step).tolist() for n in LENGTHS]
    rows[0] = [3 + i % 5 for i in range(LENGTHS[0] + step)]  # long repetitions
    cut = [(row[:n], row[n:]) for row, n in zip(rows, LENGTHS, strict=True)]
    return logits, [prompt for prompt, _ in cut], [new for _, new in cut]


def theirs(options: dict[str, Any], logits, prompts, new) -> np.ndarray:
    hf, _ = models()
    options = dict(options)
    ours_only = {name: options.pop(name, 0.0) for name in ("presence_penalty", "frequency_penalty")}
    rows = []
    for row, prompt, continuation in zip(logits, prompts, new, strict=True):
        config = transformers.GenerationConfig(
            eos_token_id=ENDS, max_length=len(prompt) + NEW, **({"top_k": 0} | options)
        )
        config._eos_token_tensor = torch.tensor(ENDS)
        chain = hf._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt),
            model_kwargs={"attention_mask": torch.ones((1, len(prompt)), dtype=torch.int64)},
        )
        place = int(bool(chain) and isinstance(chain[0], transformers.RepetitionPenaltyLogitsProcessor))
        chain.insert(place, partial(openai_penalties, len(prompt), **ours_only))
        rows.append(chain(torch.tensor([prompt + continuation]), torch.tensor(row[None])).numpy()[0])
    return np.stack(rows)


def openai_penalties(prompt_length, input_ids, scores, *, presence_penalty, frequency_penalty):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence: https://platform.openai.com/docs/guides/text-generation."""
    counts = torch.bincount(input_ids[0, prompt_length:], minlength=VOCABULARY)
    return scores - counts * frequency_penalty - (counts > 0).float() * presence_penalty


process = jax.jit(sampling.process, static_argnames=("do_sample", "min_keep"))


def ours(options: dict[str, Any], logits, prompts, new) -> np.ndarray:
    width = max(map(len, prompts))
    ids = np.array([[1] * (width - len(p)) + p for p in prompts], np.int32)
    request = check_request(models()[1], ids, options=dict(options, eos_token_id=ENDS, max_new_tokens=NEW))
    step, used = len(new[0]), request.width + len(new[0])
    tokens, valid = np.zeros((len(ids), COLUMNS), np.int32), np.zeros((len(ids), COLUMNS), bool)
    tokens[:, : request.width], valid[:, : request.width] = request.prompts.tokens, request.prompts.mask
    tokens[:, request.width : used], valid[:, request.width : used] = new, True
    tokens[~valid] = np.tile(3 + np.arange(COLUMNS) % 5, (len(ids), 1))[~valid]  # pads and the future must not count
    counts = (np.full(len(ids), x, np.int32) for x in (used, step))
    history = History(tokens, valid, *counts)  # type: ignore[reportArgumentType]
    kept = {} if request.num_beams == 1 else {"min_keep": len(ENDS) + 1}
    return np.asarray(process(logits, history, request.options, do_sample=request.do_sample, **kept))


def compare(options, seed=0, steps=(0, 1, 4, NEW - 1)):
    changed = False
    for step in steps:
        case = draw_case(seed + step, step)
        expected, got = theirs(options, *case), ours(options, *case)
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected), str((options, step)))
        kept = np.isfinite(expected)
        # Divided by a temperature, logits are in the hundreds, hence the relative limit.
        assert_close(got[kept], expected[kept], atol=1e-5, rtol=5e-7, what=f"logits, {options}, step {step}")
        changed |= not np.array_equal(got, case[0])
    return changed


SAMPLE = dict(do_sample=True)
WORDS = [[9], [2], [3, 4], [4, 3, 5], [5], [7, 7], [3, 3, 4, 6, 5], [6, 4, 20], [98]]
CHOICES: dict[str, list[Any]] = {
    "temperature": [0.3, 2.5],
    "top_k": [1, 40, 98, 5000],
    "top_p": [1e-4, 0.3, 0.95, 0.999],
    "min_p": [0.01, 0.2, 1.0],
    "typical_p": [1e-4, 0.2, 0.9, 0.999],
    "repetition_penalty": [0.7, 1.3, 5.0],
    "presence_penalty": [1.5, -0.5],
    "frequency_penalty": [0.8, -2.0],
    "no_repeat_ngram_size": [1, 2, 3, 5],
    "bad_words_ids": [WORDS[:1], WORDS[1:5], WORDS, [[3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 4, 5, 6]]],
    "suppress_tokens": [[2], [5, 6, 7, 98], list(range(0, 60, 3))],
    "begin_suppress_tokens": [[2, 5], [0, 98]],
    "min_new_tokens": [1, 6],
    "forced_bos_token_id": [7],
    "forced_eos_token_id": [2, [2, 17]],
}
ALONE = [(name, value) for name, values in CHOICES.items() for value in values]
OF_SAMPLING = tuple(SAMPLING)


@pytest.mark.parametrize(("name", "value"), ALONE, ids=lambda x: str(x)[:24])
def test_alone(name, value):
    options = {name: value} | (SAMPLE if name in OF_SAMPLING else {})
    harmless = name == "top_k" and value == 5000 or name == "top_p" and value == 0.999
    assert compare(options) or harmless


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=1),
        dict(top_p=1e-4),
        dict(min_p=1.0),
        dict(typical_p=1e-4),
        dict(temperature=0.5, top_k=4, top_p=0.3, min_p=0.9, typical_p=0.2, repetition_penalty=1.3),
    ],
    ids=lambda o: "-".join(o),
)
def test_of_beams(options):
    """Each beam keeps one token more than there are end tokens, so that it can go on."""
    options = SAMPLE | options
    assert compare(options | dict(num_beams=3))
    case = draw_case(0, 1)
    alone, beams = (np.isfinite(ours(o, *case)).sum(1) for o in (options, options | dict(num_beams=3)))
    assert (beams == len(ENDS) + 1).all() and (alone < beams).any()


def test_begin_suppress_waits_for_a_forced_first_token():
    """After a prompt of one token, the second new token is the first that is not forced."""
    assert compare(dict(forced_bos_token_id=7, begin_suppress_tokens=ENDS))


@pytest.mark.parametrize("least", [11, 14])
def test_min_length(least, monkeypatch):
    """It counts columns, pads included, so the rows here have one length."""
    monkeypatch.setattr(f"{__name__}.LENGTHS", (9, 9))
    assert compare({"min_length": least})


def random_options(random) -> dict[str, Any]:
    names = [name for name in CHOICES if random.rand() < 0.4]
    options = {name: CHOICES[name][random.randint(len(CHOICES[name]))] for name in names}
    forced = [options.get(name) for name in ("forced_bos_token_id", "forced_eos_token_id")]
    if any(token in options.get("suppress_tokens", []) for token in forced):
        del options["suppress_tokens"]  # both refuse to force a suppressed token
    return options | (SAMPLE if any(name in OF_SAMPLING for name in names) else {})


def test_combinations(sample):
    seeds = sample(range(50), 15)
    cases = {seed: random_options(np.random.RandomState(seed)) for seed in seeds}
    assert set().union(*cases.values()) == CHOICES.keys() | SAMPLE.keys()  # each processor is drawn
    assert {seed % 2 for seed in seeds} == {0, 1}  # and all steps are tested
    for seed, options in cases.items():
        compare(options, 100 * seed, steps=(0, 1, 7) if seed % 2 else (3, NEW - 1))


def test_values_are_traced_and_unused_processors_cost_nothing():
    """One program serves all values. Neutral values give the program of plain sampling."""
    before = process._cache_size()  # type: ignore[reportFunctionMemberAccess]
    many = {name: values for name, values in CHOICES.items() if name != "bad_words_ids"}
    for pick in (0, -1):
        options = {name: values[pick] for name, values in many.items()}
        if pick:
            options["forced_eos_token_id"] = 17
        options["bad_words_ids"] = WORDS[pick - 3 : pick - 1]
        options["suppress_tokens"] = [[0, 1], [3]][pick]
        ours(options | SAMPLE, *draw_case(3, 4))
    assert process._cache_size() - before <= 1  # type: ignore[reportFunctionMemberAccess]

    def operations(**options):
        request = check_request(models()[1], np.array([[5]]), options=options)
        counts = np.ones(1, np.int32), np.zeros(1, np.int32)
        history = History(*(np.zeros((1, 20), t) for t in (np.int32, bool)), *counts)  # type: ignore[reportArgumentType]
        jaxpr = jax.make_jaxpr(partial(sampling.process, do_sample=False))
        return jaxpr(np.zeros((1, 99), np.float32), history, request.options).jaxpr.eqns

    neutral = dict(
        repetition_penalty=1.0, presence_penalty=0, frequency_penalty=0, no_repeat_ngram_size=0, suppress_tokens=[]
    )
    plain = operations()
    assert len(operations(**neutral)) == len(plain)
    over_vocabulary = [o.primitive.name for o in plain if any(x.aval.shape == (1, 99) for x in o.outvars)]
    assert over_vocabulary == ["scatter-min"]  # it suppresses end tokens that would come too early
