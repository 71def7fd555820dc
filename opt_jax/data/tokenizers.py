"""Trains a tokenizer, and copies one to other processes and file systems."""

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from etils import epath
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from opt_jax.system.disk import write_content
from opt_jax.system.reading import read_small
from opt_jax.text.tokenizer import OPTTokenizer

# Ids 0 to 3 of every OPT vocabulary; `</s>` is BOS and EOS at once, and the separator between documents.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> OPTTokenizer:
    """A byte-level BPE tokenizer trained on the documents, with OPT's special ids."""
    if vocab_size < len(SPECIAL_TOKENS) + 256:
        raise ValueError(
            f"a vocabulary of {vocab_size} does not hold {len(SPECIAL_TOKENS)} special tokens and 256 bytes"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return OPTTokenizer(tokenizer)


def tokenizer_to_bytes(tokenizer: OPTTokenizer) -> bytes:
    """The complete tokenizer as bytes, for another process or another file system."""
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(directory).iterdir())}
    return json.dumps(files).encode()


def tokenizer_from_bytes(data: bytes) -> OPTTokenizer:
    with TemporaryDirectory() as directory:
        for name, text in json.loads(data).items():
            write_content(Path(directory, name), text.encode())
        return OPTTokenizer.from_pretrained(directory)


def save_tokenizer(tokenizer: OPTTokenizer, directory: epath.Path) -> None:
    """Write the tokenizer's files. Replaces those of an earlier start that was killed before its first step."""
    if directory.exists():
        directory.rmtree()
    directory.mkdir(parents=True)
    for name, text in json.loads(tokenizer_to_bytes(tokenizer)).items():
        write_content(directory / name, text.encode())


def read_tokenizer(directory: epath.Path) -> OPTTokenizer:
    """The tokenizer that `save_tokenizer` has written."""
    return tokenizer_from_bytes(
        json.dumps({path.name: read_small(path).decode() for path in directory.iterdir()}).encode()
    )
