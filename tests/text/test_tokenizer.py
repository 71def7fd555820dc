"""The tokenizer: a small one that is trained here, and OPT's own."""

import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from opt_jax.text.streaming import TextStream
from opt_jax.text.tokenizer import OPTTokenizer

TEXTS = [
    "The tokenizer, the token-by-token decoder and the pipeline, with a small tokenizer trained here.",
    "the middle of the line: hello hello world, 日本語 日本語",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
HARD = [
    "",
    " ",
    "Hello world",
    "naïve café: 👩‍👩‍👧‍👦 🇨🇭 日本語 ﷽ e\u0301",
    "a\0b\x7f\x80\ufeff\ufffd\u2028",
    "line\r\nline\rline\n\n\n",
    "x" + " " * 300 + "\t\t y  ",
    "in <pad> the <unk> middle <s> of </s> it<mask> <|endoftext|>",
]


def trained() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with vocab.json and merges.txt alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained().model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def tok(files):
    return OPTTokenizer.from_file(files / "vocab.json", files / "merges.txt")


def test_ids_and_special_tokens(tok):
    assert (tok.bos_token_id, tok.pad_token_id, tok.eos_token_id, tok.unk_token_id) == (2, 1, 2, 2)
    assert (tok.bos_token, tok.pad_token, tok.eos_token, tok.unk_token) == ("</s>", "<pad>", "</s>", "</s>")
    assert len(tok) == tok.vocab_size == 320
    out = tok("hello", return_tensors=None)
    assert out["input_ids"] == out.input_ids == tok.encode("hello") and out.attention_mask == [1] * len(out.input_ids)
    assert out.input_ids[0] == 2 and out.input_ids.count(2) == 1
    assert tok.encode("hello", add_special_tokens=False) == out.input_ids[1:]
    assert tok("")["input_ids"].tolist() == [[2]]
    assert not hasattr(out, "token_type_ids")
    # only </s> and <pad> are special, as in facebook/opt-*
    ids = tok.encode("<s><unk></s><pad>")
    assert 0 not in ids and 3 not in ids and ids[-2:] == [2, 1]


def test_real_files(shared_data):
    real = OPTTokenizer.from_file(*(shared_data / "opt-tokenizer" / name for name in ("vocab.json", "merges.txt")))
    assert real("Hello").input_ids.tolist() == [[2, 31414]]
    assert real.encode("A photo of a cat") == [2, 250, 1345, 9, 10, 4758]
    assert real(["I like you."], return_tensors=None).input_ids == [[2, 100, 101, 47, 4]]
    assert len(real) == 50265


@pytest.mark.parametrize("text", HARD)
def test_decode_returns_the_text(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == "</s>" + text
    if not {1, 2} & set(ids[1:]):
        assert tok.decode(ids, skip_special_tokens=True) == text


def test_decode_takes_arrays_batches_and_single_ids(tok):
    import jax.numpy as jnp

    ids = tok.encode("hello world")
    for row in (np.array(ids), jnp.array(ids), tuple(ids), list(np.array(ids))):
        assert tok.decode(row) == "</s>hello world"
    for batch in (np.array([ids, ids]), jnp.array([ids, ids]), [ids, ids], [np.array(ids), jnp.array(ids)]):
        assert tok.decode(batch) == tok.batch_decode(batch) == ["</s>hello world"] * 2
    assert tok.decode(2) == tok.decode(np.int32(2)) == "</s>" and tok.decode([]) == ""
    assert tok.decode([*ids, 50271]) == "</s>hello world"  # an id of the model's padded vocabulary
    with pytest.raises(ValueError, match="-100 .*replace ignored labels"):
        tok.decode([2, -100])
    no_numbers = ("text", ["2"], b"2", [2, None], np.ma.array([2, 5], mask=[False, True]))
    for bad in ([2, 2**32 + 5], np.array([2.0]), [2, True], 2.5, np.array([True]), *no_numbers):
        for read in (tok.decode, TextStream(tok).put):
            with pytest.raises(ValueError, match="is not a token id, an integer in"):
                read(bad)
    with pytest.warns(UserWarning, match="clean_up_tokenization_spaces"):
        assert tok.decode(tok.encode("hello ."), True, clean_up_tokenization_spaces=True) == "hello ."


def test_padding(tok):
    texts = ["hello hello world", "hello"]
    plain = tok(texts, return_tensors=None)
    assert isinstance(plain.input_ids, list) and len({len(row) for row in plain.input_ids}) == 2
    out = tok(texts)  # by default arrays, padded on the left
    np.testing.assert_array_equal(out.input_ids, tok(texts, padding=True, return_tensors="np").input_ids)
    assert out.input_ids.dtype == out.attention_mask.dtype == np.int32
    assert out.input_ids.shape == out.attention_mask.shape == (2, len(plain.input_ids[0]))
    gap = len(plain.input_ids[0]) - len(plain.input_ids[1])
    assert out.input_ids[1].tolist() == [1] * gap + plain.input_ids[1]
    assert out.attention_mask[1].tolist() == [0] * gap + [1] * len(plain.input_ids[1])
    right = tok(texts, padding="longest", padding_side="right", return_tensors=None)
    assert right.input_ids[1] == plain.input_ids[1] + [1] * gap and right.attention_mask[1][-1] == 0
    full = tok("hello", padding="max_length", max_length=9, return_tensors=None)
    assert len(full.input_ids) == 9 and sum(full.attention_mask) == len(tok.encode("hello"))
    assert tok([]).input_ids.shape == (0, 0) and tok([], return_tensors=None).input_ids == []
    assert tok("hello").input_ids.shape == (1, len(tok.encode("hello")))


def test_truncation_keeps_the_bos(files, tok):
    ids = tok.encode("hello hello world")
    assert tok("hello hello world", truncation=True, max_length=3, return_tensors=None).input_ids == ids[:3]
    assert tok("hello hello world", truncation=True, max_length=1, return_tensors=None).input_ids == [2]
    assert tok("hello hello world", truncation=True, max_length=99, return_tensors=None).input_ids == ids
    assert (
        tok("hello hello world", truncation=True, max_length=3, add_special_tokens=False, return_tensors=None).input_ids
        == ids[1:4]
    )
    paths = files / "vocab.json", files / "merges.txt"
    left = OPTTokenizer.from_file(*paths, {"model_max_length": 3}, truncation_side="left")
    assert left("hello hello world", truncation=True, return_tensors=None).input_ids == [2, *ids[-2:]]


def test_bad_arguments(tok):
    for bad in ("pt", "tf", "jax", True):
        with pytest.raises(ValueError, match='"np"'):
            tok("hello", return_tensors=bad)
    for arguments, words in [
        ({"padding": "longst"}, "longst"),
        ({"truncation": "only_second"}, "only_second"),
        ({"max_length": 5}, "truncation=True"),
        ({"truncation": True}, "max_length"),
        ({"truncation": True, "max_length": 0}, "0"),
        ({"padding": "max_length"}, "max_length"),
        ({"padding_side": "right", "padding": False}, "padding=True"),
        ({"padding": True, "padding_side": "middle"}, "middle"),
    ]:
        with pytest.raises(ValueError, match=words):
            tok("hello", **arguments)
    with pytest.raises(ValueError, match="max_length"):  # HF writes 1e30 for "no limit"
        OPTTokenizer(trained(), {"model_max_length": int(1e30)})("hello", truncation=True)
    with pytest.raises(ValueError, match="padding=True"):
        tok(["hello", "hello hello world"], padding=False)
    with pytest.raises(ValueError, match="item 1 is a int"):
        tok(["hello", 3])
    with pytest.raises(ValueError, match="surrogate"):
        tok("\ud800")
    with pytest.raises(ValueError, match="'a pair': use True or False"):
        tok("hello", add_special_tokens="a pair")
    for pair in ("one", ["one"], ["one", 2]):
        with pytest.raises(ValueError, match="text_pair must be"):
            tok(["hello", "hello"], pair)
    for multiple in (0, 2.0, True):
        with pytest.raises(ValueError, match="pad_to_multiple_of"):
            tok("hello", pad_to_multiple_of=multiple)
    with pytest.raises(ValueError, match="middle"):
        OPTTokenizer(trained(), padding_side="middle")


@pytest.fixture
def new(files):
    """A tokenizer that a test may change."""
    return OPTTokenizer.from_file(files / "vocab.json", files / "merges.txt")


def test_setting_a_special_token_sets_its_id_and_what_follows(new):
    rows = new(["hello world", "h"]).input_ids
    assert rows[1][0] == 1
    new.pad_token = new.eos_token
    assert (new.pad_token, new.pad_token_id) == ("</s>", 2)
    assert new(["hello world", "h"]).input_ids[1][0] == 2
    new.pad_token_id = 1
    assert (new.pad_token, new.pad_token_id) == ("<pad>", 1)
    np.testing.assert_array_equal(new(["hello world", "h"]).input_ids, rows)
    new.bos_token = "<s>"
    assert (new.bos_token_id, new.eos_token_id) == (0, 2) and new.encode("h", "h") == [0, rows[1][-1]] * 2
    new.bos_token_id = 3
    assert new.bos_token == "<unk>" and new("h").input_ids[0][0] == 3
    new.add_bos_token = False
    new.bos_token = "</s>"
    assert new.encode("h") == [rows[1][-1]] and not new.add_bos_token
    new.add_bos_token = True
    assert new.encode("h") == [2, rows[1][-1]]
    assert new.sep_token is None and new.sep_token_id is None
    new.sep_token = AddedToken("<s>")
    assert new.sep_token_id == 0 and new.special_tokens_map["sep_token"] == "<s>"
    assert new.decode([0, *new.encode("h")], skip_special_tokens=True) == "h"


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("pad_token", "[PAD]", ValueError, r"pad_token '\[PAD\]' is not in the vocabulary.*: use add_special_tokens"),
        ("pad_token", None, ValueError, "pad_token None is not in the vocabulary"),
        ("pad_token", 1, ValueError, "pad_token 1 is not in the vocabulary"),
        ("pad_token_id", 320, ValueError, "pad_token_id=320 is not in the vocabulary"),
        ("pad_token_id", True, ValueError, "True is not a token id"),
        ("pad_token_id", None, ValueError, "None is not a token id"),
        ("add_bos_token", 1, ValueError, "add_bos_token=1: use True or False"),
        ("add_eos_token", True, AttributeError, "no 'add_eos_token': setting it would change nothing"),
        ("chat_template", "x", AttributeError, "no 'chat_template'"),
        ("all_special_ids", [1], AttributeError, "all_special_ids"),
        ("padding_side", "middle", ValueError, "middle"),
        ("truncation_side", "middle", ValueError, "middle"),
        ("model_max_length", 0, ValueError, "model_max_length=0"),
    ],
)
def test_what_cannot_be_set(new, name, value, error, words):
    before = new.encode("hello"), new.special_tokens_map
    with pytest.raises(error, match=words):
        setattr(new, name, value)
    assert before == (new.encode("hello"), new.special_tokens_map)


