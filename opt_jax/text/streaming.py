"""Text while its tokens come: decoding one by one, and stop strings. No jax.

`tokenizer`: an `opt_jax.OPTTokenizer`, everywhere here.
"""

import codecs
import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from opt_jax.system.messages import shown
from opt_jax.text.vocabulary import check_ids, to_list

_MOST_BYTES = 1000  # of all stop strings: 100 MB of states for OPT's vocabulary


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


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """When rows of tokens complete one of some strings, as arrays: compiled code looks while it decodes.

    A string may end anywhere in a token and straddle many. Bytes are compared, and special tokens count as their text.
    A string may begin in the prompt, but not end there (all as in HF's `StopStringCriteria`).
    """

    # [S, V]: the state behind each token in each state. A state says which beginning of a string the text so far ends
    # with; 0: of none; the last one: a whole string was there (Aho and Corasick, 1975). The number of states is rounded
    # up to a multiple of 16, so that few sizes are compiled.
    table: np.ndarray  # int16
    states: np.ndarray  # int32 [B]: behind each prompt

    @classmethod
    def of(cls, tokenizer: Any, strings: str | Sequence[str], prompts: Sequence[Any], vocab_size: int) -> "StopStrings":
        """
        Args:
          prompts: the ids before each row's new tokens.
          vocab_size: of the model; ids that the tokenizer does not know have no text.

        Raises:
          ValueError: no string, an empty one, or something else; strings too long for a table.
        """
        given: Any = strings.tolist() if hasattr(strings, "tolist") else strings  # type: ignore[reportAttributeAccessIssue]
        strings = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
        if not strings or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop_strings={shown(given)} must be a string or several, and none of them empty")
        try:
            sought = tuple(sorted({string.encode() for string in strings}))
        except UnicodeEncodeError:
            raise ValueError(f"stop_strings={shown(given)} has a lone surrogate, which is no Unicode") from None
        if (length := sum(map(len, sought))) > _MOST_BYTES:
            raise ValueError(f"stop_strings have {length:,} bytes together, more than {_MOST_BYTES:,}: shorten them")
        version = id(tokenizer.backend_tokenizer), len(tokenizer)  # others, once tokens are added
        states = _states(sought)
        tails = (b"".join(map(tokenizer.token_bytes, ids[-length:].tolist())) for ids in prompts)
        behind = [states[_longest_end(tail[-length:], states)] for tail in tails]
        return cls(_table(sought, tokenizer, version, vocab_size), np.array(behind, np.int32))


def _states(sought: Sequence[bytes]) -> dict[bytes, int]:
    """The beginnings of the strings, short ones first."""
    beginnings = {string[:i] for string in sought for i in range(len(string))}
    return {text: i for i, text in enumerate(sorted(beginnings, key=lambda text: (len(text), text)))}


def _longest_end(text: bytes, states: Mapping[bytes, int]) -> bytes:
    """The longest end of a text that is a state."""
    return next(text[i:] for i in range(len(text) + 1) if text[i:] in states)


@lru_cache(maxsize=4)
def _table(sought: tuple[bytes, ...], tokenizer: Any, _version: Hashable, vocab_size: int) -> np.ndarray:
    """int16 [S, V]: the state behind each token in each state."""
    states = _states(sought)
    last = -(-(len(states) + 1) // 16) * 16 - 1
    table = np.zeros((len(states), 256), np.int16)  # behind each byte
    for text, state in states.items():  # short ones first: what a byte does to a text it does to the text's end
        if text:
            table[state] = table[states[_longest_end(text[1:], states)]]
        for byte in range(256):
            longer = text + bytes([byte])
            if longer in sought:
                table[state, byte] = last
            elif longer in states and table[state, byte] != last:
                table[state, byte] = states[longer]
    table = np.concatenate([table, np.full((last + 1 - len(states), 256), last, np.int16)])

    text, counts, order = _token_bytes(tokenizer, _version, vocab_size)
    behind = np.repeat(np.arange(len(states), dtype=np.int16)[:, None], vocab_size, axis=1)
    for i, count in enumerate(counts):
        behind[:, :count] = table[behind[:, :count], text[i, :count]]
    result = np.full((last + 1, vocab_size), last, np.int16)
    result[: len(states), order] = behind
    return result


@lru_cache(maxsize=2)
def _token_bytes(tokenizer: Any, _version: Hashable, vocab_size: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Byte i of each token, uint8 [L, V], long tokens first; how many tokens have a byte i; the ids in this order."""
    texts = [tokenizer.token_bytes(i) for i in range(vocab_size)]
    lengths = np.array([len(text) for text in texts])
    order = np.argsort(-lengths, kind="stable")
    width = int(lengths.max(initial=0))
    joined = b"".join(texts[i].ljust(width, b"\0") for i in order)
    text = np.frombuffer(joined, np.uint8).reshape(vocab_size, width).T
    return np.ascontiguousarray(text), [int((lengths > i).sum()) for i in range(width)], order
