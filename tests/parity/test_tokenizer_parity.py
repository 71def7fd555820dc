"""The tokenizer against that of `transformers`: ids, masks and texts, with OPT's files and with saved ones."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import tokenizers

from opt_jax import pipeline
from opt_jax.text.tokenizer import OPTTokenizer

transformers = pytest.importorskip("transformers", reason="parity tests compare with transformers")

# facebook/opt-*/tokenizer_config.json
FACEBOOK = {
    "tokenizer_class": "GPT2Tokenizer",
    "errors": "replace",
    "add_prefix_space": False,
    "add_bos_token": True,
    **{
        name: {"content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
        | {"__type": "AddedToken"}
        for name in ("bos_token", "eos_token", "unk_token")
    },
    "pad_token": {"__type": "AddedToken", "content": "<pad>", "single_word": False, "lstrip": False, "rstrip": False}
    | {"normalized": True},
}

HARD = [
    "",
    " ",
    "\n",
    "Hello world",
    "naïve café: 👩‍👩‍👧‍👦 🇨🇭 日本語 ﷽ e\u0301 \U0010ffff",
    "a\0b\0\0 \x01\x7f\x80\xa0\xad\ufeff\ufffd\u2028\u200b",
    "line\r\nline\r\n\r\nline\rline\n\n\n",
    "x" + " " * 5000 + "\t\t y  \u3000\u2003 z ",
    "in <pad> the<unk> middle <s>of</s>it <mask>, <|endoftext|> madeupword0000 </s",
    "</s> in front",
    "</s></s><pad>",
    "aaaa" * 3000,
    "I'm we'LL they've 12345 3.14 __init__(self) != 'x'",
]


@pytest.fixture(scope="module")
def opt_directory(shared_data, tmp_path_factory):
    """A directory with the files of facebook/opt-*."""
    folder = tmp_path_factory.mktemp("opt")
    for file in ("vocab.json", "merges.txt"):
        (folder / file).write_bytes((shared_data / "opt-tokenizer" / file).read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(FACEBOOK))
    (folder / "config.json").write_text('{"model_type": "opt"}')
    return folder


@pytest.fixture(scope="module")
def pair(opt_directory):
    return OPTTokenizer.from_pretrained(opt_directory), transformers.AutoTokenizer.from_pretrained(opt_directory)


@pytest.fixture(autouse=True)
def literal_bos():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ids begin with '</s>' twice")
        yield


def assert_same(ours, theirs, texts):
    for add in (True, False):
        got = [dict(ours(text, add_special_tokens=add, return_tensors=None)) for text in texts]
        assert got == [dict(theirs(text, add_special_tokens=add)) for text in texts]
    rows = [ours.encode(text) for text in texts]
    for skip in (False, True):
        assert ours.batch_decode(rows, skip_special_tokens=skip) == theirs.batch_decode(rows, skip_special_tokens=skip)


def test_wikitext(pair, shared_data):
    ours, theirs = pair
    text = (shared_data / "wikitext-2" / "test.txt").read_bytes().decode()
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert len(ids) > 250_000
    assert ours.decode(ids) == theirs.decode(ids) == "</s>" + text
    lines = text.split("\n")
    assert ours(lines, return_tensors=None).input_ids == theirs(lines)["input_ids"]


def test_hard_strings(pair):
    ours, theirs = pair
    assert_same(ours, theirs, HARD)


def test_special_tokens(pair):
    ours, theirs = pair
    for name in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert sorted(theirs.all_special_ids) == ours.all_special_ids == [1, 2]
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)


def test_bare_files_are_an_opt_tokenizer(pair, shared_data):
    """Without tokenizer_config.json too, we do what AutoTokenizer does for facebook/opt-*."""
    paths = (shared_data / "opt-tokenizer" / "vocab.json", shared_data / "opt-tokenizer" / "merges.txt")
    assert_same(OPTTokenizer.from_file(*paths), pair[1], HARD)


def test_decode_prefixes_and_random_ids(pair):
    ours, theirs = pair
    ids = ours.encode("日本語 👩‍👩‍👧‍👦 ﷽ ñ</s>x")
    for n in range(len(ids) + 1):
        for part in (ids[:n], ids[n:]):
            for skip in (False, True):
                assert ours.decode(part, skip) == theirs.decode(part, skip_special_tokens=skip)
    assert any(ours.decode(ids[:n]).endswith("\ufffd") for n in range(len(ids)))
    random = np.random.default_rng(0).integers(0, 50272, (50, 40))
    assert ours.batch_decode(random) == theirs.batch_decode(random)
    assert ours.decode(random) == theirs.decode(random)
    assert ours.decode(random[0][0]) == theirs.decode(random[0][0])
    assert ours.decode(ids, clean_up_tokenization_spaces=False) == theirs.decode(
        ids, clean_up_tokenization_spaces=False
    )


def test_padding_and_truncation(pair):
    ours, theirs = pair
    texts = [text for text in HARD if not text.startswith("</s>")]
    for arguments in (
        {"padding": True},
        {"padding": True, "return_tensors": "np"},
        {"padding": "max_length", "max_length": 20, "truncation": True, "return_tensors": "np"},
        {"padding": "max_length", "max_length": 30},
        {"truncation": True, "max_length": 7},
        {"truncation": True, "max_length": 1, "padding": True},
        {"truncation": True, "max_length": 7, "add_special_tokens": False},
        {"truncation": True, "max_length": 40_000, "padding": True},
    ):
        for side in ("left", "right"):
            ours.truncation_side = theirs.truncation_side = side
            sides = {"padding_side": side} if "padding" in arguments else {}
            arguments = {"return_tensors": None} | arguments
            got, want = ours(texts, **arguments, **sides), theirs(texts, **arguments, **sides)
            for key in ("input_ids", "attention_mask"):
                if arguments.get("return_tensors"):
                    np.testing.assert_array_equal(got[key], want[key])
                else:
                    assert got[key] == want[key], arguments
    ours.truncation_side = theirs.truncation_side = "right"


def test_each_reads_what_the_other_saved(pair, tmp_path):
    ours, theirs = pair
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(OPTTokenizer.from_pretrained(tmp_path / "theirs"), theirs, HARD)
    assert_same(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "ours"), HARD)
    (tmp_path / "ours" / "tokenizer.json").unlink()  # vocab.json and merges.txt suffice
    assert_same(ours, transformers.GPT2Tokenizer.from_pretrained(tmp_path / "ours"), HARD)


def test_a_tokenizer_with_added_tokens(pair, opt_directory, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(opt_directory)
    theirs.add_tokens(["<|user|>", "ein Wort"])
    theirs.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = OPTTokenizer.from_pretrained(tmp_path / "theirs")
    texts = [*HARD, "<|user|>ein Wort, ein Wort<|end|> ok"]
    assert_same(ours, theirs, texts)
    assert len(ours) == len(theirs) == 50268
    ours.save_pretrained(tmp_path / "ours")
    assert_same(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "ours"), texts)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_blank_in_front(pair, tmp_path, in_file):
    """For OPT's class the config decides, for other classes tokenizer.json does."""
    pair[0].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text()
    assert text.count(off := '"add_prefix_space": false') == 1
    path.write_text(text.replace(off, off.replace("false", str(in_file).lower())))
    cases = [("GPT2Tokenizer", False, False), ("GPT2TokenizerFast", True, True), ("GPT2Tokenizer", None, False)]
    for kind, says, wanted in [*cases, *(("PreTrainedTokenizerFast", says, in_file) for says in (None, False, True))]:
        config = {k: v for k, v in FACEBOOK.items() if k != "add_prefix_space"} | {"tokenizer_class": kind}
        config |= {} if says is None else {"add_prefix_space": says}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours, theirs = OPTTokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert_same(ours, theirs, ["Hello world", " Hello", "\nx", ""])
        assert (ours.encode("Hello") == ours.encode(" Hello")) is wanted


