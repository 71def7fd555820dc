"""Text in and out: the tokenizer. No jax.

OPT's tokenizer is GPT-2's byte-level BPE with RoBERTa's ids and `</s>` in front of every text. Ids and decoded text are
those of Hugging Face's `AutoTokenizer` for facebook/opt-*. Docstrings name the deviations.
"""

import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from opt_jax.checkpoints import hf_scripts, hub, publish
from opt_jax.model.ids import as_array
from opt_jax.system.disk import write_content
from opt_jax.system.messages import shown
from opt_jax.system.reading import note_without_effect, read_small
from opt_jax.system.temporary import refuse_links, write_file
from opt_jax.text.streaming import StopStrings
from opt_jax.text.tokenizer_files import (
    WITHOUT_EFFECT,
    check_added_ids,
    check_added_lengths,
    check_fields,
    check_growth,
    check_ids_of_tokens,
    check_lengths,
    contents_of,
    panics_as_errors,
    read_as,
    read_json,
    set_prefix_space,
)
from opt_jax.text.vocabulary import OPT_SPECIAL_TOKENS, SPECIAL_TOKENS, Vocabulary, check_ids, to_list

# GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE = {chr(b): b for b in _PRINTABLE}
_BYTE |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class BatchEncoding(dict):
    """What the tokenizer returns: a dict with `input_ids` and `attention_mask`, which are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise hf_scripts.no_attribute("a BatchEncoding", name, hf_scripts.ENCODING) from None


class OPTTokenizer(Vocabulary):
    """OPT's byte-level BPE tokenizer, with the interface of `transformers.GPT2Tokenizer`.

    The base class `Vocabulary` has the tokens and special tokens.

    Deviations from HF: a call returns arrays unless `return_tensors=None` asks for lists, which is HF's default.
    `padding_side` is "left", which generation needs, whatever the files say. With `vocab.json` and `merges.txt` a BOS
    is added unless `tokenizer_config.json` says `"add_bos_token": false`; with `tokenizer.json`, if that file adds one
    or the config says `true`. Setting an attribute that does not exist is an error.

    Args:
      backend: a byte-level BPE of the `tokenizers` library. It is changed, not copied.
      config: the content of `tokenizer_config.json` (special tokens, `add_bos_token`, `add_prefix_space`, ...). Missing
        fields have OPT's values.
      padding_side: "left" or "right".
      truncation_side: "left" or "right"; default: that of `config`, else "right". Truncation never removes the BOS.

    Raises:
      ValueError: the backend is not a byte-level BPE, or a special token is not in its vocabulary.
    """

    padding_side = "left"
    truncation_side = "right"
    model_max_length: int | None = None

    def __init__(
        self,
        backend: Tokenizer,
        config: dict[str, Any] | None = None,
        *,
        padding_side: str = "left",
        truncation_side: str | None = None,
    ):
        if not isinstance(backend.model, BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError(f"not a byte-level BPE, as OPT needs it: {backend.model!r:.40}, {backend.decoder!r:.40}")
        self.backend_tokenizer, self._special, self._extra, self._add_eos = backend, {}, [], False
        self._config = config = dict(config or {})
        check_fields(config)
        check_growth(backend)
        set_prefix_space(backend, config)
        self.padding_side = padding_side
        self.truncation_side = truncation_side or config.get("truncation_side") or "right"
        limit = config.get("model_max_length", config.get("max_len")) or 0  # `max_len` is HF's older name
        self.model_max_length = int(limit) if 0 < limit < 1e9 else None  # HF writes 1e30 for none

        ids = {int(i): _added_token(token) for i, token in config.get("added_tokens_decoder", {}).items()}
        check_added_lengths(token.content for token in ids.values())
        added = sorted(ids.items())
        backend.add_tokens([token for _, token in added])  # in one call, because each builds an automaton of all
        for index, token in added:
            if backend.token_to_id(token.content) != index:
                raise ValueError(f"added token {token.content!r} cannot get the id {index} that the files ask for")
        check_ids_of_tokens(backend)
        for name in SPECIAL_TOKENS:
            if value := config.get(name) or OPT_SPECIAL_TOKENS.get(name):
                self._set_special_token(name, _added_token(value))
        extra = list(map(_added_token, _extra_tokens(config)))
        named = list(map(_added_token, _tokens_of_one_model(config)))
        if absent := [token.content for token in extra + named if backend.token_to_id(token.content) is None]:
            raise ValueError(f"special token {absent[0]!r} is not in the vocabulary of the tokenizer files")
        self._make_special(extra + named)
        self._extra = [token.content for token in extra]
        self._add_eos = bool(config.get("add_eos_token"))
        if config.get("add_bos_token", True):
            self.add_bos_token = True
        if self._add_eos:
            self._set_template(self.add_bos_token)
        self._set_splitting()

    def _set_splitting(self) -> None:
        """Whether special tokens in a text are text. The library does not keep this setting in files or copies."""
        self.backend_tokenizer.encode_special_tokens = bool(self._config.get("split_special_tokens"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_splitting()

    def __getattr__(self, name: str) -> Any:
        raise hf_scripts.no_attribute("an OPTTokenizer", name, hf_scripts.VOCABULARY)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("padding_side", "truncation_side"):
            _side(name, value)
        if name == "model_max_length" and value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"model_max_length={shown(value)} must be a positive integer, or None for no limit")
        if not name.startswith("_") and name != "backend_tokenizer" and not hasattr(type(self), name):
            raise AttributeError(f"an OPTTokenizer has no {name!r}: setting it would change nothing")
        super().__setattr__(name, value)

    @classmethod
    def from_file(
        cls, vocab: str | os.PathLike, merges: str | os.PathLike, config: dict | None = None, **sides
    ) -> "OPTTokenizer":
        """The tokenizer of a `vocab.json` and a `merges.txt`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: a file is malformed, or a side is not "left" or "right".
        """
        _check_sides(**sides)  # here, because errors below are reported as errors of the files
        for path in (vocab, merges):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such tokenizer file")
        for path in (vocab, merges):
            read_small(Path(path))  # checks the size; the library reads the file again, without a limit

        def load() -> "OPTTokenizer":
            backend: Any = Tokenizer(BPE.from_file(str(vocab), str(merges)))
            prefix = (config or {}).get("add_prefix_space") is True
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
            backend.decoder = decoders.ByteLevel()
            return cls(backend, config, **sides)

        return read_as(f"{vocab}, {merges}", load)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, *, revision=None, cache_dir=None, local_files_only=False, **sides
    ) -> "OPTTokenizer":
        """The tokenizer of a hub id, a directory (`tokenizer.json`, or `vocab.json` and `merges.txt`) or "tiny".

        Args:
          name: the hub id, directory or "tiny".
          revision, cache_dir, local_files_only: see `hub.resolve`.
          **sides: `padding_side`, `truncation_side`.

        Raises:
          FileNotFoundError: there is no tokenizer.
          ValueError: a file is malformed, or a side is not "left" or "right"; or see `hub.resolve`.
        """
        sides = hf_scripts.known("OPTTokenizer.from_pretrained", sides, hf_scripts.TOKENIZER)
        for name in sides.keys() - {*_SIDES}:
            raise hf_scripts.unknown_argument("OPTTokenizer.from_pretrained", name, _SIDES)
        _check_sides(**sides)  # here, because errors below are reported as errors of the files
        place = hub.resolve(
            name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, weights=False
        )
        for folder in hub.companion_directories(place):
            fast = folder / "tokenizer.json"
            if fast.is_file() or (folder / "vocab.json").is_file():
                break
        else:
            raise FileNotFoundError(f"{place}: no tokenizer here (tokenizer.json, or vocab.json and merges.txt)")
        if hub.is_remote(folder):
            with TemporaryDirectory() as copy:
                for file in filter(lambda path: path.is_file(), (folder / name for name in hub.TOKENIZER_FILES)):
                    write_content(Path(copy, file.name), read_small(file))
                return cls.from_pretrained(copy, **sides)
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # otherwise the other two files are from old versions, as in HF
            mapped = read_json(folder / "special_tokens_map.json")
            first, second = (content.get("extra_special_tokens") for content in (config, mapped))
            if isinstance(first, list) and isinstance(second, list):
                mapped["extra_special_tokens"] = first + second
            config |= mapped
            added = {} if fast.is_file() else read_json(folder / "added_tokens.json")
            if added:
                config["added_tokens_decoder"] = {str(i): {"content": token} for token, i in added.items()}
        if not fast.is_file():
            return cls.from_file(folder / "vocab.json", folder / "merges.txt", config, **sides)
        note_without_effect(folder / "tokenizer_config.json", config, WITHOUT_EFFECT)
        config.pop("add_eos_token", None)
        text = read_small(fast)
        read_as(str(fast), lambda: check_lengths(text))
        backend = read_as(str(fast), lambda: Tokenizer.from_buffer(text))
        read_as(str(fast), lambda: check_added_ids(text, backend))
        backend.no_padding()
        backend.no_truncation()
        config = {"add_bos_token": False} | config  # by default tokenizer.json decides
        return read_as(str(folder), lambda: cls(backend, config, **sides))

    def __repr__(self) -> str:
        return f"OPTTokenizer(vocab_size={self.vocab_size}, bos={self.bos_token!r}, pad={self.pad_token!r})"

    def __call__(  # noqa: PLR0913  (options, by keyword)
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        padding: bool | str | None = None,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = "np",
        add_special_tokens: bool = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_offsets_mapping: bool = False,
        **foreign: Any,
    ) -> BatchEncoding:
        """Ids and mask (0 on padding) of one text or of a batch. Threads may call it at the same time.

        Args:
          text: one text, or a batch of texts.
          text_pair: as many second texts. Each follows its first text, after another BOS.
          padding: False, True (or "longest"), or "max_length". Default: True for arrays, False for lists.
          truncation: True (or "longest_first"): truncate to `max_length`; of a pair, the longer text.
          max_length: default: `model_max_length`, if it is set.
          return_tensors: "np" for int32 arrays [B, T], ready for a model; None for lists (flat for one string).
          add_special_tokens: False leaves out the BOS. Use that for parts of a text, not for prompts.
          padding_side: "left" or "right"; default: `self.padding_side`.
          pad_to_multiple_of: pad to a length that is a multiple of this.
          return_offsets_mapping: also return "offset_mapping": (start, end) of each token in its text, (0, 0) for BOS
            and padding.
          **foreign: none; the error for an argument of `transformers` says what to write instead.

        Raises:
          ValueError: a bad argument, or rows of different lengths for "np" without padding.

        Warns:
          UserWarning: a row begins with two BOS, because its text begins with one; or, with "np", with none.
        """
        for name in hf_scripts.known("a tokenizer's call", foreign, hf_scripts.TOKENIZING):
            raise hf_scripts.unknown_argument("a tokenizer's call", name, inspect.signature(self.__call__).parameters)
        padding = return_tensors == "np" if padding is None else padding
        truncation = True if truncation == "longest_first" else truncation
        switches = dict(add_special_tokens=add_special_tokens, return_offsets_mapping=return_offsets_mapping)
        for name, value in (switches | {"truncation": truncation}).items():
            if not isinstance(value, bool):
                raise ValueError(f"{name}={shown(value)}: use True or False")
        max_length = self._check_lengths(padding, truncation, max_length, return_tensors, padding_side)
        texts, pairs = _texts("text", text), None if text_pair is None else _texts("text_pair", text_pair)
        if pairs is not None and (isinstance(text, str) != isinstance(text_pair, str) or len(texts) != len(pairs)):
            raise ValueError(
                f"text_pair must be a string if text is one, else a list of as many: {len(pairs)} for {len(texts)}"
            )

        encodings = self._encode(
            texts, pairs, add_special_tokens, max_length if truncation else None, return_offsets_mapping
        )
        rows, bos = [encoding.ids for encoding in encodings], self.bos_token_id
        if pairs is None and any(row[:2] == [bos, bos] for row in rows):
            warnings.warn(f"ids begin with {self.bos_token!r} twice: leave it out of the text", stacklevel=2)
        # Lists are for joining pieces (training data); an array goes to the model.
        if return_tensors and self.add_bos_token and any(row[:1] != [bos] for row in rows):
            warnings.warn(f"no {self.bos_token!r} in front: OPT expects it; leave add_special_tokens on", stacklevel=2)
        columns: dict[str, list] = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if return_offsets_mapping:
            columns["offset_mapping"] = [encoding.offsets for encoding in encodings]
        columns = self._pad(columns, padding, max_length, padding_side, pad_to_multiple_of)
        return _as_encoding(columns, return_tensors, flat=isinstance(text, str))

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = "np",
    ) -> BatchEncoding:
        """Pads rows that are already tokenized: one row, a batch, or a list of rows. Arguments as in `__call__`.

        Other entries than `input_ids`, `attention_mask` and `offset_mapping`, such as labels, are returned unchanged.

        Raises:
          ValueError: as `__call__`; or a row without `input_ids`.
        """
        max_length = self._check_lengths(padding, False, max_length, return_tensors, padding_side)
        given = [encoded_inputs] if isinstance(encoded_inputs, Mapping) else list(encoded_inputs)
        for row in given:
            if not isinstance(row, Mapping) or "input_ids" not in row or row.keys() != given[0].keys():
                raise ValueError(f"pad takes rows as the tokenizer returns them, with input_ids, not {shown(row, 60)}")
        columns = {name: [_plain(row[name]) for row in given] for name in (given[0] if given else ["input_ids"])}
        flat = isinstance(encoded_inputs, Mapping)
        if flat and columns["input_ids"][0] and isinstance(columns["input_ids"][0][0], list):
            flat, columns = False, {name: rows[0] for name, rows in columns.items()}
        for row in columns["input_ids"]:
            check_ids(row)
        columns.setdefault("attention_mask", [[1] * len(row) for row in columns["input_ids"]])
        columns = self._pad(columns, padding, max_length, padding_side, pad_to_multiple_of)
        return _as_encoding(columns, return_tensors, flat)

    def _check_lengths(
        self, padding: Any, truncation: Any, max_length: int | None, return_tensors: Any, padding_side: str | None
    ) -> int | None:
        """The length to pad or to truncate to, or None."""
        if return_tensors not in (None, "np"):
            raise ValueError(f'return_tensors={shown(return_tensors)}: use "np"; JAX takes NumPy arrays as they are')
        if padding not in (False, True, "longest", "max_length"):
            raise ValueError(f'padding={shown(padding)}: use False, True, "longest" or "max_length"')
        if padding == "max_length" or truncation:
            max_length = self.model_max_length if max_length is None else max_length
            if max_length is None or max_length < 1:
                raise ValueError(f'truncation=True, padding="max_length" need a positive max_length, got {max_length}')
        elif max_length is not None:
            raise ValueError('max_length has no effect without truncation=True or padding="max_length"')
        if padding_side and not padding:
            raise ValueError("padding_side has no effect without padding=True")
        return max_length

    def _pad(
        self, columns: dict[str, list], padding: Any, max_length: int | None, side: str | None, multiple: int | None
    ) -> dict[str, list]:
        if multiple is not None and (type(multiple) is not int or multiple < 1 or not padding):
            raise ValueError(f"pad_to_multiple_of={shown(multiple)} must be a positive integer, with padding=True")
        if not padding:
            return columns
        width = max_length if padding == "max_length" and max_length else max(map(len, columns["input_ids"]), default=0)
        width += -width % (multiple or 1)
        left = _side("padding_side", side or self.padding_side) == "left"
        pads = {"input_ids": self.pad_token_id, "attention_mask": 0, "offset_mapping": (0, 0)}

        def padded(row: list, value: Any) -> list:
            fill = [value] * (width - len(row))
            return fill + row if left else row + fill

        return {
            name: [padded(row, pads[name]) for row in rows] if name in pads else rows for name, rows in columns.items()
        }

    @panics_as_errors()
    def _encode(
        self, texts: list[str], pairs: list[str] | None, add_special_tokens: bool, limit: int | None, offsets: bool
    ) -> list[Encoding]:
        # The backend's own truncation is a setting of an object that threads share, so the results are truncated here.
        backend = self.backend_tokenizer
        encode = backend.encode_batch if offsets else backend.encode_batch_fast
        try:
            if limit is None:
                both: Any = texts if pairs is None else list(zip(texts, pairs, strict=True))
                return encode(both, add_special_tokens=add_special_tokens)
            room = limit - backend.num_special_tokens_to_add(pairs is not None) * add_special_tokens
            first = encode(texts, add_special_tokens=False)
            second = [None] * len(first) if pairs is None else encode(pairs, add_special_tokens=False)
        except TypeError as error:  # the tokenizers library raises it if a text cannot be encoded as UTF-8
            raise ValueError("a text has a lone surrogate (no Unicode); read it with errors='replace'") from error
        rows = []
        for encoding, pair in zip(first, second, strict=True):
            lengths = _share(max(0, room), len(encoding), len(pair or ()))
            for part, length in zip((encoding, pair), lengths, strict=True):
                if part is not None:
                    part.truncate(length, direction=self.truncation_side)
            rows.append(backend.post_process(encoding, pair, add_special_tokens=add_special_tokens))
        return rows

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text, in GPT-2's alphabet for bytes ("Ġ" is a blank)."""
        pairs = None if pair is None else _texts("pair", pair)
        return self._encode(_texts("text", text), pairs, add_special_tokens, None, True)[0].tokens

    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        *,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """The ids of one text, as a list, or with `return_tensors="np"` an array [1, T]; `options`: as `__call__`."""
        options |= dict(return_tensors=return_tensors, add_special_tokens=add_special_tokens)
        return self(text, text_pair, **options)["input_ids"]

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of a row of ids (list, NumPy or JAX array, or one id); a batch [B, T] gives a list of texts.

        Bytes that are not UTF-8, such as an incomplete character at the end, become U+FFFD. Ids outside the vocabulary
        are skipped. `clean_up_tokenization_spaces=True` warns and has no effect, as in HF v5: it would damage
        byte-level BPE.
        """
        if clean_up_tokenization_spaces:
            warnings.warn("clean_up_tokenization_spaces=True does not apply to byte-level BPE", stacklevel=2)
        ids = to_list(token_ids)
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens) for row in ids]
        check_ids(ids)
        with panics_as_errors():
            return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """The texts of several rows of ids, as `decode` gives them."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences]

    def stop_strings(self, strings: str | Sequence[str], prompts: Sequence[Any], vocab_size: int) -> StopStrings:
        """The table with which compiled code finds stop strings in growing rows of tokens: see `StopStrings.of`."""
        return StopStrings.of(self, strings, prompts, vocab_size)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be an incomplete UTF-8 character; b"" for ids outside the vocabulary."""
        token = self.backend_tokenizer.id_to_token(token_id) or ""
        try:
            return bytes(_BYTE[char] for char in token)
        except KeyError:  # an added token that is not in GPT-2's alphabet is plain text
            return token.encode()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json` and the files of facebook/opt-*, for `from_pretrained` and HF's `AutoTokenizer`.

        Raises:
          FileExistsError: one of the files is a symbolic link, or not a regular file.
          ValueError: see `hub.disk_path`.
        """
        folder = hub.disk_path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(*(folder / name for name in hub.TOKENIZER_FILES))  # the hub's cache consists of links
        contents = contents_of(self.backend_tokenizer)
        named = self.special_tokens_map
        # Added tokens are in tokenizer.json, and so is the EOS, in its template. The other two are paths from which HF
        # once loaded the tokenizer.
        gone = {"added_tokens_decoder", "name_or_path", "special_tokens_map_file", "add_eos_token"}
        if [_added_token(token).content for token in _extra_tokens(self._config)] != self._extra:
            gone |= {"additional_special_tokens", "extra_special_tokens"}
        config = {"tokenizer_class": "GPT2Tokenizer"} | {k: v for k, v in self._config.items() if k not in gone}
        if "extra_special_tokens" in gone:
            config["extra_special_tokens"] = self._extra
        config |= named | {"add_bos_token": self.add_bos_token, "truncation_side": self.truncation_side}
        config["add_prefix_space"] = getattr(self.backend_tokenizer.pre_tokenizer, "add_prefix_space", False)
        if self.model_max_length is not None or "model_max_length" in config:
            config["model_max_length"] = self.model_max_length or int(1e30)
        for file, content in (("tokenizer_config.json", config), ("special_tokens_map.json", named)):
            contents[file] = f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode()
        for name, content in contents.items():
            write_file(folder / name, content)

    push_to_hub = publish.push_tokenizer


