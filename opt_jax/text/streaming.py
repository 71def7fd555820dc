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
      sought: the strings, as bytes.
      tails: the last bytes of each prompt, as many as the strings have together.
      tokenizer: the tokenizer.
    """

    table: np.ndarray
    states: np.ndarray
    sought: tuple[bytes, ...]
    tails: Sequence[bytes]
    tokenizer: Any

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
        given, values = strings, strings.tolist() if hasattr(strings, "tolist") else strings  # type: ignore[reportAttributeAccessIssue]
        strings = [values] if isinstance(values, str) else list(values) if isinstance(values, Iterable) else []
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
        tails = [_last_bytes(tokenizer, ids.tolist(), length) for ids in prompts]
        behind = [states[_longest_end(tail, states)] for tail in tails]
        table = _table(sought, tokenizer, version, vocab_size)
        return cls(table, np.array(behind, np.int32), sought, tails, tokenizer)

    def ending(self, row: int, new_ids: Sequence[int]) -> tuple[str | None, int]:
        """The string that the last new token of a row completes, and the number of bytes from its first one on.

        Among several it is the one that ends first, and among those the longest. (None, 0) if there is none.
        """
        *before, last = new_ids
        text, token = self._tail(row, before), self.tokenizer.token_bytes(last)
        for end in range(1, len(token) + 1):
            if ending := [string for string in self.sought if (text + token[:end]).endswith(string)]:
                string = max(ending, key=len)
                return string.decode(), len(string) + len(token) - end
        return None, 0

    def beginning(self, row: int, new_ids: Sequence[int]) -> int:
        """The number of last bytes of a row that may be the beginning of a string."""
        return len(_longest_end(self._tail(row, new_ids), _states(self.sought)))

    def _tail(self, row: int, new_ids: Sequence[int]) -> bytes:
        length = sum(map(len, self.sought))
        return (self.tails[row] + _last_bytes(self.tokenizer, new_ids, length))[-length:]


class TextBeforeStop(TextStream):
    """Decodes the new tokens of a row without the stop string that ends it.

    Holds back characters that may be the beginning of a stop string.
    """

    def __init__(self, stops: StopStrings, row: int = 0, skip_special_tokens: bool = True):
        super().__init__(stops.tokenizer, skip_special_tokens)
        self._stops, self._row, self._ids, self._ended = stops, row, [], False
        self._held, self._shown = bytearray(), bytearray()  # bytes that were held back; 1 where they are to be shown

    def put(self, token_ids: Any) -> str:
        """The characters that one or more further ids complete, and that are not part of a stop string."""
        return "".join(map(self._put, check_ids(to_list(token_ids))))

    def end(self) -> str:
        """The rest, if no stop string ended the text. Resets nothing: the stream is for one row."""
        return ("" if self._ended else self._release(0)) + super().end()

    def _put(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._tokenizer.token_bytes(token_id)
        self._held += text
        self._shown += bytes([token_id not in self._skip]) * len(text)
        string, kept = self._stops.ending(self._row, self._ids)
        self._ended = string is not None
        return self._release(kept if self._ended else self._stops.beginning(self._row, self._ids))

    def _release(self, kept: int) -> str:
        """The characters of all bytes that are held back, but for the last `kept`."""
        count = max(0, len(self._held) - kept)
        shown = bytes(byte for byte, wanted in zip(self._held[:count], self._shown, strict=False) if wanted)
        del self._held[:count], self._shown[:count]
        return self._utf8.decode(shown)


def _last_bytes(tokenizer: Any, ids: Sequence[int], count: int) -> bytes:
    """The last `count` bytes of the text of these tokens. Some tokens have none."""
    text = b""
    for index in reversed(ids):
        if len(text) >= count:
            break
        text = tokenizer.token_bytes(index) + text
    return text[-count:]


@lru_cache(maxsize=4)
def _states(sought: tuple[bytes, ...]) -> dict[bytes, int]:
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
