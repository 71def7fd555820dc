"""Texts through a model: stop strings, pieces of text, scores. (The pipeline itself: test_text.py.)"""

import copy
import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from support.small_models import first_layers
from support.stop_strings import stop_lengths

from opt_jax import GenerationConfig, OPTTokenizer, pipeline, score_texts, stream_text
from opt_jax.text.streaming import StopStrings, TextBeforeStop

PROMPTS = ["def main():\n", "import", "class Parser:\n    def __init__(self", "x"]
NEW = 24


@pytest.fixture(scope="module")
def tok():
    return OPTTokenizer.from_pretrained("tiny")


@pytest.fixture(scope="module")
def model():
    return first_layers()


def first_end(tok, prompt: str, ids: list[int], strings) -> int:
    """The number of tokens up to the first one that completes one of the strings, by definition."""
    for n in range(1, len(ids) + 1):
        before = prompt + tok.decode(ids[: n - 1])
        now = prompt + tok.decode(ids[:n])
        if any(now.find(s, max(0, len(before) - len(s) + 1)) >= 0 for s in strings):
            return n
    return len(ids)


@pytest.mark.slow
def test_stop_strings_end_rows(tok, model):
    inputs = tok(PROMPTS)
    width = inputs.input_ids.shape[1]
    free = model.generate(**inputs, max_new_tokens=NEW, eos_token_id=[])[:, width:]
    texts = [tok.decode(row) for row in free]
    strings = [texts[0][5:9], texts[1][2:4], texts[2][:3]]
    lengths = [first_end(tok, p, row.tolist(), strings) for p, row in zip(PROMPTS, free, strict=True)]
    assert 0 < min(lengths) < max(lengths) and len(set(lengths)) > 2
    options = dict(max_new_tokens=NEW, eos_token_id=[], stop_strings=strings, tokenizer=tok)
    out = model.generate(**inputs, **options)
    assert out.lengths.tolist() == lengths
    assert out.finish_reasons == ["stop" if n < NEW else "length" for n in lengths]
    expected = [row[:n].tolist() + [1] * (max(lengths) - n) for row, n in zip(free, lengths, strict=True)]
    assert out.sequences[:, width:].tolist() == expected
    pipe = pipeline(model=model, tokenizer=tok, do_sample=False, max_new_tokens=NEW, eos_token_id=[])
    stopped = [tok.decode(row[:n]) for row, n in zip(free, lengths, strict=True)]
    result = pipe(PROMPTS, stop_strings=strings, return_full_text=False)
    assert [r[0]["generated_text"] for r in result] == stopped
    for prompt, text in zip(PROMPTS, stopped, strict=True):
        pieces = list(stream_text(model, tok, prompt, max_new_tokens=NEW, eos_token_id=[], stop_strings=strings))
        assert "".join(pieces) == text and all(pieces)


def cut_at_stop(tok, prompt: str, ids: list[int], strings) -> tuple[str, str | None]:
    """By definition, on the text of all tokens: what is before the string that ends first, and this string."""
    text = prompt + tok.decode(ids)
    ends = {s: end for s in strings if (end := text.find(s, max(0, len(prompt) - len(s) + 1)) + len(s)) >= len(s)}
    if not ends:
        return text[len(prompt) :], None
    string = min(ends, key=lambda s: (ends[s], -len(s)))
    return text[len(prompt) : max(len(prompt), ends[string] - len(string))], string


