"""The token-by-token decoder and the pipeline, with the small tokenizer of test_tokenizer.py."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
from support.processes import environment
from test_tokenizer import HARD, files, tok
from tokenizers import pre_tokenizers

from opt_jax.text.pipelines import pipeline
from opt_jax.text.streaming import TextStream
from opt_jax.text.tokenizer import OPTTokenizer

assert files and tok  # fixtures


def test_text_needs_no_jax():
    code = "import sys, opt_jax.text; assert not {'jax', 'transformers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(START="fresh"))


@pytest.mark.parametrize("skip", [True, False])
def test_stream_equals_decode(tok, skip):
    rng = np.random.default_rng(0)
    streams = [tok.encode(text) for text in HARD]
    streams += [rng.integers(0, 330, size).tolist() for size in (1, 2, 3, 50, 500)]  # mostly invalid UTF-8
    byte_ids = [i for i in range(320) if len(tok.backend_tokenizer.id_to_token(i)) == 1]
    streams += [rng.choice(byte_ids, 320).tolist() for _ in range(20)]
    for ids in streams:
        stream = TextStream(tok, skip_special_tokens=skip)
        for _ in range(2):  # a stream can be used again after `end`
            pieces = [stream.put(i) for i in ids] + [stream.end()]
            assert "".join(pieces) == tok.decode(ids, skip_special_tokens=skip)
            assert stream.put(np.array(ids, np.int32)) + stream.end() == tok.decode(ids, skip_special_tokens=skip)


def test_stream_never_splits_a_character(files, tok):
    text = "日本語 👩‍👩‍👧‍👦 hello"
    ids = [tok.backend_tokenizer.token_to_id(char) for char in _bytes_as_tokens(text)]
    stream = TextStream(tok)
    pieces = [stream.put(i) for i in ids]
    assert "".join(pieces) == text and "\ufffd" not in text
    assert list(itertools.accumulate(pieces))[:3] == ["", "", "日"]  # three bytes
    for n in range(len(ids)):  # after any prefix, at most one character is held back
        stream.put(ids[:n])
        assert stream.end() in ("", "\ufffd")
    assert tok.decode(ids[:2]) == "\ufffd"
    added = OPTTokenizer.from_file(
        files / "vocab.json", files / "merges.txt", {"added_tokens_decoder": {"320": {"content": "ein Wort ü日"}}}
    )
    stream = TextStream(added)
    assert stream.put(320) == added.decode([320]) == "ein Wort ü日"


def _bytes_as_tokens(text):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def small_model(**changes):
    from flax import nnx

    from opt_jax import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=320, hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=1, init_std=0.5
    )
    return OPTForCausalLM(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.slow
def test_pipeline_gives_what_generate_gives(tok, model):
    prompts = ["hello world", "the line", "", "日本"]
    pipe = pipeline("text-generation", model=model, tokenizer=tok)
    out = pipe(prompts, max_new_tokens=6, do_sample=False)
    for prompt, result in zip(prompts, out, strict=True):
        inputs = tok(prompt, return_tensors="np")
        row = np.asarray(model.generate(**inputs, max_new_tokens=6)[0])
        assert row.shape == (inputs.input_ids.shape[1] + 6,)
        assert result == [{"generated_text": prompt + tok.decode(row[-6:], skip_special_tokens=True)}]
        assert pipe(prompt, max_new_tokens=6, do_sample=False) == result
    assert len({result[0]["generated_text"] for result in out}) == len(prompts)
    assert pipe(prompts, max_new_tokens=6, do_sample=False, batch_size=3) == out
    new = pipe("hello world", max_new_tokens=6, do_sample=False, return_full_text=False)
    assert [{"generated_text": "hello world" + new[0]["generated_text"]}] == out[0]
    longer = pipe("hello world", max_length=len(tok.encode("hello world")) + 6, do_sample=False)
    assert longer == out[0]
    assert pipe([], do_sample=False) == []


@pytest.mark.slow
def test_pipeline_samples_by_default(tok, model):
    pipe = pipeline(model=model, tokenizer=tok, max_new_tokens=12)
    first = pipe("hello")
    assert first == pipe("hello") == pipe("hello", do_sample=True, temperature=0.7, top_k=50, seed=0)
    assert first != pipe("hello", seed=1)
    assert first != pipe("hello", do_sample=False) == pipe("hello", top_k=1)
    assert len({str(result) for result in pipe(["hello"] * 4, batch_size=1)}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("context", [40, 512])
def test_pipeline_default_length(tok, context):
    """256 new tokens, or as many as fit into the context."""
    small = small_model(max_position_embeddings=context)
    inputs = tok("hello", return_tensors="np")
    width = inputs.input_ids.shape[1]
    length = {40: 40, 512: width + 256}[context]
    pipe = pipeline(model=small, tokenizer=tok, do_sample=False, skip_special_tokens=False, eos_token_id=[])
    want = small.generate(**inputs, max_length=length, eos_token_id=[])
    assert want.sequences.shape == (1, length)
    assert pipe("hello") == [{"generated_text": "hello" + tok.decode(want[0][width:])}]


@pytest.mark.slow
def test_usage_as_in_transformers(tok, model, tmp_path):
    """The two examples of transformers' page on OPT, with the import, the model and "np" changed."""
    model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    from opt_jax import AutoModelForCausalLM, AutoTokenizer, pipeline

    text = "Plants create energy"
    generator = pipeline(task="text-generation", model=name, dtype="auto")
    (result,) = generator(text, max_new_tokens=5, do_sample=False)
    assert list(result) == ["generated_text"] and result["generated_text"].startswith(text)
    assert [result] == pipeline(model=model, tokenizer=name)(text, max_new_tokens=5, do_sample=False)

    tokenizer = AutoTokenizer.from_pretrained(name)
    loaded = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    inputs = tokenizer(text, return_tensors="np")
    outputs = loaded.generate(**inputs, max_length=50)
    assert tokenizer.decode(outputs[0]).startswith("</s>" + text)


def test_pipeline_errors(tok, model):
    with pytest.raises(ValueError, match="fill-mask"):
        pipeline("fill-mask", model=model, tokenizer=tok)
    with pytest.raises(ValueError, match="tokenizer="):
        pipeline(model=model)
    with pytest.raises(ValueError, match="dtype"):
        pipeline(model=model, tokenizer=tok, dtype="auto")
    pipe = pipeline(model=model, tokenizer=tok)
    with pytest.raises(ValueError, match="chat"):
        pipe([{"role": "user", "content": "hello"}])  # type: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="batch_size=0"):
        pipe("hello", batch_size=0)
    with pytest.raises(ValueError, match="logprobs are no part of a pipeline's result"):
        pipe("hello", logprobs=1)
    with pytest.raises(ValueError, match="handle_long_generation"):
        pipe("hello", handle_long_generation="hole")