def test_added_tokens(new):
    assert new.add_tokens(["<a>", "<b>", "<a>"]) == 2 and new.add_tokens("hello world") == 1 and not new.add_tokens([])
    assert new.encode("<a>hello world<b>") == [2, 320, 322, 321] and len(new) == 323 and new.vocab_size == 320
    assert new.decode([320, 2], skip_special_tokens=True) == "<a>"
    named = {"pad_token": "[PAD]", "extra_special_tokens": ["<x>", AddedToken("<y>", lstrip=True)]}
    assert new.add_special_tokens(named) == 3
    assert (new.pad_token_id, new.extra_special_tokens) == (323, ["<x>", "<y>"])
    assert new.encode("h <y>") == [*new.encode("h"), 325] and new.decode([323, 325], skip_special_tokens=True) == ""
    more = {"additional_special_tokens": ["<x>", "<z>"]}
    assert new.add_special_tokens(more, replace_extra_special_tokens=False) == 1
    assert new.additional_special_tokens == ["<x>", "<y>", "<z>"]
    assert new.get_added_vocab()["<z>"] == new.get_vocab()["<z>"] == 326 and new.added_tokens_decoder[326].special
    before = new.get_vocab(), new.special_tokens_map
    for bad in ({"pad": "x"}, {"extra_special_tokens": "<x>"}, {"pad_token": 3}, {"pad_token": ""}):
        with pytest.raises(ValueError, match="must be|name of a special token"):
            new.add_special_tokens(bad)
    with pytest.raises(ValueError, match="must be a string"):
        new.add_tokens(["<c>", 3])
    assert before == (new.get_vocab(), new.special_tokens_map)