@pytest.mark.slow
def test_stop_strings_are_left_out_on_request_and_named(tok, model):
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=[], do_sample=False)
    inputs = tok(PROMPTS)
    free = model.generate(**inputs, **options)[:, inputs.input_ids.shape[1] :]
    texts = [tok.decode(row) for row in free]
    # within a token, over several, from the prompt on, one within another, one that only begins, and one in no text
    strings = [
        texts[0][6:8],
        texts[1][2:9],
        "\n" + texts[0][:1],
        texts[2][3:5],
        texts[2][2:5],
        texts[3][:4] + "zq",
        "zq",
    ]
    expected = [cut_at_stop(tok, p, row.tolist(), strings) for p, row in zip(PROMPTS, free, strict=True)]
    assert len({string for _, string in expected}) > 2 and expected[0] == ("", strings[2]) and expected[3][1] is None
    out = model.generate(**inputs, **options, stop_strings=strings, tokenizer=tok)
    assert out.stop_reasons == [string for _, string in expected]
    assert model.generate(**inputs, **options).stop_reasons is None
    pipe = pipeline(model=model, tokenizer=tok, **options, return_full_text=False, stop_strings=strings)
    kept, left_out = pipe(PROMPTS), pipe(PROMPTS, include_stop_str_in_output=False)
    assert left_out == [[{"generated_text": text, "stop_reason": string}] for text, string in expected]
    assert [row["stop_reason"] for (row,) in kept] == out.stop_reasons
    assert all(row["generated_text"].startswith(text) for (row,), (text, _) in zip(kept, expected, strict=True))
    assert kept != left_out
    result = pipe(PROMPTS[1], include_stop_str_in_output=False, return_full_text=True, batch_size=None)
    assert result == [{"generated_text": PROMPTS[1] + expected[1][0], "stop_reason": expected[1][1]}]
    for prompt, (text, _) in zip(PROMPTS, expected, strict=True):
        more: dict[str, Any] = dict(options, stop_strings=strings, include_stop_str_in_output=False)
        pieces = list(stream_text(model, tok, prompt, **more))
        assert "".join(pieces) == text and all(pieces)
    for call in (pipeline(model=model, tokenizer=tok), lambda *a, **k: stream_text(model, tok, *a, **k)):
        with pytest.raises(ValueError, match="include_stop_str_in_output=False without effect: pass stop_strings"):
            call("x", include_stop_str_in_output=False)
        with pytest.raises(ValueError, match="include_stop_str_in_output=3 must be True or False"):
            call("x", include_stop_str_in_output=3, stop_strings="x")


def test_text_before_a_stop_comes_as_soon_as_it_is_known(tok):
    """Also of special tokens, which count and are not shown, and of characters that several tokens make up."""

    def pieces(text, strings, prompt=""):
        ids = [tok.backend_tokenizer.token_to_id(c) for c in _byte_tokens(text)]
        stops = StopStrings.of(tok, strings, [np.array(tok.encode(prompt, add_special_tokens=False))], len(tok))
        stream = TextBeforeStop(stops)
        return [*map(stream.put, ids), stream.end()]

    assert pieces("abcabd", "abd") == ["", "", "abc", "", "", "", ""]
    assert pieces("abcab", "abd") == ["", "", "abc", "", "", "ab"]
    assert pieces("cd", "bcd", prompt="ab") == ["", "", ""] and pieces("cx", "bcd", prompt="ab") == ["", "cx", ""]
    assert "".join(pieces("日本 é", "é")) == "日本 " and "".join(pieces("日本", "本x")) == "日本"
    ids, end = tok.encode("a", add_special_tokens=False), tok.eos_token_id
    stops = StopStrings.of(tok, "s>a", [np.array([], np.int32)], len(tok))
    for skip, text in ((True, "a"), (False, "a</")):
        stream = TextBeforeStop(stops, 0, skip)
        assert stream.put([*ids, end, *ids]) + stream.end() == text


def test_stop_strings_straddle_tokens_and_characters(tok):
    """A string of the text stops it at the token in which it ends. The text is cut into tokens in two ways."""
    text = "naïve 日本語 </s> 👩‍👩‍👧‍👦 def f(x): return x"
    bytewise = [tok.backend_tokenizer.token_to_id(c) for c in _byte_tokens(text)]
    for ids in (tok.encode(text, add_special_tokens=False), bytewise):
        pieces = [tok.token_bytes(i) for i in ids]
        ends = list(itertools.accumulate(map(len, pieces)))
        assert b"".join(pieces).decode() == text
        for start, stop in itertools.combinations(range(0, len(text) + 1, 3), 2):
            string = text[start:stop]
            at = text.encode().find(string.encode()) + len(string.encode())
            stops = StopStrings.of(tok, string, [np.array([], np.int32)], len(tok))
            assert stop_lengths(stops, np.array([ids])) == [1 + next(n for n, end in enumerate(ends) if end >= at)]


def _byte_tokens(text):
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def test_a_long_token_does_not_make_the_others_long(tok):
    tok = copy.deepcopy(tok)
    tok.add_tokens("x" * 2_000 + "END")
    tracemalloc.start()
    stops = StopStrings.of(tok, ["xEND"], [np.array([], np.int32)], 20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert stop_lengths(stops, np.array([[3, len(tok) - 1]])) == [2]


def test_stop_strings_may_begin_in_the_prompt_and_not_end_there(tok):
    prompt, new = (np.array(tok.encode(text, add_special_tokens=False)) for text in ("stop here: st", "op it"))
    for strings, length in (
        ("stop", 1),
        (["zzz", "here: stop"], 1),
        ("stop here", None),
        ([": st", "a longer one"], None),
        ("it", 2),
    ):
        pieces = [tok.decode([i]) for i in new]
        assert pieces[0] == "op" and "".join(pieces) == "op it"
        assert stop_lengths(StopStrings.of(tok, strings, [prompt], len(tok)), new[None]) == [length], strings
        silent = np.append(prompt, [len(tok)] * 50)  # tokens without a text
        assert (
            StopStrings.of(tok, strings, [silent], len(tok) + 1).states
            == StopStrings.of(tok, strings, [prompt], len(tok)).states
        )


@pytest.mark.slow
def test_a_stream_is_one_text_whatever_the_checkpoint_says(tok, model, monkeypatch):
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=True)
    expected = list(stream_text(model, tok, "def", **options))
    monkeypatch.setattr(model, "generation_config_json", '{"num_return_sequences": 2}')
    assert list(stream_text(model, tok, "def", **options)) == expected


