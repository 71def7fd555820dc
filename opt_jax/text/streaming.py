"""Decoding token by token, and stop strings. No jax.

In this module `tokenizer` is an `opt_jax.OPTTokenizer`.
"""

import codecs
import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from opt_jax.system.messages import shown
from opt_jax.text.vocabulary import check_ids, to_list

_MOST_BYTES = 1000  # of all stop strings together: their states take 100 MB for OPT's vocabulary


class TextStream:
    """Decodes ids one after the other into complete characters. The total is `tokenizer.decode` of all ids.

    No id is decoded twice, so the cost of an id does not depend on the ids before it.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_ids: Any) -> str:
        """The characters that one or more further ids complete, possibly ""."""
        return self._utf8.decode(b"".join(map(self._bytes, check_ids(to_list(token_ids)))))

    def end(self) -> str:
        """The rest: U+FFFD if the last character is incomplete, else "". Resets the stream."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skip else self._tokenizer.token_bytes(token_id)


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Arrays with which compiled code finds the token that completes a stop string (Aho and Corasick, 1975).

    A string may span tokens, and may end inside of a token. Bytes are compared, and special tokens count as their text.
    A string may begin in the prompt, but not end there. All of this is as in HF's `StopStringCriteria`.

    A state is the longest prefix of a string with which the text so far ends. State 0 is the empty prefix. The last
    state means that a string was completed.

    Attributes:
      table: int16 [S, V], the state after each token, for each state before it. The number of states S is rounded up to
        a multiple of 16, so that few sizes are compiled.
      states: int32 [B], the state after each prompt.
    """

    table: np.ndarray
    states: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any, strings: str | Sequence[str], prompts: Sequence[Any], vocab_size: int) -> "StopStrings":
        """The arrays for stop strings and prompts.

        Args:
          tokenizer: the tokenizer.
          strings: one or more strings.
          prompts: the ids before each row's new tokens.
          vocab_size: that of the model. Ids that the tokenizer does not have count as empty texts.

        Raises:
          ValueError: there is no string, one is empty or not a string, or they are too long for a table.
        """
        given: Any = strings.tolist() if hasattr(strings, "tolist") else strings  # type: ignore[reportAttributeAccessIssue]
        strings = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
        if not strings or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop_strings={shown(given)} must be a string or a list of strings, none of them empty")
        try:
            sought = tuple(sorted({string.encode() for string in strings}))
        except UnicodeEncodeError:
            raise ValueError(f"stop_strings={shown(given)} has a lone surrogate, which is not valid Unicode") from None
        if (length := sum(map(len, sought))) > _MOST_BYTES:
            raise ValueError(f"stop_strings have {length:,} bytes together, more than {_MOST_BYTES:,}: shorten them")
        version = tokenizer.backend_tokenizer, len(tokenizer)  # changes when tokens are added
        states = _states(sought)
        behind = [states[_longest_end(_last_bytes(tokenizer, ids.tolist(), length), states)] for ids in prompts]
        return cls(_table(sought, tokenizer, version, vocab_size), np.array(behind, np.int32))


def _last_bytes(tokenizer: Any, ids: list[int], count: int) -> bytes:
    """The last `count` bytes of the text of these tokens. Some tokens have none."""
    text = b""
    for index in reversed(ids):
        if len(text) >= count:
            break
        text = tokenizer.token_bytes(index) + text
    return text[-count:]


def _states(sought: Sequence[bytes]) -> dict[bytes, int]:
    """Prefix of a string -> its state, short prefixes first. Complete strings are not among them."""
    beginnings = {string[:i] for string in sought for i in range(len(string))}
    return {text: i for i, text in enumerate(sorted(beginnings, key=lambda text: (len(text), text)))}


def _longest_end(text: bytes, states: Mapping[bytes, int]) -> bytes:
    """The longest suffix of a text that is a state."""
    return next(text[i:] for i in range(len(text) + 1) if text[i:] in states)


@lru_cache(maxsize=4)
def _table(sought: tuple[bytes, ...], tokenizer: Any, _version: Hashable, vocab_size: int) -> np.ndarray:
    """The state after each token, for each state before it, int16 [S, V]."""
    states = _states(sought)
    last = -(-(len(states) + 1) // 16) * 16 - 1
    table = np.zeros((len(states), 256), np.int16)  # the state after each byte
    for text, state in states.items():  # short ones first, because a text's row starts as that of its longest suffix
        if text:
            table[state] = table[states[_longest_end(text[1:], states)]]
        for byte in range(256):
            longer = text + bytes([byte])
            if longer in sought:
                table[state, byte] = last
            elif longer in states and table[state, byte] != last:
                table[state, byte] = states[longer]
    table = np.concatenate([table, np.full((last + 1 - len(states), 256), last, np.int16)])

    text, starts, order = _token_bytes(tokenizer, _version, vocab_size)
    behind = np.repeat(np.arange(len(states), dtype=np.int16)[:, None], vocab_size, axis=1)
    shorter = -np.diff(starts)
    # Tokens with a byte i are the first ones, which are long.
    for i, count in enumerate(np.searchsorted(shorter, -np.arange(-shorter.min(initial=0)))):
        behind[:, :count] = table[behind[:, :count], text[starts[:count] + i]]
    result = np.full((last + 1, vocab_size), last, np.int16)
    result[: len(states), order] = behind
    return result


@lru_cache(maxsize=2)
def _token_bytes(tokenizer: Any, _version: Hashable, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes of all tokens, long tokens first; where each begins, and the end; ids in this order)."""
    texts = [tokenizer.token_bytes(i) for i in range(vocab_size)]
    lengths = np.array([len(text) for text in texts])
    order = np.argsort(-lengths, kind="stable")
    text = np.frombuffer(b"".join(texts[i] for i in order), np.uint8)
    return text, np.append(0, np.cumsum(lengths[order])), order
