"""The tokens of a tokenizer: ids and back, special tokens by name, added tokens. No jax."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from opt_jax.system.messages import shown

# From facebook/opt-*/tokenizer_config.json. The unknown token is </s> too, so "<unk>" in a text is ordinary text.
OPT_SPECIAL_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
SPECIAL_TOKENS = (*OPT_SPECIAL_TOKENS, "sep_token", "cls_token", "mask_token")


class _Token:
    """A special token. Setting it (`tokenizer.pad_token = tokenizer.eos_token`) changes its id as well."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Any, owner: type) -> Any:
        return self if tokenizer is None else tokenizer._special.get(self.name)

    def __set__(self, tokenizer: Any, value: Any) -> None:
        tokenizer._set_special_token(self.name, value)


class _TokenId(_Token):
    """The id of a special token. Setting it changes the token as well."""

    def __get__(self, tokenizer: Any, owner: type) -> Any:
        if tokenizer is None:
            return self
        token = tokenizer._special.get(self.name.removesuffix("_id"))
        return None if token is None else tokenizer.backend_tokenizer.token_to_id(token)

    def __set__(self, tokenizer: Any, value: Any) -> None:
        (index,) = check_ids([value.item() if hasattr(value, "item") else value])
        if (token := tokenizer.backend_tokenizer.id_to_token(index)) is None:
            raise ValueError(f"{self.name}={index} is not in the vocabulary of the tokenizer")
        tokenizer._set_special_token(self.name.removesuffix("_id"), token)


