"""Files that others have written: no pipe is waited for, and small files have a largest size, wherever they are."""

import os
import shutil
import types

import numpy as np
import pytest
from support.hf_files import state_dict_pickle, torch_zip

from opt_jax import GenerationConfig, OPTConfig, OPTForCausalLM, OPTTokenizer
from opt_jax.checkpoints import hub, pretrained
from opt_jax.checkpoints.download import read_index
from opt_jax.checkpoints.formats.torch_files import read_safetensors, read_torch
from opt_jax.data.tokenizers import read_tokenizer
from opt_jax.data.tokens import Tokens, open_tokens
from opt_jax.system import reading
from opt_jax.training.tasks import classification, squad


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
    """As `epath` gives an object in a store."""

    def __init__(self, length):
        self.length = length

    def __fspath__(self):
        return "gs://bucket/config.json"

    def stat(self):
        return types.SimpleNamespace(length=self.length)

    def read_bytes(self):
        assert self.length < 100
        return b"content"


def test_objects_have_it_too():
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
    "./vocab.json": lambda directory: pretrained.read_companions([directory]),
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