AutoTokenizer = OPTTokenizer
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # AddedToken prints unknown ones


_SIDES = ("padding_side", "truncation_side")


def _check_sides(padding_side: str = "left", truncation_side: str | None = None) -> None:
    _side("padding_side", padding_side)
    _side("truncation_side", truncation_side or "right")


def _side(name: str, value: str) -> str:
    if value not in ("left", "right"):
        raise ValueError(f'{name}={value!r}: use "left" or "right"')
    return value


def _texts(name: str, text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    for i, one in enumerate(texts):
        if not isinstance(one, str):
            raise ValueError(f"{name} must be a string or a sequence of strings; item {i} is a {type(one).__name__}")
    return texts


def _share(room: int, first: int, second: int) -> tuple[int, int]:
    """The lengths of two texts that share `room` tokens: the longer is cut, or both if neither fits in half (as HF)."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (room - shorter, shorter) if first > second else (shorter, room - shorter)


def _as_encoding(columns: dict[str, list], return_tensors: str | None, flat: bool) -> BatchEncoding:
    if return_tensors is None:
        return BatchEncoding({name: rows[0] for name, rows in columns.items()} if flat else columns)
    if len({len(row) for row in columns["input_ids"]}) > 1:
        raise ValueError('return_tensors="np" with texts of different lengths needs padding=True')
    size = len(columns["input_ids"]), max(map(len, columns["input_ids"]), default=0)
    shapes = {"input_ids": size, "attention_mask": size, "offset_mapping": (*size, 2)}
    return BatchEncoding(
        {
            name: np.array(rows, np.int32).reshape(shapes[name]) if name in shapes else as_array(name, rows)
            for name, rows in columns.items()
        }
    )


def _plain(value: Any) -> Any:
    """Lists in place of arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(x) for x in value] if isinstance(value, list) else value


def _added_token(value: str | dict[str, Any]) -> AddedToken:
    """The added token that HF writes as its text, or as a dict of the fields of `tokenizers.AddedToken`."""
    fields: Any = {"content": value} if isinstance(value, str) else {k: v for k, v in value.items() if k in _FIELDS}
    return AddedToken(**fields)


def _extra_tokens(config: dict[str, Any]) -> list:
    """The special tokens without a name, as they are in the files."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values() if isinstance(extra, dict) else extra)  # a dict: HF's model-specific names


def _tokens_of_one_model(config: dict[str, Any]) -> list:
    """The special tokens under names of one model, such as "image_token", as they are in the files."""
    names = [name for name in config if name.endswith("_token") and name not in SPECIAL_TOKENS]
    return [config[name] for name in names if isinstance(config[name], str | dict)]