def changed(tokenizer):
    """Change the tokenizer as fine-tuning scripts do."""
    tokenizer.pad_token = tokenizer.eos_token
    counts = [tokenizer.add_tokens(["<|user|>", "ein Wort", "hello"]), tokenizer.add_tokens("<|user|>")]
    counts.append(tokenizer.add_special_tokens({"sep_token": "<|sep|>", "extra_special_tokens": ["<|end|>"]}))
    counts.append(tokenizer.add_special_tokens({"cls_token": "</s>"}))
    tokenizer.bos_token_id = tokenizer.convert_tokens_to_ids("<|sep|>")
    tokenizer.add_bos_token = True  # HF obeys from here on, we did above
    return counts


def test_changed_tokenizers(opt_directory, tmp_path):
    ours = OPTTokenizer.from_pretrained(opt_directory)
    theirs = transformers.AutoTokenizer.from_pretrained(opt_directory)
    assert changed(ours) == changed(theirs)
    texts = [*HARD, "<|user|>ein Wort, hello <|sep|> Wort<|end|> ok"]
    assert_same(ours, theirs, texts)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read = [OPTTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "theirs")]
    read_by_hf = [transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "theirs")]
    for tokenizer in (ours, *read, *read_by_hf):
        for name in ("bos_token", "pad_token", "eos_token", "unk_token", "sep_token", "cls_token"):
            for attribute in (name, f"{name}_id"):
                assert getattr(tokenizer, attribute) == getattr(theirs, attribute), attribute
        assert tokenizer.get_vocab() == theirs.get_vocab() and tokenizer.extra_special_tokens == ["<|end|>"]
        assert tokenizer.special_tokens_map == theirs.special_tokens_map
    for tokenizer in read:
        assert tokenizer.add_bos_token
        assert_same(tokenizer, theirs, texts)
    for tokenizer in read_by_hf:
        assert_same(ours, tokenizer, texts)
    got, want = ours(["a", "b c d"], padding=True), theirs(["a", "b c d"], padding=True, padding_side="left")
    assert got.input_ids.tolist() == want["input_ids"] and got.attention_mask.tolist() == want["attention_mask"]