def test_tokens_and_ids(tok):
    tokens = tok.tokenize("hello 日")
    assert "".join(tokens) == "helloĠæĹ¥" and tok.convert_tokens_to_string(tokens) == "hello 日"
    assert tok.tokenize("h", "l", add_special_tokens=True) == ["</s>", "h", "</s>", "l"]
    ids = tok.convert_tokens_to_ids(tokens)
    assert tok.encode("hello 日") == [2, *ids] and tok.convert_ids_to_tokens(np.array([2, *ids]), True) == tokens
    assert tok.convert_tokens_to_ids("<pad>") == 1 and tok.convert_ids_to_tokens(np.int32(1)) == "<pad>"
    assert tok.convert_tokens_to_ids(["<pad>", "nowhere"]) == [1, 2] and tok.convert_ids_to_tokens([5000]) == [None]
    assert tok.num_special_tokens_to_add() == 1 and tok.num_special_tokens_to_add(pair=True) == 2


def test_offsets_are_of_the_text(tok):
    texts = ["hello 日本 world", "the"]
    out = tok(texts, return_offsets_mapping=True)
    assert out.offset_mapping.shape == (*out.input_ids.shape, 2)
    for text, ids, mask, offsets in zip(texts, out.input_ids, out.attention_mask, out.offset_mapping, strict=True):
        pieces = [text[a:b] for a, b in offsets[mask == 1][1:]]
        assert pieces[0][0] == text[0] and pieces[-1][-1] == text[-1] and not offsets[mask == 0].any()
        assert all(
            tok.decode([i]) in (piece, " " + piece, "\ufffd") or "\ufffd" in tok.decode([i])
            for i, piece in zip(ids[mask == 1][1:], pieces, strict=True)
        )
    cut = tok("hello world", truncation=True, max_length=2, return_offsets_mapping=True, return_tensors=None)
    assert cut.offset_mapping[0] == (0, 0) and len(cut.offset_mapping) == 2


