"""Text while its tokens come: decoding one by one, and stop strings. No jax.

`tokenizer`: an `opt_jax.OPTTokenizer`, everywhere here.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from opt_jax.system.messages import shown
from opt_jax.text.vocabulary import check_ids, to_list


class TextStream:
    """Text from ids as they come, never half a character; in total equal to `tokenizer.decode` of all ids.

    Each id costs the bytes of its own token: nothing is decoded twice.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_ids: Any) -> str:
        """Takes one id or several; returns the text that they complete, possibly ""."""
        return self._utf8.decode(b"".join(map(self._bytes, check_ids(to_list(token_ids)))))

    def end(self) -> str:
        """What is left over: U+FFFD where the last character is incomplete, else "". The stream starts afresh."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skip else self._tokenizer.token_bytes(token_id)


class StopStrings:
    """Finds where rows of tokens complete one of some strings: wherever in a token it ends, however many it straddles.

    Bytes are compared, and special tokens count as their text; a string may begin in the prompt, but not end there (all
    as in HF's `StopStringCriteria`).

    Raises:
      ValueError: no string, an empty one, or something else.
    """

    def __init__(self, tokenizer: Any, strings: str | Sequence[str], prompts: Sequence[Any]):
        given: Any = strings.tolist() if hasattr(strings, "tolist") else strings  # type: ignore[reportAttributeAccessIssue]
        strings = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
        if not strings or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop_strings={shown(given)} must be a string or several, and none of them empty")
        self._tokenizer = tokenizer
        try:
            self._strings = [string.encode() for string in strings]
        except UnicodeEncodeError:
            raise ValueError(f"stop_strings={shown(given)} has a lone surrogate, which is no Unicode") from None
        self._keep = max(map(len, self._strings)) - 1  # bytes that may be the beginning of a string
        self._tails = [self._cut(b"".join(map(tokenizer.token_bytes, ids.tolist()[-self._keep :]))) for ids in prompts]
        self._looked = np.zeros(len(prompts), np.int32)  # tokens of each row that were looked at
        # Tokens of each row, the one that completes a string included; the greatest integer while there is none.
        self.lengths = np.full(len(prompts), np.iinfo(np.int32).max, np.int32)

    def look(self, tokens: np.ndarray, lengths: np.ndarray, rows: Sequence[int] | None = None) -> np.ndarray:
        """Which rows have completed a string, bool [r].

        tokens: int [r, N], all new tokens so far, of which the first `lengths` [r] count; rows: which they are, if not
        all in order.
        """
        rows = range(len(tokens)) if rows is None else rows
        for row, new, length in zip(rows, tokens, lengths.tolist(), strict=True):
            for column in range(self._looked[row], min(length, self.lengths[row])):
                if self._completes(row, self._tokenizer.token_bytes(int(new[column]))):
                    self.lengths[row] = column + 1
                    break
            self._looked[row] = length
        return self.lengths[list(rows)] <= lengths

    def _completes(self, row: int, new: bytes) -> bool:
        tail = self._tails[row]
        self._tails[row] = self._cut(tail + new)
        return any(string in tail[max(0, len(tail) - len(string) + 1) :] + new for string in self._strings)

    def _cut(self, text: bytes) -> bytes:
        return text[max(0, len(text) - self._keep) :]