def test_methods_of_scripts(pair):
    ours, theirs = pair
    for text in HARD:
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours.tokenize(text, "b", add_special_tokens=True) == theirs.tokenize(text, "b", add_special_tokens=True)
        tokens = theirs.tokenize(text)
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
        assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    ids = [0, 2, 31414, 50264, 60000, 1]
    for skip in (False, True):
        got, want = (t.convert_ids_to_tokens(ids, skip_special_tokens=skip) for t in pair)
        assert got == want
    assert ours.convert_tokens_to_ids("nowhere") == theirs.convert_tokens_to_ids("nowhere")
    assert ours.get_vocab() == theirs.get_vocab() and ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.encode("a b", "c d") == theirs.encode("a b", "c d")


def test_pairs_and_offsets(pair):
    ours, theirs = pair
    texts = [text for text in HARD if len(text) < 200]
    pairs = texts[::-1]
    for arguments in (
        {},
        {"return_offsets_mapping": True},
        {"add_special_tokens": False, "return_offsets_mapping": True},
        {"padding": True, "pad_to_multiple_of": 8, "return_offsets_mapping": True},
        *({"truncation": True, "max_length": n, "return_offsets_mapping": True} for n in range(2, 24)),
    ):
        for side in ("left", "right"):
            sides = {"padding_side": side} if "padding" in arguments else {}
            ours.truncation_side = theirs.truncation_side = side
            for second in (None, pairs):
                got = ours(texts, second, return_tensors=None, **arguments, **sides)
                assert dict(got) == dict(theirs(texts, second, **arguments, **sides)), arguments
    ours.truncation_side = theirs.truncation_side = "right"


def test_pad(pair):
    ours, theirs = pair
    rows = [dict(theirs(text)) for text in HARD[:6]]
    for arguments in ({}, {"padding": "max_length", "max_length": 60}, {"pad_to_multiple_of": 16}):
        for side in ("left", "right"):
            got = ours.pad(rows, padding_side=side, return_tensors=None, **arguments)
            assert dict(got) == dict(theirs.pad(rows, padding_side=side, **arguments))


# Fields of tokenizer_config.json (and of special_tokens_map.json, under "map") that change ids.
FIELDS = {
    "split": {"split_special_tokens": True},
    "not-split": {"split_special_tokens": False},
    "eos": {"add_eos_token": True},
    "eos-only": {"add_eos_token": True, "add_bos_token": False},
    "eos-and-split": {"add_eos_token": True, "split_special_tokens": True},
    "dict": {"extra_special_tokens": {"image_token": "<mask>", "audio_token": "madeupword0000"}},
    "dict-of-tokens": {"extra_special_tokens": {"image_token": {"__type": "AddedToken", "content": "Hello"}}},
    "named": {"image_token": "madeupword0000", "mask_token": "<mask>"},
    "named-token": {"image_token": {"__type": "AddedToken", "content": "madeupword0000", "lstrip": True}},
    "list": {"extra_special_tokens": ["<mask>", "madeupword0001"]},
    "old-list": {"additional_special_tokens": ["<mask>", "madeupword0001"]},
    "map-list": {"extra_special_tokens": ["<mask>"], "map": {"extra_special_tokens": ["madeupword0001"]}},
    "map-dict": {"map": {"extra_special_tokens": {"image_token": "<mask>"}}},
    "map-old-list": {"map": {"additional_special_tokens": ["<mask>"]}},
    "map-overrides": {"map": {"eos_token": "<mask>"}, "add_eos_token": True},
    "max_len": {"max_len": 6},
    "left": {"model_max_length": 6, "truncation_side": "left"},
    "prefix": {"add_prefix_space": True},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The files of a small tokenizer, without a tokenizer_config.json: 300 tokens are quick to read."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=297, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([__doc__, "Hello Hello"], trainer)
    folder = tmp_path_factory.mktemp("small")
    backend.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    for token in ("madeupword0000", "madeupword0001", "<mask>"):
        vocab[token] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "config.json").write_text('{"model_type": "opt"}')
    return folder