def test_pad(tok):
    texts = ["hello hello world", "h", ""]
    rows = [tok(text, return_tensors=None) for text in texts]
    expected = tok(texts)
    batch = tok(texts, return_tensors=None)
    for given in (rows, batch, [{"input_ids": r.input_ids} for r in rows]):
        for name, array in tok.pad(given).items():
            np.testing.assert_array_equal(array, expected[name])
    arrays = [{name: np.array(row[name]) for name in row} for row in rows]
    np.testing.assert_array_equal(tok.pad(arrays, padding_side="right").input_ids[1][2:], 1)
    one = tok.pad(rows[1] | {"label": 5}, "max_length", 5, return_tensors=None)
    assert one == {"input_ids": [1, 1, 1, *rows[1].input_ids], "attention_mask": [0, 0, 0, 1, 1], "label": 5}
    assert tok.pad(rows, pad_to_multiple_of=8).input_ids.shape[1] % 8 == 0
    assert tok.pad([r | {"labels": 7} for r in rows])["labels"].tolist() == [7, 7, 7]
    assert tok.pad([]).input_ids.shape == (0, 0)
    for bad in ([{"ids": [1]}], [{"input_ids": [1]}, {"attention_mask": [1]}], "text", [{"input_ids": [1.5]}]):
        with pytest.raises(ValueError, match="pad takes rows|is not a token id"):
            tok.pad(bad)


