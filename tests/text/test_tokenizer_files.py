"""Damaged and hostile files of tokenizers: each is one error that names the file, and no panic of the Rust library."""

import json
import shutil

import pytest

from opt_jax import OPTTokenizer
from opt_jax.text.tokenizer_files import contents_of
from opt_jax.training.tasks.squad import Question, windows


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    OPTTokenizer.from_pretrained("tiny").save_pretrained(directory)
    return directory


def edited(saved, directory, file="tokenizer.json", **changes):
    """Write the tiny tokenizer to `directory`, with fields of one file changed: `a__b=value` sets field b of a."""
    for name in saved.iterdir():
        shutil.copy(name, directory)
    content = json.loads((directory / file).read_text())
    for name, value in changes.items():
        node, (*parents, last) = content, name.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    (directory / file).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {"model__continuing_subword_prefix": "##"},
        {"model__continuing_subword_prefix": "a" * 50},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False}},
        {"model__merges": [["a", "not a token"]]},
        {"model": 3},
        {"added_tokens": {}},
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(saved, tmp_path, changes):
    with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer.json: not a tokenizer that can be read"):
        OPTTokenizer.from_pretrained(edited(saved, tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}},
    ],
)
def test_a_file_that_panics_when_it_is_used_is_an_error(saved, tmp_path, changes):
    tokenizer = OPTTokenizer.from_pretrained(edited(saved, tmp_path, **changes))
    for use in (
        lambda: tokenizer("text"),
        lambda: tokenizer(["text", "more"], truncation=True, max_length=3),
        lambda: tokenizer.encode("text"),
        lambda: windows([Question("who?", "me", ())], tokenizer, 64),
    ):
        with pytest.raises(ValueError, match="the tokenizers library fails"):
            use()


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5000": {"content": 3}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5000": null}}'),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {}, "pad_token": 7}'),
        ("tokenizer_config.json", '{"extra_special_tokens": 7}'),
        ("special_tokens_map.json", "3"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_what_is_not_of_the_right_shape_is_named(saved, tmp_path, file, content, fast):
    edited(saved, tmp_path)
    if not fast:
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        OPTTokenizer.from_pretrained(tmp_path)


class Counting:
    """A backend that counts how often tokens are added. The library reads all its tokens each time."""

    def __init__(self, backend):
        self.backend, self.added = backend, 0

    def __getattr__(self, name):
        if name in ("add_tokens", "add_special_tokens"):
            self.added += 1
        return getattr(self.backend, name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("add_bos_token", "false"),
        ("add_bos_token", 0),
        ("add_prefix_space", "true"),
        ("add_prefix_space", 1),
        ("model_max_length", True),
        ("model_max_length", 2.5),
        ("model_max_length", float("nan")),
        ("model_max_length", "512"),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_a_field_of_another_type_is_named(saved, tmp_path, field, value, fast):
    edited(saved, tmp_path, "tokenizer_config.json", **{field: value})
    if not fast:
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"{field}=.* must be"):
        OPTTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("limit", [None, 512, 512.0, 1e30, int(1e30)])
def test_a_length_limit_as_hf_writes_it_is_read(saved, tmp_path, limit):
    edited(saved, tmp_path, "tokenizer_config.json", model_max_length=limit)
    assert OPTTokenizer.from_pretrained(tmp_path).model_max_length == (512 if limit in (512, 512.0) else None)


@pytest.mark.parametrize(
    ("token", "index", "error"),
    [
        ("the", 5, "two tokens of the vocabulary have the same id"),
        ("the", 2**31, "has the id 2147483648, which must be below"),
    ],
)
def test_ids_that_contradict_each_other_or_are_no_int32_are_refused(saved, tmp_path, token, index, error):
    edited(saved, tmp_path, "vocab.json", **{token: index})
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=error):
        OPTTokenizer.from_pretrained(tmp_path)


def test_an_added_token_without_the_id_of_the_file_is_refused(saved, tmp_path):
    content = json.loads((saved / "tokenizer.json").read_text())
    tokens = [*content["added_tokens"], {**content["added_tokens"][0], "id": 10**9, "content": "<x>"}]
    edited(saved, tmp_path, added_tokens=tokens)
    with pytest.raises(ValueError, match="added token '<x>' has the id 4096, not the 1000000000"):
        OPTTokenizer.from_pretrained(tmp_path)


def test_many_added_tokens_are_added_at_once():
    tiny = OPTTokenizer.from_pretrained("tiny")
    begin, count = len(tiny), 20_000
    tokens = {str(begin + i): {"content": f"<{i}>"} for i in range(count)}
    backend = Counting(tiny.backend_tokenizer)
    config = {"added_tokens_decoder": tokens, "extra_special_tokens": [t["content"] for t in tokens.values()]}
    tokenizer = OPTTokenizer(backend, config)  # type: ignore[reportArgumentType]
    assert backend.added == 2 and len(tokenizer) == begin + count
    assert tokenizer.encode("<7><19999>", add_special_tokens=False) == [begin + 7, begin + 19_999]
    assert begin + 19_999 in tokenizer.all_special_ids
    with pytest.raises(ValueError, match=f"'<0>' cannot get the id {begin + 1}"):
        OPTTokenizer(tiny.backend_tokenizer, {"added_tokens_decoder": {str(begin + 1): {"content": "<0>"}}})


def test_what_is_saved_is_what_the_library_writes(tmp_path):
    backend = OPTTokenizer.from_pretrained("tiny").backend_tokenizer
    backend.save(str(tmp_path / "tokenizer.json"))
    backend.model.save(str(tmp_path))
    assert contents_of(backend) == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_normalizer_that_makes_texts_ever_longer_is_refused(saved, tmp_path):
    """Each step doubles the text, alone and in sequences of sequences; one step of an ordinary normalizer is fine."""
    for i, pattern in enumerate(({"String": "b"}, {"Regex": "b"})):
        step = {"type": "Replace", "pattern": pattern, "content": "bb"}
        many = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [step] * 6}] * 4}
        for name, normalizer in (("many", many), ("one", step)):
            (place := tmp_path / f"{name}{i}").mkdir()
            edited(saved, place, normalizer=normalizer)
        with pytest.raises(ValueError, match="normalizer can make a text thousands of times as long"):
            OPTTokenizer.from_pretrained(tmp_path / f"many{i}")
        assert len(OPTTokenizer.from_pretrained(tmp_path / f"one{i}").encode("b b", add_special_tokens=False)) > 2


LONG = "x" * 100_001


@pytest.mark.parametrize(
    "file, changes, error",
    [
        ("tokenizer.json", {"added_tokens": [{"id": 9, "content": LONG}]}, "an added token has 100,001 characters"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": LONG}}}, "an added token has 100,001"),
        (
            "tokenizer.json",
            {"normalizer": {"type": "Prepend", "prepend": LONG * 10}},
            "its normalizer has more than 1,000",
        ),
    ],
)
def test_tokens_and_normalizers_of_many_characters_are_refused(saved, tmp_path, file, changes, error):
    with pytest.raises(ValueError, match=f"^{tmp_path}.*: not a tokenizer that can be read .*{error}"):
        OPTTokenizer.from_pretrained(edited(saved, tmp_path, file=file, **changes))
