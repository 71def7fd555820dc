"""Reading foreign files: pipes are refused, and small files have a size limit, local or remote."""

import json
import os
import shutil
import types

import numpy as np
import pytest
from support.hf_files import state_dict_pickle, torch_zip

from convert.staging import read_plan
from opt_jax import GenerationConfig, OPTConfig, OPTForCausalLM, OPTTokenizer
from opt_jax.checkpoints import hub, saving
from opt_jax.checkpoints.formats.safetensors import read_safetensors
from opt_jax.checkpoints.formats.torch_files import read_torch
from opt_jax.checkpoints.formats.weight_files import read_index
from opt_jax.checkpoints.orbax import open_stored
from opt_jax.data.tokenizers import read_tokenizer
from opt_jax.data.tokens import Tokens, open_tokens
from opt_jax.system import reading
from opt_jax.training.tasks import classification, squad

INDEX = "model.safetensors.index.json"


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_only_regular_files_are_opened(tmp_path, pipe):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert reading.read_small(tmp_path / "link") == b"content"
    with reading.open_regular(tmp_path / "file") as file:
        assert file.name == str(tmp_path / "file") or file.name == tmp_path / "file"
    for path in (pipe, tmp_path, "/dev/zero", "/dev/stdin" if not os.path.isfile("/dev/stdin") else pipe):
        with pytest.raises(ValueError, match="is not a regular file"):
            reading.open_regular(path)
    with pytest.raises(FileNotFoundError):
        reading.open_regular(tmp_path / "gone")


def test_small_files_have_a_largest_size(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert reading.read_small(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="file has 5 bytes, more than the 4"):
        reading.read_small(tmp_path / "file", 4)


class Remote:
    """Stands for an `epath.Path` in a store."""

    def __init__(self, length):
        self.length = length

    def __fspath__(self):
        return "gs://bucket/config.json"

    def stat(self):
        return types.SimpleNamespace(length=self.length)

    def read_bytes(self):
        assert self.length < 100
        return b"content"


def test_objects_have_a_limit():
    assert reading.read_small(Remote(7)) == b"content"  # type: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="has 1,000,000,000 bytes, more than"):
        reading.read_small(Remote(10**9))  # type: ignore[reportArgumentType]


# Name of the file to make too large -> what reads it.
READERS = {
    "config.json": OPTForCausalLM.from_pretrained,
    "./config.json": OPTConfig.from_hf,
    "generation_config.json": OPTForCausalLM.from_pretrained,
    "./generation_config.json": GenerationConfig.from_pretrained,
    "vocab.json": OPTTokenizer.from_pretrained,
    "merges.txt": OPTTokenizer.from_pretrained,
    "tokenizer.json": OPTTokenizer.from_pretrained,
    "tokenizer_config.json": OPTTokenizer.from_pretrained,
    "special_tokens_map.json": OPTTokenizer.from_pretrained,
    "./vocab.json": lambda directory: saving.read_companions([directory]),
    "model.safetensors.index.json": lambda directory: read_index(directory / "model.safetensors.index.json"),
    "tokens.npy.json": lambda directory: open_tokens(directory / "tokens.npy", OPTTokenizer.from_pretrained("tiny")),
    "tokenizer/merges.txt": lambda directory: read_tokenizer(directory / "tokenizer"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_small_files_has_a_limit(tmp_path, name):
    shutil.copytree(hub.resolve("tiny"), tmp_path / "model")
    path = tmp_path / "model" / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(reading.SMALL_FILE + 1)
    with pytest.raises(ValueError, match=f"{path.name}.* has 134,217,729 bytes, more than the 134,217,728"):
        READERS[name](tmp_path / "model")


def test_data_of_tasks_have_a_limit(tmp_path, monkeypatch):
    for task in (classification, squad):
        monkeypatch.setattr(task, "LARGEST_FILE", 10)
    (tmp_path / "a").write_text("a text\ta label\n")
    for read in (classification.read_tsv, squad.read_squad):
        with pytest.raises(ValueError, match="a has 15 bytes, more than the 10"):
            read([str(tmp_path / "a")])


def test_pipes_are_not_waited_for(tmp_path, pipe):
    for read in (read_safetensors, read_torch, lambda path: len(Tokens("x", path=path))):
        with pytest.raises(ValueError, match="pipe is not a regular file"):
            read(pipe)
    with pytest.raises(FileNotFoundError):
        OPTConfig.from_hf(pipe)


def test_the_pickle_of_a_torch_file_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("opt_jax.checkpoints.formats.torch_files.SMALL_FILE", 100)
    weights = {"x": np.ones(3, np.float32)}
    torch_zip(tmp_path / "a.bin", state_dict_pickle(weights), {"x": weights["x"].tobytes()})
    with pytest.raises(ValueError, match=r"a\.bin: the pickle in it has [0-9]+ bytes, more than the 100"):
        read_torch(tmp_path / "a.bin")


NO_OBJECTS = {
    b"null": "holds null, not a JSON object",
    b"[1]": "holds a list, not",
    b"7": "holds a int, not",
    b"{": "is not valid",
    b'{"a": [{"bc": 1, "d": {}, "bc": 1}]}': "is not valid JSON: bc is there twice",
    b'{"a": ' * 60 + b"1" + b"}" * 60: "has more than 50 levels",
    b'{"a": ' * 100_000: "has more than 50 levels",
}


@pytest.mark.parametrize("content", NO_OBJECTS, ids=NO_OBJECTS.values())
def test_files_of_json_hold_an_object_of_few_levels(tmp_path, content):
    for name in ("config.json", "tokenizer_config.json", "model.safetensors.index.json", "plan.json", "_METADATA"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "run").mkdir()
    for name in ("run.json", "config.json", "generation_config.json"):
        shutil.copy(tmp_path / "config.json", tmp_path / "run" / name)
    readers = [
        lambda: OPTConfig.from_hf(tmp_path),
        lambda: hub.read_config(tmp_path),
        lambda: read_index(tmp_path / INDEX),
        lambda: OPTTokenizer.from_pretrained(tmp_path),
        lambda: GenerationConfig.from_pretrained(tmp_path / "run"),
        lambda: read_plan(tmp_path),
        lambda: open_stored(tmp_path),
        lambda: squad.read_squad([str(tmp_path / INDEX)]),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=NO_OBJECTS[content]) as error:
            read()
        assert str(tmp_path) in str(error.value) and "NoneType" not in str(error.value)


def test_levels_are_counted_to_the_last_one():
    deepest = b'{"a": [' * 25 + b"1" + b"]}" * 25
    reading.json_object(deepest, "it")
    with pytest.raises(ValueError, match="it is not valid JSON: it has more than 50 levels"):
        reading.json_object(deepest.replace(b"1", b"{}"), "it")


def test_a_field_of_another_type_is_no_error_in_words_of_python(tmp_path):
    shutil.copytree(hub.resolve("tiny"), tmp_path / "tiny")
    (tmp_path / "tiny" / "tokenizer_config.json").write_text('{"added_tokens_decoder": null}')
    with pytest.raises(ValueError, match="not a tokenizer that can be read .a field is missing, or of another type"):
        OPTTokenizer.from_pretrained(tmp_path / "tiny")


def test_an_index_names_a_limited_number_of_files(tmp_path):
    names = [f"model-{i}.safetensors" for i in range(10_001)]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(zip(names, names, strict=True))}))
    with pytest.raises(ValueError, match="it names 10,001 files, more than the 10,000 that a checkpoint may have"):
        read_index(tmp_path / INDEX)
