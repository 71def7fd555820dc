"""How papers turn the rows of a data set into a text to measure, or into windows to calibrate with. No jax.

The protocols are those of `datautils.py` of GPTQ (https://github.com/IST-DASLab/gptq), which SparseGPT and Wanda
copied. For the same rows, tokenizer and seed, windows are theirs, token for token: they draw from Python's `random`.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from opt_jax.data.arrays import is_array
from opt_jax.data.documents import find_sources, pieces
from opt_jax.data.files import TEXT_SUFFIXES
from opt_jax.data.records import TEXT_KEY, BadRecords
from opt_jax.data.tokens import tokenize
from opt_jax.text.tokenizer import OPTTokenizer

JOINS = {"blank-lines": "\n\n", "spaces": " "}
C4_WINDOWS, C4_ROWS = 256, 1100  # of C4's first validation shard


def read_rows(names: Sequence[str], text_key: str = TEXT_KEY, option: str = "--data") -> list[str]:
    """The rows of data sets: one of each text file, and one of each record of other files, also blank ones.

    (WikiText-2 has many blank rows, and its joined text has line breaks of them.)

    Args:
      names: as in `find_sources`.
      text_key: the key or column of the text in files of records.
      option: for messages.

    Raises:
      ValueError: a bad record, arrays of token ids, or blank rows only.
      FileNotFoundError: no such file.
    """
    sources = find_sources(names, TEXT_SUFFIXES, text_key)
    if arrays := [source for source in sources if is_array(source)]:
        raise ValueError(f"{option} {arrays[0]}: holds token ids: name the texts, which the tokenizer then tokenises")
    rows = [text for text, _ in pieces(sources, BadRecords(None), text_key=text_key)]
    if not any(map(str.strip, rows)):
        raise ValueError("no documents in the data: every file is empty")
    return rows


def joined_ids(rows: Sequence[str], join: str, tokenizer: OPTTokenizer) -> np.ndarray:
    """int32 [N]: `</s>`, and the ids of the rows joined by `JOINS[join]`, tokenised as one text."""
    return _with_bos(JOINS[join].join(rows), tokenizer)


def evaluation_ids(rows: Sequence[str], how: str, tokenizer: OPTTokenizer, window: int) -> np.ndarray:
    """int32 [N]: the text to measure, by the protocol `how`.

    Args:
      rows: of the data set.
      how: "blank-lines" (WikiText-2, and GPTQ's PTB) or "spaces" (its newer PTB): all rows joined. "c4": 256 random
        windows with seed 0, each of a row of more than `window` tokens. "c4-new": the first 1100 rows joined by
        spaces, of which the first 256 windows count.
      tokenizer: the tokenizer.
      window: tokens of a window.

    Raises:
      ValueError: of "c4", no row is long enough.
    """
    if how == "c4":
        return windows_of_rows(rows, tokenizer, C4_WINDOWS, window, seed=0).reshape(-1)
    if how == "c4-new":
        return joined_ids(rows[:C4_ROWS], "spaces", tokenizer)[: C4_WINDOWS * window]
    return joined_ids(rows, how, tokenizer)


def windows_of_text(ids: np.ndarray, samples: int, length: int, seed: int) -> np.ndarray:
    """int32 [samples, length]: windows of a text at random places; they may overlap.

    Raises:
      ValueError: the text has no more tokens than a window.
    """
    draw = random.Random(seed)
    if len(ids) <= length:
        raise ValueError(f"{len(ids):,} tokens: a window of {length} needs a text of more; give more text")
    starts = [draw.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return np.stack([ids[start : start + length] for start in starts])


def windows_of_rows(rows: Sequence[str], tokenizer: OPTTokenizer, samples: int, length: int, seed: int) -> np.ndarray:
    """int32 [samples, length]: windows at random places of random rows; a row of `length` tokens or fewer is no choice.

    Raises:
      ValueError: no row is long enough.
    """
    draw, too_short, windows = random.Random(seed), set(), []
    while len(windows) < samples:
        row = draw.randint(0, len(rows) - 1)
        ids = None if row in too_short else _with_bos(rows[row], tokenizer)
        if ids is not None and len(ids) > length:  # GPTQ's code takes a row of just `length` tokens, and fails
            start = draw.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
            continue
        too_short.add(row)
        if len(too_short) == len(rows):
            raise ValueError(f"none of {len(rows):,} rows has more than {length} tokens: join them, or take others")
    return np.stack(windows)


def _with_bos(text: str, tokenizer: OPTTokenizer) -> Any:
    return tokenize([text], tokenizer)[:-1]  # without the last `</s>`