class Vocabulary:
    """The tokens of an `OPTTokenizer`, with the names and meanings of `transformers.GPT2Tokenizer`.

    Deviations from HF: a special token must be in the vocabulary (HF uses the unknown token's id for one that is not).
    A token that becomes a special token is special at once, in HF after saving and loading. A new `bos_token` is put in
    front of texts at once, in HF after setting `add_bos_token` or saving and loading. `all_special_ids` are the ids
    that decoding skips.
    """

    bos_token, eos_token, unk_token, pad_token = _Token(), _Token(), _Token(), _Token()
    sep_token, cls_token, mask_token = _Token(), _Token(), _Token()
    bos_token_id, eos_token_id, unk_token_id, pad_token_id = _TokenId(), _TokenId(), _TokenId(), _TokenId()
    sep_token_id, cls_token_id, mask_token_id = _TokenId(), _TokenId(), _TokenId()

    backend_tokenizer: Tokenizer
    _special: dict[str, str]
    _extra: list[str]
    _add_eos: bool

    @property
    def vocab_size(self) -> int:
        """Number of tokens without added tokens. `len(tokenizer)` counts all tokens."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, with added tokens."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Token -> id of the added tokens, special tokens included."""
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id -> added token."""
        return dict(sorted(self.backend_tokenizer.get_added_tokens_decoder().items()))

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or the ids of a list of tokens; `unk_token_id` for an unknown token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.backend_tokenizer.token_to_id(tokens)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of a list of ids; None for ids outside the vocabulary."""
        one, rows = not hasattr(ids, "__len__") or getattr(ids, "ndim", 1) == 0, check_ids(to_list(ids))
        skipped = set(self.all_special_ids) if skip_special_tokens and not one else ()
        tokens = [self.backend_tokenizer.id_to_token(i) for i in rows if i not in skipped]
        return tokens[0] if one else tokens

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens."""
        return self.backend_tokenizer.decoder.decode(list(tokens))  # type: ignore[reportOptionalMemberAccess]

    # Special tokens -----------------------------------------------------------------------------------------------

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Name -> token: "bos_token", "eos_token", ..."""
        return {name: self._special[name] for name in SPECIAL_TOKENS if name in self._special}

    @property
    def extra_special_tokens(self) -> list[str]:
        """The special tokens without a name."""
        return list(self._extra)

    additional_special_tokens = extra_special_tokens  # HF's name before version 5

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of all special tokens, which decoding can skip."""
        return [index for index, token in self.added_tokens_decoder.items() if token.special]

    @property
    def all_special_tokens(self) -> list[str]:
        """All special tokens, with and without a name."""
        return [token.content for token in self.added_tokens_decoder.values() if token.special]

    @property
    def add_bos_token(self) -> bool:
        """Whether texts get the BOS in front. Can be set."""
        special = self.backend_tokenizer.encode("").ids
        return special[:1] == [self.bos_token_id] and len(special) > self._add_eos

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"add_bos_token={shown(value)}: use True or False")
        if value != self.add_bos_token:
            self._set_template(value)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of special tokens that a call adds to a text, or to a pair of texts."""
        return self.backend_tokenizer.num_special_tokens_to_add(pair)

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens (str or `tokenizers.AddedToken`, one or more) after the vocabulary. Returns how many are new.

        The embedding of the model needs a row for each: `len(tokenizer)` may not exceed the config's `vocab_size`.
        """
        tokens = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else list(new_tokens)
        for token in tokens:
            if not isinstance(token, (str, AddedToken)) or not _content(token):
                raise ValueError(f"a token must be a string that is not empty, or an AddedToken, not {shown(token)}")
        add = self.backend_tokenizer.add_special_tokens if special_tokens else self.backend_tokenizer.add_tokens
        return add(tokens)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Adds and sets special tokens by their names ("pad_token", ..., "extra_special_tokens": a list).

        Returns how many are new. Extra special tokens that are replaced remain special tokens for decoding.
        """
        named = dict(special_tokens_dict)
        extra = named.pop("additional_special_tokens", None)
        extra = named.pop("extra_special_tokens", extra)
        if wrong := [name for name in named if name not in SPECIAL_TOKENS]:
            names = ", ".join((*SPECIAL_TOKENS, "extra_special_tokens"))
            raise ValueError(f"{wrong[0]!r} is not the name of a special token: they are {names}")
        if isinstance(extra, str) or not isinstance(extra, (Sequence, type(None))):
            raise ValueError(f"extra_special_tokens={shown(extra)} must be a list of tokens")
        if extra and not replace_extra_special_tokens:
            extra = [token for token in extra if _content(token) not in self._extra]
        new = self.add_tokens([_special(token) for token in (*named.values(), *(extra or ()))], special_tokens=True)
        for name, token in named.items():
            self._set_special_token(name, token)
        if extra:
            self._extra = ([] if replace_extra_special_tokens else self._extra) + [_content(token) for token in extra]
        return new

    def _set_special_token(self, name: str, value: Any) -> None:
        token, backend = _content(value), self.backend_tokenizer
        if not isinstance(token, str) or backend.token_to_id(token) is None:
            hint = f": use add_special_tokens({{{name!r}: {token!r}}})" if isinstance(token, str) else ""
            raise ValueError(f"{name} {shown(token)} is not in the vocabulary of the tokenizer{hint}")
        self._make_special([value])
        new_bos = name == "bos_token" and token != self.bos_token and self.add_bos_token
        self._special[name] = token
        if new_bos:
            self._set_template(True)

    def _make_special(self, tokens: list) -> None:
        known = set(self.all_special_tokens)
        if new := [_special(token) for token in tokens if _content(token) not in known]:
            self.backend_tokenizer.add_special_tokens(new)

    def _set_template(self, add_bos: bool) -> None:
        special: list[dict[str, Any]] = []

        def piece(name: str, token: str) -> str:
            # A template is split at blanks and colons, so a token with one of these gets another name in it.
            name = name if any(c in token for c in ":$") or token.split() != [token] else token
            special.append({"id": name, "ids": [self.backend_tokenizer.token_to_id(token)], "tokens": [token]})
            return name

        bos = [piece("BOS", self.bos_token)] if add_bos else []
        eos = [piece("EOS", self.eos_token)] if self._add_eos else []
        first, second = (" ".join(f"{name}:{i}" for name in (*bos, text, *eos)) for i, text in enumerate(("$A", "$B")))
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[reportAttributeAccessIssue]
            single=first, pair=f"{first} {second}", special_tokens=special
        )


def _content(token: Any) -> Any:
    return token.content if isinstance(token, AddedToken) else token


def _special(token: Any) -> Any:
    return AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token


def to_list(ids: Any) -> list:
    """A list of numbers, or of lists of numbers, from one id or anything array-like."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # NumPy and JAX, scalars too
    rows = list(ids) if _is_row(ids) else [ids]
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    return [list(row) if _is_row(row) else row for row in rows]


def _is_row(value: Any) -> bool:
    """Whether it is a sequence of ids. A text is not, although it is iterable."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def check_ids(ids: list) -> list[int]:
    """The ids; raises ValueError if one is not an integer in [0, 2**32)."""
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < 2**32]:
        hint = "; replace ignored labels by pad_token_id before decoding" if wrong[0] == -100 else ""
        raise ValueError(f"{wrong[0]!r} is not a token id, an integer in [0, 2**32){hint}")
    return ids
