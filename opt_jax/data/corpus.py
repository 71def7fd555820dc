"""The corpus of a training run: reads documents, holds some out, and tokenises them. No jax.

Training data goes files -> documents (`documents.py`) -> streams of token ids (`tokens.py`) -> windows in an order
fixed by (seed, step) (`windows.py`).
"""

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from opt_jax.data.arrays import is_array
from opt_jax.data.documents import Source, find_sources, read_documents
from opt_jax.data.files import stdlib_files
from opt_jax.data.records import TEXT_KEY, BadRecords
from opt_jax.data.tokens import Tokens, open_tokens, sources_of, tokenize
from opt_jax.system.messages import one_line
from opt_jax.text.tokenizer import OPTTokenizer

HELD_OUT = 0.05


def split_documents(documents: list[str], fraction: float = HELD_OUT) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents). The split is random, but the same for every seed of a run.

    With fewer than 1 / fraction documents, the end of each document is held out instead.
    """
    count = int(len(documents) * fraction)
    if count == 0:
        cuts = [int(len(document) * (1 - fraction)) for document in documents]
        pairs = list(zip(documents, cuts, strict=True))
        return [document[:cut] for document, cut in pairs], [document[cut:] for document, cut in pairs]
    held_out = set(np.random.default_rng(0).permutation(len(documents))[:count].tolist())
    training = [document for i, document in enumerate(documents) if i not in held_out]
    return training, [documents[i] for i in sorted(held_out)]


def _is_array(source: Source) -> TypeGuard[Path]:
    return isinstance(source, Path) and is_array(source)


def _warn_of_same_files(training: Sequence[Source], held_out: Sequence[Source]) -> None:
    """Print which files are trained on twice, as text and as token ids, or are in the validation data as well."""
    files = list(_files(training))
    read = {name: source for source, name in files}
    twice = [f"{name} is read twice, also in {read[name]}" for source, name in files if str(source) != str(read[name])]
    both = [f"{name} is in --data and in --validation-data" for _, name in _files(held_out) if name in read]
    for lines in (twice, both):
        if lines:
            more = f", and {len(lines) - 1:,} more" if lines[1:] else ""
            print(f"warning: {one_line(lines[0], 400)}{more}", file=sys.stderr, flush=True)


def _files(sources: Sequence[Source]) -> Iterator[tuple[Source, str]]:
    """(source, file) of each file that is read, or whose text is in an array."""
    for source in sources:
        for name in [str(source), *(sources_of(source) if _is_array(source) else [])]:
            yield source, os.path.realpath(name) if os.path.exists(name) else name


class Corpus:
    """The data of `--data`, `--validation-data` and `--mixture`. Text is read at once; .npy files are memory-mapped.

    Args:
      names: training data; default: the standard library of Python.
      valid: validation data. Without it, the last 5 % of each .npy file are held out, and of text the documents that
        `split_documents` selects.
      mixed: make one stream of each of `names`.
      skip_bad: leave out records that cannot be read, and count them.
      text_key: the key or column of the text in files of records.

    Attributes:
      training: all documents to train on, and to train a tokenizer on.

    Raises:
      ValueError, FileNotFoundError: as `find_sources` and `read_documents`; or `skip_bad` without any text.
    """

    def __init__(
        self,
        names: Sequence[str],
        valid: Sequence[str] = (),
        mixed: bool = False,
        skip_bad: bool = False,
        text_key: str = TEXT_KEY,
    ):
        self.bad, self._text_key = BadRecords(skip_bad), text_key
        groups: Any = [(name, find_sources([name], text_key=text_key)) for name in names] or [
            ("the standard library", stdlib_files())
        ]
        groups = groups if mixed else [("", [source for _, sources in groups for source in sources])]
        held_out = find_sources(valid, text_key=text_key) if valid else []
        self.files = sum(len(sources) for _, sources in groups)
        _warn_of_same_files([source for _, sources in groups for source in sources], held_out)
        if all(map(_is_array, chain(held_out, *(sources for _, sources in groups)))):
            given = {"--skip-bad-records": skip_bad, "--text-key": text_key != TEXT_KEY}
            for option in [option for option in given if given[option]]:
                raise ValueError(f"{option} without effect: all data is token ids (.npy), no text; leave it out")
        self._parts = [self._read(name, sources, held_out=not valid) for name, sources in groups]
        self._valid = self._read("", held_out, held_out=False) if valid else None
        self.training = [document for _, documents, _, _ in self._parts for document in documents]
        self._mixed = mixed

    def _read(
        self, name: str, sources: Sequence[Source], held_out: bool
    ) -> tuple[str, list[str], list[str], list[Path]]:
        """(name, training documents, held-out documents, .npy files)."""
        arrays = [source for source in sources if _is_array(source)]
        texts = [source for source in sources if source not in arrays]
        documents = read_documents(texts, self.bad, self._text_key) if texts else []
        training, rest = split_documents(documents) if held_out and documents else (documents, [])
        return name, training, rest, arrays

    def summary(self, training: int, held_out: int) -> str:
        """A line for the log, with these numbers of tokens."""
        bad = f"; {self.bad.count:,} bad records were left out (--skip-bad-records)" if self.bad.count else ""
        return f"{self.files} files, {training:,} tokens to train on, {held_out:,} for validation{bad}"

    def tokens(self, tokenizer: OPTTokenizer) -> tuple[list[Tokens], list[Tokens]]:
        """(streams to train on, held-out streams). A mixture has one stream for each name."""
        training, held_out = [], []
        for name, documents, rest, arrays in self._parts:
            if self._mixed and len(arrays) + bool(documents) != 1:
                what = "must be text, or one .npy file or directory of arrays"
                raise ValueError(f"--mixture: {name} {what}, to be one source with one weight")
            streams = [open_tokens(path, tokenizer) for path in arrays]
            if self._valid is None:
                pairs = [stream.split(HELD_OUT, tokenizer.bos_token_id) for stream in streams]
                streams = [pair[0] for pair in pairs]
                held_out += [pair[1] for pair in pairs]
            training += streams + ([Tokens(name, tokenize(documents, tokenizer))] if documents else [])
            held_out += [Tokens(name, tokenize(rest, tokenizer))] if rest else []
        if self._valid is not None:
            _, documents, _, arrays = self._valid
            held_out = [open_tokens(path, tokenizer) for path in arrays]
            held_out += [Tokens("--validation-data", tokenize(documents, tokenizer))] if documents else []
        return training, held_out