def test_a_changed_tokenizer_is_saved_as_it_is(new, tmp_path):
    new.add_tokens(["<a>", "ein Wort"])
    new.add_special_tokens({"pad_token": "[P:1 $]", "cls_token": "<s>", "extra_special_tokens": ["<x>"]})
    new.bos_token = "[P:1 $]"
    new.model_max_length, new.truncation_side = 7, "left"
    new.save_pretrained(tmp_path)
    again = OPTTokenizer.from_pretrained(tmp_path)
    for name in ("special_tokens_map", "extra_special_tokens", "all_special_ids", "add_bos_token", "bos_token_id"):
        assert getattr(again, name) == getattr(new, name), name
    assert (again.model_max_length, again.truncation_side, len(again)) == (7, "left", len(new))
    assert again.get_vocab() == new.get_vocab()
    for text in [*HARD, "<a> <x> ein Wort"]:
        assert again.encode(text) == new.encode(text)
    assert pickle.loads(pickle.dumps(new)).special_tokens_map == new.special_tokens_map


def test_a_blank_in_front_is_put_where_the_config_says_so(tmp_path):
    """The config wins over tokenizer.json, as in HF."""
    OPTTokenizer(trained()).save_pretrained(tmp_path / "plain")
    plain, path = OPTTokenizer.from_pretrained(tmp_path / "plain"), tmp_path / "plain" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    spaced = OPTTokenizer.from_pretrained(tmp_path / "plain")
    assert spaced.encode("hello") == plain.encode(" hello") != plain.encode("hello")
    backend = trained()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    OPTTokenizer(backend).save_pretrained(tmp_path / "saved")
    for other in (
        OPTTokenizer(trained(), {"add_prefix_space": True}),
        OPTTokenizer.from_pretrained(tmp_path / "saved"),
    ):
        assert other.encode("hello") == spaced.encode("hello")
    with pytest.raises(ValueError, match="must be true or false"):
        OPTTokenizer(trained(), {"add_prefix_space": "yes"})


def test_what_has_no_effect_in_the_files_is_noted(tmp_path):
    OPTTokenizer(trained(), {"split_special_tokens": False, "padding_side": "right"}).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_eos_token": True}))
    with pytest.warns(UserWarning, match=r"tokenizer_config.json: without effect: add_eos_token=True \(tokenizer.json"):
        again = OPTTokenizer.from_pretrained(tmp_path)
    assert again.padding_side == "left" and again.encode("") == [2]


def test_an_eos_behind_each_text(tmp_path):
    """As `add_eos_token` of GPT2Tokenizer, which has vocab.json and merges.txt; saved, tokenizer.json adds it."""
    plain, config = OPTTokenizer(trained()), {"add_eos_token": True}
    ids = plain.encode("hello", add_special_tokens=False)
    for bos in (True, False):
        tok = OPTTokenizer(trained(), config | {"add_bos_token": bos})
        tok.save_pretrained(tmp_path / str(bos))
        for tokenizer in (tok, OPTTokenizer.from_pretrained(tmp_path / str(bos))):
            assert tokenizer.encode("hello") == [2] * bos + ids + [2]
            assert tokenizer.encode("hello", "hello") == ([2] * bos + ids + [2]) * 2
            assert tokenizer.num_special_tokens_to_add() == bos + 1
        assert tok.add_bos_token is bos
        tok.add_bos_token = not bos
        assert tok.encode("hello") == [2] * (not bos) + ids + [2]


def test_special_tokens_with_names_of_one_model(tmp_path):
    config = {"extra_special_tokens": {"image_token": "<unk>"}, "truncation_side": "left"}
    tok = OPTTokenizer(trained(), config)
    assert tok.extra_special_tokens == ["<unk>"] and tok.truncation_side == "left"
    tok.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["extra_special_tokens"] == config["extra_special_tokens"]
    assert OPTTokenizer.from_pretrained(tmp_path).extra_special_tokens == ["<unk>"]


def test_bos_warnings(tok):
    with pytest.warns(UserWarning, match="'</s>' twice"):
        assert tok.encode("</s>hello")[:2] == [2, 2]
    with pytest.warns(UserWarning, match="twice"):
        tok(["hello", "</s>"])
    with pytest.warns(UserWarning, match="no '</s>' in front"):
        tok("hello", add_special_tokens=False, return_tensors="np")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tok(["hello", "hello</s> world"])
        tok(["hello", "</s>hello"], return_tensors=None, add_special_tokens=False)  # pieces of a text
        tok("</s>hello", add_special_tokens=False, return_tensors="np")  # once, by hand