def test_options_of_a_pipeline_come_in_layers(tok, model):
    """A call overrides what the pipeline was made with; in both, arguments override `generation_config`."""
    greedy: dict[str, Any] = dict(do_sample=False, max_new_tokens=5)
    expected = pipeline(model=model, tokenizer=tok)("def", **greedy)
    config = GenerationConfig(do_sample=True, temperature=0.5, max_length=9)
    assert pipeline(model=model, tokenizer=tok)("def", generation_config=config, **greedy) == expected
    assert pipeline(model=model, tokenizer=tok, generation_config=config)("def", **greedy) == expected
    assert pipeline(model=model, tokenizer=tok, temperature=0.5, max_length=9)("def", **greedy) == expected
    pipe = pipeline(model=model, tokenizer=tok, max_length=9, do_sample=False)
    assert pipe("def", generation_config=GenerationConfig(max_new_tokens=5)) == expected
    with pytest.raises(ValueError, match=r"must be an opt_jax.GenerationConfig, not a dict .*from_dict"):
        pipeline(model=model, tokenizer=tok)("def", generation_config={"top_k": 3})


@pytest.mark.parametrize("strings", [[], "", ["a", ""], [3], [None]])
def test_bad_stop_strings(tok, model, strings):
    with pytest.raises(ValueError, match="stop_strings="):
        model.generate([[5]], stop_strings=strings, tokenizer=tok)


@pytest.mark.slow
def test_stream_text_gives_whole_characters(tok, model):
    byte_ids = [i for i in range(len(tok)) if len(tok.token_bytes(i)) == 1]
    assert len(byte_ids) > 200
    banned = [i for i in range(len(tok)) if i not in byte_ids]
    options = dict(max_new_tokens=40, do_sample=True, temperature=5.0, suppress_tokens=banned)
    pieces = list(stream_text(model, tok, "日", seed=3, **options))
    inputs = tok("日")
    ids = model.generate(**inputs, seed=3, **options)[0][inputs.input_ids.shape[1] :]
    assert "".join(pieces) == tok.decode(ids, skip_special_tokens=True) and len(pieces) > 5
    with pytest.raises(ValueError, match="one prompt, not 2"):
        stream_text(model, tok, tok(["a", "b"]))
    two_samples: dict[str, Any] = dict(do_sample=True, num_return_sequences=2)
    for options in (two_samples, dict(generation_config=GenerationConfig(**two_samples))):
        with pytest.raises(ValueError, match="num_return_sequences"):
            stream_text(model, tok, "a", **options)
    with pytest.raises(ValueError, match="top_q"):  # by the call, before the first piece is asked for
        stream_text(model, tok, "a", top_q=2)


def test_scores_of_texts(tok, model):
    texts = ["def main():\n    return 1", "x", "日本"]
    results = score_texts(model, tok, texts)
    for text, result in zip(texts, results, strict=True):
        ids = tok.encode(text)
        assert [token.token_id for token in result] == ids and result[0].logprob is None
        expected = model.score([ids])[0]
        np.testing.assert_allclose([token.logprob or 0 for token in result[1:]], expected[1:], atol=2e-5)
        assert result[1].text == tok.decode(ids[1:2])
    ends = score_texts(model, tok, [text[1:] for text in texts[::2]], prompts=["d", "日"])
    for prompt, text, result in zip("d日", ["ef main():\n    return 1", "本"], ends, strict=True):
        first, rest = tok.encode(prompt), tok.encode(text, add_special_tokens=False)
        expected = model.score([first + rest])[0, len(first) :]
        assert [token.token_id for token in result] == rest
        np.testing.assert_allclose([token.logprob or 0 for token in result], expected, atol=2e-5)
    assert score_texts(model, tok, []) == []
    for bad, words in (
        ((["a"], ["b", "c"]), "2 prompts for 1 texts"),
        ((["a", ""], ["b", "c"]), "text 1 has no token"),
        (("abc",), "sequences of strings"),
    ):
        with pytest.raises(ValueError, match=words):
            score_texts(model, tok, *bad)
