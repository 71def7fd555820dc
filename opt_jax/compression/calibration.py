"""Calibration samples, by the protocols of the papers (see `data.protocols`)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from opt_jax.data.protocols import joined_ids, read_rows, windows_of_rows, windows_of_text
from opt_jax.data.records import TEXT_KEY
from opt_jax.data.tokens import hash_of_ids
from opt_jax.text.tokenizer import OPTTokenizer

Rows = Literal["blank-lines", "spaces", "c4"]
MOST_TOKENS = 2048  # of a window, as in the papers


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Windows of text from which statistics are collected.

    Attributes:
      ids: [N, T].
      about: where they come from, for the recipe beside the compressed weights.
    """

    ids: Int[np.ndarray, "N T"]
    about: dict[str, Any]


def read_calibration(
    names: Sequence[str],
    tokenizer: OPTTokenizer,
    *,
    samples: int = 128,
    window: int = MOST_TOKENS,
    seed: int = 0,
    rows: Rows | None = None,
    text_key: str = TEXT_KEY,
) -> Calibration:
    """Random windows of a data set.

    Args:
      names: files, directories, `hf:NAME`, as in `opt-jax eval --data`.
      tokenizer: the model's.
      samples: the number of windows.
      window: the tokens of each.
      seed: of the random places. For one seed they are those of the code of GPTQ.
      rows: "blank-lines" (as GPTQ's WikiText-2 and PTB) or "spaces" (as SparseGPT's): join all rows to one text, and
        take windows anywhere in it. "c4": each window lies in a random row that is long enough. Default: the text, if
        there is one row; else "c4".
      text_key: the key or column of the text in files of records.

    Raises:
      ValueError, FileNotFoundError: too little text; or see `read_rows`.
    """
    texts = read_rows(names, text_key, "--calibration")
    if len(texts) == 1:
        rows = rows or "blank-lines"  # which joins nothing
    how: Rows = rows or "c4"
    try:
        if how == "c4":
            ids = windows_of_rows(texts, tokenizer, samples, window, seed)
        else:
            ids = windows_of_text(joined_ids(texts, how, tokenizer), samples, window, seed)
        if 2 * (distinct := len(np.unique(ids, axis=0))) < samples:
            raise ValueError(f"only {distinct} of {samples} windows differ: give more text, or fewer samples")
    except ValueError as error:
        raise ValueError(f"--calibration {' '.join(names)}: {error}") from None
    about = dict(data=list(names), text_key=text_key, rows=how, samples=samples, window=window, seed=seed)
    return Calibration(ids, about | {"hash": hash_of_ids(ids.reshape(-1))})