def test_threads_do_not_disturb_each_other(tok):
    def ids(n):
        return tok(
            ["hello world " * 9, "hello"], return_tensors=None, padding=True, truncation=True, max_length=n + 1
        ).input_ids

    wanted = [ids(n) for n in range(20)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(ids, range(20))) == wanted
    assert pickle.loads(pickle.dumps(tok)).encode("hello") == tok.encode("hello")


def test_from_pretrained_layouts(files, tmp_path):
    def directory(name, **contents):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("vocab.json", "merges.txt"):
            (folder / file).write_bytes((files / file).read_bytes())
        for file, content in contents.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        return folder

    assert OPTTokenizer.from_pretrained(directory("bare")).encode("")[:1] == [2]
    assert OPTTokenizer.from_pretrained(directory("no_bos", tokenizer_config={"add_bos_token": False})).encode("") == []
    token = {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    marked = directory("map", tokenizer_config={"bos_token": token | {"__type": "AddedToken"}})
    assert OPTTokenizer.from_pretrained(marked).encode("hello")[0] == 0
    (marked / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<unk>"}))
    assert OPTTokenizer.from_pretrained(marked).encode("hello<s>")[0] == 3
    added = OPTTokenizer.from_pretrained(directory("added", added_tokens={"<b>": 321, "<a>": 320}))
    assert added.encode("<a><b>") == [2, 320, 321] and len(added) == 322 and added.vocab_size == 320
    assert added.decode([320, 321], skip_special_tokens=True) == "<a><b>"
    extra = OPTTokenizer.from_pretrained(directory("extra", tokenizer_config={"additional_special_tokens": ["<unk>"]}))
    assert extra.encode("<unk>") == [2, 3] and extra.decode([3], skip_special_tokens=True) == ""
    with pytest.raises(ValueError, match="'<gone>'.* 77"):
        added_at = {"77": {"content": "<gone>"}}
        OPTTokenizer.from_pretrained(directory("hole", tokenizer_config={"added_tokens_decoder": added_at}))
    with pytest.raises(ValueError, match="pad_token '\\[PAD\\]'"):
        OPTTokenizer.from_pretrained(directory("pad", tokenizer_config={"pad_token": "[PAD]"}))

    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty.*tokenizer.json"):
        OPTTokenizer.from_pretrained(tmp_path / "empty")
    half = directory("half")
    (half / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        OPTTokenizer.from_pretrained(half)
    torn = directory("torn")
    (torn / "vocab.json").write_text('{"<s>": 0,')
    with pytest.raises(ValueError, match="vocab.json"):
        OPTTokenizer.from_pretrained(torn)


def test_tokenizer_json(tmp_path):
    backend = trained()
    backend.enable_truncation(2)  # we ignore this setting of the file
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    silent = OPTTokenizer.from_pretrained(tmp_path)
    assert (
        not silent.add_bos_token
        and silent.decode(silent("hello world", return_tensors="np").input_ids[0]) == "hello world"
    )
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert OPTTokenizer.from_pretrained(tmp_path).encode("")[:1] == [2]

    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    wordpiece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="WordPiece"):
        OPTTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("bos", [True, False])
def test_save_and_load(files, tmp_path, bos):
    config = {"add_bos_token": bos, "added_tokens_decoder": {"320": {"content": "<a>", "special": True}}, "kept": 1}
    tok = OPTTokenizer.from_file(files / "vocab.json", files / "merges.txt", config)
    tok.save_pretrained(tmp_path / "new" / "folder")
    again = OPTTokenizer.from_pretrained(tmp_path / "new" / "folder")
    for text in [*HARD, "<a> b"]:
        assert again.encode(text) == tok.encode(text)
    assert again.all_special_ids == tok.all_special_ids == [1, 2, 320]
    assert (tmp_path / "new" / "folder" / "vocab.json").is_file()
    assert json.loads((tmp_path / "new" / "folder" / "tokenizer_config.json").read_text())["kept"] == 1
