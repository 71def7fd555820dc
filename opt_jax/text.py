"""Text in and out: the tokenizer, decoding token by token, stop strings. No jax.

OPT's tokenizer is GPT-2's byte-level BPE with RoBERTa's ids and `</s>` in front of every text. Ids and decoded text are
those of Hugging Face's `AutoTokenizer` for facebook/opt-*; deviations are named in the docstrings.
"""

import codecs
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from opt_jax.reading import read_small
from opt_jax.tokenizer_files import panics_as_errors, read_as, read_json

# facebook/opt-*/tokenizer_config.json. The unknown token is </s> too, so a literal "<unk>" in a text is ordinary text.
_OPT_SPECIAL_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}

# GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE = {chr(b): b for b in _PRINTABLE}
_BYTE |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class BatchEncoding(dict):
    """What the tokenizer returns: a dict of `input_ids` and `attention_mask` that also has them as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class OPTTokenizer:
    """OPT's byte-level BPE tokenizer, called and read like `transformers.GPT2Tokenizer`.

    Deviations from HF: arrays come back unless `return_tensors=None` asks for lists (HF's default). `padding_side` is
    "left" (what generation needs) whatever the files say. With `vocab.json` and `merges.txt` a BOS is added unless
    `tokenizer_config.json` says `"add_bos_token": false`; with `tokenizer.json`, if
    that file adds one or the config says `true`.

    Args:
      backend: a byte-level BPE of the `tokenizers` library; taken over and changed, not copied.
      config: the content of `tokenizer_config.json` (special tokens, `add_bos_token`, ...); where silent, OPT's.
      padding_side, truncation_side: "left" or "right". Truncation never removes the BOS.

    Raises:
      ValueError: the backend is not a byte-level BPE, or a special token is not in its vocabulary.
    """

    bos_token = eos_token = unk_token = pad_token = ""  # all eight are set in __init__
    bos_token_id = eos_token_id = unk_token_id = pad_token_id = -1

    def __init__(
        self,
        backend: Tokenizer,
        config: dict[str, Any] | None = None,
        *,
        padding_side: str = "left",
        truncation_side: str = "right",
    ):
        if not isinstance(backend.model, BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError(f"not a byte-level BPE, as OPT needs it: {backend.model!r:.40}, {backend.decoder!r:.40}")
        self.backend_tokenizer = backend
        self.padding_side = _side("padding_side", padding_side)
        self.truncation_side = _side("truncation_side", truncation_side)
        self._config = config = dict(config or {})
        limit = config.get("model_max_length") or 0
        self.model_max_length = int(limit) if 0 < limit < 1e9 else None  # HF writes 1e30 for none

        ids = {int(i): _added_token(token) for i, token in config.get("added_tokens_decoder", {}).items()}
        added = sorted(ids.items())
        backend.add_tokens([token for _, token in added])  # at once: each call makes an automaton of all that there are
        for index, token in added:
            if backend.token_to_id(token.content) != index:
                raise ValueError(f"added token {token.content!r} cannot get the id {index} that the files ask for")
        named = {name: config.get(name) or default for name, default in _OPT_SPECIAL_TOKENS.items()}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = [*extra, *(config[name] for name in ("sep_token", "cls_token", "mask_token") if config.get(name))]
        known = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        unknown = []
        for name, value in [*named.items(), *(("special token", token) for token in extra)]:
            token = _added_token(value)
            index = backend.token_to_id(token.content)
            if index is None:
                raise ValueError(f"{name} {token.content!r} is not in the vocabulary of the tokenizer files")
            if token.content not in known:
                unknown.append(token)
            if name in named:
                setattr(self, name, token.content)
                setattr(self, f"{name}_id", index)
        backend.add_special_tokens(unknown)
        self.all_special_ids = sorted(i for i, t in backend.get_added_tokens_decoder().items() if t.special)

        if config.get("add_bos_token", True) and not self.add_bos_token:
            backend.post_processor = processors.TemplateProcessing(  # type: ignore[reportAttributeAccessIssue]
                single=f"{self.bos_token} $A",
                pair=f"{self.bos_token} $A {self.bos_token} $B",
                special_tokens=[(self.bos_token, self.bos_token_id)],
            )

    @classmethod
    def from_file(
        cls, vocab: str | os.PathLike, merges: str | os.PathLike, config: dict | None = None, **sides
    ) -> "OPTTokenizer":
        """The tokenizer of a `vocab.json` and a `merges.txt`; FileNotFoundError or ValueError if they are not."""
        sides = _sides(**sides)
        for path in (vocab, merges):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such tokenizer file")
        for path in (vocab, merges):
            read_small(Path(path))  # once more by the library, which knows no limit
        backend: Any = read_as(f"{vocab}, {merges}", lambda: Tokenizer(BPE.from_file(str(vocab), str(merges))))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=(config or {}).get("add_prefix_space", False))
        backend.decoder = decoders.ByteLevel()
        return read_as(f"{vocab}, {merges}", lambda: cls(backend, config, **sides))

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, *, revision=None, cache_dir=None, local_files_only=False, **sides
    ) -> "OPTTokenizer":
        """The tokenizer of a hub id, a directory (`tokenizer.json`, or `vocab.json` and `merges.txt`) or "tiny".

        Takes `padding_side` and `truncation_side`, too. FileNotFoundError or ValueError where there is no tokenizer.
        """
        from opt_jax import hub

        sides = _sides(**sides)
        found = hub.resolve(
            name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, weights=False
        )
        for folder in hub.companion_directories(found):
            fast = folder / "tokenizer.json"
            if fast.is_file() or (folder / "vocab.json").is_file():
                break
        else:
            raise FileNotFoundError(f"{found}: no tokenizer here (tokenizer.json, or vocab.json and merges.txt)")
        if hub.is_remote(folder):
            with TemporaryDirectory() as copy:
                for file in filter(lambda path: path.is_file(), (folder / name for name in hub.TOKENIZER_FILES)):
                    Path(copy, file.name).write_bytes(read_small(file))
                return cls.from_pretrained(copy, **sides)
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # else the other two files are leftovers of old versions, as in HF
            config |= read_json(folder / "special_tokens_map.json")
            added = {} if fast.is_file() else read_json(folder / "added_tokens.json")
            if added:
                config["added_tokens_decoder"] = {i: {"content": token} for token, i in added.items()}
        if not fast.is_file():
            return cls.from_file(folder / "vocab.json", folder / "merges.txt", config, **sides)
        text = read_small(fast)
        backend = read_as(str(fast), lambda: Tokenizer.from_buffer(text))
        backend.no_padding()
        backend.no_truncation()
        config = {"add_bos_token": False} | config  # where silent, tokenizer.json knows
        return read_as(str(folder), lambda: cls(backend, config, **sides))

    @property
    def add_bos_token(self) -> bool:
        return self.backend_tokenizer.encode("").ids[:1] == [self.bos_token_id]

    @property
    def vocab_size(self) -> int:
        """Number of tokens without those added later; `len(tokenizer)` counts them all."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        return f"OPTTokenizer(vocab_size={self.vocab_size}, bos={self.bos_token!r}, pad={self.pad_token!r})"

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "np",
        add_special_tokens: bool = True,
        padding_side: str | None = None,
    ) -> BatchEncoding:
        """Ids and mask (0 on pads) of one text or of a batch. May be called from several threads at once.

        Args:
          padding: False, True (or "longest"), or "max_length". Default: True for arrays, False for lists.
          truncation: cut to `max_length` (default: the files' `model_max_length`, where they have one).
          return_tensors: "np" for int32 arrays [B, T], ready for a model, None for lists (flat for one string).
          add_special_tokens: False leaves the BOS out: for pieces of a text, not for what a model is to continue.
          padding_side: "left" or "right", instead of `self.padding_side`.

        Raises:
          ValueError: an argument that is not one of these, or rows of different lengths for "np" without padding.

        Warns:
          UserWarning: the BOS is there twice, because a text begins with it, or, with "np", not at all.
        """
        if return_tensors not in (None, "np"):
            raise ValueError(f'return_tensors={return_tensors!r}: use "np"; JAX takes NumPy arrays as they are')
        padding = return_tensors == "np" if padding is None else padding
        if padding not in (False, True, "longest", "max_length"):
            raise ValueError(f'padding={padding!r}: use False, True, "longest" or "max_length"')
        if not isinstance(truncation, bool):
            raise ValueError(f"truncation={truncation!r}: use True or False")
        if padding == "max_length" or truncation:
            max_length = self.model_max_length if max_length is None else max_length
            if max_length is None or max_length < 1:
                raise ValueError(f'truncation=True, padding="max_length" need a positive max_length, got {max_length}')
        elif max_length is not None:
            raise ValueError('max_length has no effect without truncation=True or padding="max_length"')
        if padding_side and not padding:
            raise ValueError("padding_side has no effect without padding=True")
        texts = [text] if isinstance(text, str) else list(text)
        for i, one in enumerate(texts):
            if not isinstance(one, str):
                raise ValueError(f"text must be a string or a sequence of strings; item {i} is a {type(one).__name__}")

        try:
            with panics_as_errors():
                rows = self._encode(texts, add_special_tokens, max_length if truncation else None)
        except TypeError as error:  # what the tokenizers library makes of a failing UTF-8 encoding
            raise ValueError("a text has a lone surrogate (no Unicode); read it with errors='replace'") from error
        bos = self.bos_token_id
        if any(row[:2] == [bos, bos] for row in rows):
            warnings.warn(f"ids begin with {self.bos_token!r} twice: leave it out of the text", stacklevel=2)
        # Lists are for joining pieces (training data); an array goes to the model.
        if return_tensors and self.add_bos_token and any(row[:1] != [bos] for row in rows):
            warnings.warn(f"no {self.bos_token!r} in front: OPT expects it; leave add_special_tokens on", stacklevel=2)

        masks = [[1] * len(row) for row in rows]
        if padding:
            width = max_length if padding == "max_length" and max_length else max(map(len, rows), default=0)
            left = _side("padding_side", padding_side or self.padding_side) == "left"

            def pad(row: list[int], value: int) -> list[int]:
                fill = [value] * (width - len(row))
                return fill + row if left else row + fill

            rows = [pad(row, self.pad_token_id) for row in rows]
            masks = [pad(mask, 0) for mask in masks]
        if return_tensors:
            if len({len(row) for row in rows}) > 1:
                raise ValueError('return_tensors="np" with texts of different lengths needs padding=True')
            shape = (len(rows), len(rows[0]) if rows else 0)
            rows, masks = (np.array(x, np.int32).reshape(shape) for x in (rows, masks))
        elif isinstance(text, str):
            rows, masks = rows[0], masks[0]
        return BatchEncoding(input_ids=rows, attention_mask=masks)

    def _encode(self, texts: list[str], add_special_tokens: bool, max_length: int | None) -> list[list[int]]:
        # The backend's own truncation is a setting of the shared object; truncating results keeps threads independent.
        backend = self.backend_tokenizer
        if max_length is None:
            return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
        special = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        rows = []
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
            encoding.truncate(max(0, max_length - special), direction=self.truncation_side)
            rows.append(backend.post_process(encoding, add_special_tokens=add_special_tokens).ids)
        return rows

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text, as a list."""
        return self(text, return_tensors=None, add_special_tokens=add_special_tokens)["input_ids"]

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of a row of ids (list, NumPy or JAX array, or one id); a batch [B, T] gives a list of texts.

        Bytes that are no UTF-8, as half a character at the end, become U+FFFD; ids outside the vocabulary are skipped.
        `clean_up_tokenization_spaces=True` warns and changes nothing: it would damage byte-level BPE (so in HF v5).
        """
        if clean_up_tokenization_spaces:
            warnings.warn("clean_up_tokenization_spaces=True does not apply to byte-level BPE", stacklevel=2)
        ids = _to_list(token_ids)
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens) for row in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token id {min(ids)} is negative: replace ignored labels by pad_token_id before decoding")
        with panics_as_errors():
            return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """The texts of several rows of ids, as `decode` gives them."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences]

    def stop_strings(self, strings: str | Sequence[str], prompts: Sequence[Any]) -> "StopStrings":
        """What looks for `strings` while rows of tokens grow; `prompts`: the ids before each of them."""
        return StopStrings(self, strings, prompts)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of one token, which may be part of a character only; b"" for ids outside the vocabulary."""
        token = self.backend_tokenizer.id_to_token(token_id) or ""
        try:
            return bytes(_BYTE[char] for char in token)
        except KeyError:  # an added token outside GPT-2's alphabet is its own text
            return token.encode()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json` and the files of facebook/opt-*, for `from_pretrained` and HF's `AutoTokenizer`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend_tokenizer.save(str(folder / "tokenizer.json"))
        self.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
        named = {n: getattr(self, n) for n in _OPT_SPECIAL_TOKENS}
        # Added tokens are in tokenizer.json; the other two fields are where HF once found its files.
        gone = ("added_tokens_decoder", "name_or_path", "special_tokens_map_file")
        config = {"tokenizer_class": "GPT2Tokenizer"} | {k: v for k, v in self._config.items() if k not in gone}
        config |= named | {"add_bos_token": self.add_bos_token}
        for file, content in (("tokenizer_config.json", config), ("special_tokens_map.json", named)):
            (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


AutoTokenizer = OPTTokenizer


class TextStream:
    """Text from ids as they come, never half a character; in total equal to `tokenizer.decode` of all ids.

    Each id costs the bytes of its own token: nothing is decoded twice.
    """

    def __init__(self, tokenizer: OPTTokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_ids: Any) -> str:
        """Takes one id or several; returns the text that they complete, possibly ""."""
        return self._utf8.decode(b"".join(map(self._bytes, _to_list(token_ids))))

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

    def __init__(self, tokenizer: OPTTokenizer, strings: str | Sequence[str], prompts: Sequence[Any]):
        strings = [strings] if isinstance(strings, str) else list(strings)
        if not strings or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop_strings={strings!r:.60} must be a string or several, and none of them empty")
        self._tokenizer = tokenizer
        self._strings = [string.encode() for string in strings]
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


def _sides(padding_side: str = "left", truncation_side: str = "right") -> dict[str, Any]:
    sides = dict(padding_side=padding_side, truncation_side=truncation_side)
    return {name: _side(name, value) for name, value in sides.items()}


def _side(name: str, value: str) -> str:
    if value not in ("left", "right"):
        raise ValueError(f'{name}={value!r}: use "left" or "right"')
    return value


def _to_list(ids: Any) -> list:
    """A list of int, or of such lists, from one id or anything array-like."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # NumPy and JAX, scalars too
    if isinstance(ids, int):
        return [ids]
    return [i if isinstance(i, int) else i.tolist() if hasattr(i, "tolist") else list(i) for i in ids]


def _added_token(value: str | dict[str, Any]) -> AddedToken:
    """An added token as HF writes it: its text, or a dict of the fields of `tokenizers.AddedToken`."""
    fields: Any = {"content": value} if isinstance(value, str) else {k: v for k, v in value.items() if k != "__type"}
    return AddedToken(**fields)
