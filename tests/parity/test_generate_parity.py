"""Tokens of `transformers`' `generate`. Its processors: test_processors_parity.py."""

import json
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
        ids = None if input_ids is None else torch.tensor(input_ids, dtype=torch.int64)
        return hf.generate(ids, **mask, **options).numpy()


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


def right_padded(ids, mask):
    """The rows, with their pads moved behind the tokens."""
    order = np.argsort(mask == 0, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(mask, order, axis=1)


def test_prompts_padded_on_the_right(one_pair):
    """HF's own tests of OPT pass them so. Here the tokens are those of HF for prompts padded on the left."""
    ids, mask = PROMPTS.values()
    options = dict(max_new_tokens=12, eos_token_id=5)
    theirs = hf_generate(one_pair[0], ids, mask, **options)
    with pytest.warns(UserWarning, match="padded on the right"):
        ours = one_pair[1].generate(*right_padded(ids, mask), **options).sequences
    np.testing.assert_array_equal(ours, theirs)


def assert_same_for_embeddings(pair, mask, **options):
    """With the ids the processors see them, and they are part of the result; without them neither, as in HF."""
    ids, results = PROMPTS["input_ids"], []
    embeds = np.random.RandomState(3).randn(*ids.shape, pair[1].config.word_embed_proj_dim).astype(np.float32)
    for given in (None, ids):
        theirs = hf_generate(pair[0], given, mask, inputs_embeds=torch.tensor(embeds), **options)
        ours = pair[1].generate(given, mask, inputs_embeds=embeds, **options).sequences
        np.testing.assert_array_equal(ours, theirs)
        results.append(ours)
    assert results[0].shape[1] <= 12 < results[1].shape[1]


def test_embeddings(pair):
    assert_same_for_embeddings(pair, PROMPTS["attention_mask"], max_new_tokens=12, eos_token_id=[5, 17, 40])


def test_embeddings_with_options(one_pair):
    mask = PROMPTS["attention_mask"]
    beams = dict(num_beams=3, num_return_sequences=2, min_length=16, no_repeat_ngram_size=2)
    assert_same_for_embeddings(one_pair, mask, max_new_tokens=12, eos_token_id=[5, 17, 40], **beams)
    # No pads: HF's penalty would pass over as many new tokens as a row has pads, as if they were those.
    processors = dict(repetition_penalty=1.4, no_repeat_ngram_size=2, begin_suppress_tokens=[5, 17, 40])
    assert_same_for_embeddings(one_pair, None, max_length=22, pad_token_id=2, **processors)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(use_cache=False, remove_invalid_values=True, disable_compile=True, assistant_lookbehind=3),
        dict(
            cache_implementation="dynamic",
            cache_config={"backend": "x"},
            output_scores=True,
            return_dict_in_generate=True,
        ),
        dict(do_sample=False, num_beams=1, max_new_tokens=5, low_memory=True, our_own_note=[1, 2]),
    ],
    ids=lambda o: "-".join(o),
)
def test_files_that_hf_writes(one_pair, monkeypatch, tmp_path, options):
    """Its `save_pretrained` of a model and of a config: the file, all fields of it, never stops a call."""
    hf, model = one_pair
    config = transformers.GenerationConfig(**options)
    config.save_pretrained(tmp_path / "differences")
    config.to_json_file(tmp_path / "all.json", use_diff=False)
    ids, mask = PROMPTS.values()
    monkeypatch.setattr(hf, "generation_config", config)
    theirs = hf_generate(
        hf, ids, mask, pad_token_id=1, max_new_tokens=6, eos_token_id=-1, return_dict_in_generate=False
    )
    for path in (tmp_path / "differences" / "generation_config.json", tmp_path / "all.json"):
        monkeypatch.setattr(model, "generation_config_json", path.read_text())
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            ours = model.generate(ids, mask, pad_token_id=1, max_new_tokens=6, eos_token_id=[]).sequences
        np.testing.assert_array_equal(ours, theirs)
        left_out = options.keys() - {"do_sample", "num_beams", "max_new_tokens", "return_dict_in_generate"}
        assert len(noted) == bool(left_out) and all(f"{name}=" in str(noted[0].message) for name in left_out)


def test_none_undoes_an_option_of_the_file(one_pair, monkeypatch):
    hf, model = one_pair
    options = dict(repetition_penalty=2.5, suppress_tokens=[7, 8, 9], max_new_tokens=8, eos_token_id=[5, 17])
    monkeypatch.setattr(hf, "generation_config", transformers.GenerationConfig(**options))
    monkeypatch.setattr(model, "generation_config_json", json.dumps(options))
    results = []
    for names in ((), ("repetition_penalty",), ("repetition_penalty", "suppress_tokens")):
        theirs, ours = both(one_pair, *PROMPTS.values(), pad_token_id=1, **dict.fromkeys(names))
        np.testing.assert_array_equal(ours, theirs)
        results.append(ours.tolist())
    assert results[0] != results[1] != results[2]


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