@pytest.mark.parametrize("case", FIELDS)
def test_fields_that_change_ids(small, tmp_path, case):
    """From the slow files; and from the directories that both save."""
    fields = dict(FIELDS[case])
    for file in ("vocab.json", "merges.txt", "config.json"):
        (tmp_path / file).symlink_to(small / file)
    if "map" in fields:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(fields.pop("map")))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(FACEBOOK | fields))
    ours, theirs = OPTTokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["naïve café", *HARD[8:11], "Hello <mask> Hellomadeupword0001 x", "a  madeupword0000b"]
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings(action="ignore"):  # of an add_eos_token beside a tokenizer.json
        again = OPTTokenizer.from_pretrained(tmp_path / "theirs")
    for mine, other in (
        (ours, theirs),
        (again, transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")),
        (OPTTokenizer.from_pretrained(tmp_path / "ours"), theirs),
        (ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")),
    ):
        assert_same(mine, other, texts)
        assert mine.encode("a b", "c") == other.encode("a b", "c")
        assert set(mine.all_special_ids) == set(other.all_special_ids)
        assert mine.tokenize(HARD[8]) == other.tokenize(HARD[8])
        assert mine.model_max_length == (other.model_max_length if other.model_max_length < 1e9 else None)
        if mine.model_max_length:
            got = [mine(text, truncation=True, return_tensors=None)["input_ids"] for text in texts]
            assert got == [other(text, truncation=True)["input_ids"] for text in texts]
    for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert copied.encode(HARD[8]) == ours.encode(HARD[8])


def test_pipeline_returns_what_transformers_returns(tmp_path):
    """Both read a checkpoint of `transformers`, and return the same texts in the same structure."""
    torch = pytest.importorskip("torch", reason="transformers' pipeline needs PyTorch")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    text = (
        "The tokenizer against transformers': ids, masks and text, with the real OPT files and what either side saves."
    )
    backend.train_from_iterator([text], trainer)
    OPTTokenizer(backend).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=280, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, init_std=0.5
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)

    theirs = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    ours = pipeline("text-generation", model=str(tmp_path))
    prompts = ["the tokenizer", "日本", "x y z, the other side"]
    for arguments in ({}, {"return_full_text": False}, {"skip_special_tokens": False}):
        arguments |= {"max_new_tokens": 12, "do_sample": False}
        assert ours(prompts[0], **arguments) == theirs(prompts[0], **arguments)
        assert ours(prompts, batch_size=1, **arguments) == theirs(prompts, **arguments)
    assert ours(prompts, max_new_tokens=12, do_sample=False) == theirs(prompts, max_new_tokens=12, do_sample=False)
    # Each prompt of a list counts alone.
    for arguments in ({"max_length": 33}, {"max_length": 33, "min_length": 30}):
        assert ours(prompts, do_sample=False, **arguments) == theirs(prompts, do_sample=False, **arguments)

    # The prefix that several of facebook/opt-*'s configs have.
    content = json.loads((tmp_path / "config.json").read_text())
    for prefix in ("</s>", "once upon a"):
        (tmp_path / "config.json").write_text(json.dumps(content | {"prefix": prefix}))
        theirs = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
        ours = pipeline("text-generation", model=str(tmp_path))
        greedy = {"max_new_tokens": 12, "do_sample": False}
        calls: list[dict] = [{"max_length": 33, "min_length": 31, "do_sample": False}]
        if prefix == "</s>":
            calls += [greedy | more for more in ({}, {"add_special_tokens": False}, {"prefix": ""}, {"prefix": "the"})]
        for arguments in calls:
            assert ours(prompts[2], **arguments) == theirs(prompts[2], **arguments), (prefix, arguments)
        if prefix == "</s>":
            assert ours(prompts[2], **greedy) != ours(prompts[2], prefix="", **greedy)
            assert ours(prompts, **greedy) == theirs(prompts, **greedy)
            assert ours(prompts, **calls[0]) == theirs(prompts, **calls[0])
    with pytest.raises(ValueError, match="prefix=7 must be a text"):
        ours("x", prefix=7)
