"""Reads files of tokenizers, which may be damaged or hostile. No jax."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from opt_jax.system.messages import one_line, shown
from opt_jax.system.reading import FieldsWithoutEffect, json_object, read_small

MOST_CHARACTERS = 100_000  # of an added token: the library's automaton takes a hundred bytes for each character
MOST_OF_NORMALIZER = 1_000_000  # characters of JSON; the largest known, SentencePiece's table, has 400,000
MOST_GROWTH = 1000  # how many times as long a normalizer may make a text
# Fields of a tokenizer_config.json beside a tokenizer.json. (`padding_side` is not noted, because HF always writes it.)
WITHOUT_EFFECT: FieldsWithoutEffect = {"add_eos_token": ((False,), "tokenizer.json decides, as in transformers")}


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """A context that turns errors of the tokenizers library (Rust) into ValueError.

    The library raises bare Exceptions, and a panic in it is a BaseException in Python.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":  # which cannot be imported
            raise
        raise ValueError(
            f"the tokenizers library fails: are the tokenizer's files damaged? ({one_line(error)})"
        ) from None


def read_as(where: str, load: Callable[[], Any]) -> Any:
    """The result of `load()`. All its errors but OSError become a ValueError that names `where`."""
    try:
        with panics_as_errors():
            return load()
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        known = isinstance(error, ValueError) or type(error) is Exception
        what = one_line(error) if known else "a field is missing, or of another type than it should be"
        raise ValueError(f"{where}: not a tokenizer that can be read ({what})") from error


def check_lengths(text: bytes) -> None:
    """Refuse a tokenizer.json with a very long added token or normalizer; each takes a multiple of its length."""
    content = json_object(text, "it")
    check_added_lengths([token["content"] for token in content.get("added_tokens") or ()])
    if len(json.dumps(content.get("normalizer"))) > MOST_OF_NORMALIZER:
        raise ValueError(f"its normalizer has more than {MOST_OF_NORMALIZER:,} characters")


def check_added_lengths(tokens: Iterable[str]) -> None:
    if (longest := max(map(len, tokens), default=0)) > MOST_CHARACTERS:
        raise ValueError(
            f"an added token has {longest:,} characters, more than the {MOST_CHARACTERS:,} that one may have"
        )


def check_growth(backend: Tokenizer) -> None:
    """Refuse a normalizer whose steps make a text much longer: 24 steps "a" -> "aa" turn one "a" into 16 million."""

    def growth(step: dict[str, Any]) -> int:
        steps = step.get("normalizers", [])
        pattern = step.get("pattern", {}).get("String", "")  # a regular expression may match "" at every place
        factor = 1 + len(step["content"]) // max(1, len(pattern)) if step["type"] == "Replace" else 1
        return factor * math.prod(map(growth, steps))

    if (normalizer := backend.normalizer) is not None and growth(json.loads(normalizer.__getstate__())) > MOST_GROWTH:
        raise ValueError("the tokenizer's normalizer can make a text thousands of times as long: it is not read")


def check_fields(config: dict[str, Any]) -> None:
    """Refuse values of a tokenizer_config.json that Python would misread: the string "false" is true, and true is 1."""
    for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens"):
        if not isinstance(value := config.get(name), bool | None):
            raise ValueError(f"{name}={shown(value)} must be true or false")
    limit = config.get("model_max_length", config.get("max_len")) or 0
    is_integer = type(limit) is int or isinstance(limit, float) and (limit >= 1e9 or limit.is_integer())
    if not is_integer:
        raise ValueError(f"model_max_length={shown(limit)} must be a whole number")


def check_ids_of_tokens(backend: Tokenizer) -> None:
    """Refuse a vocabulary in which two tokens have the same id, or an id does not fit into int32.

    Of two tokens with one id, one would be decoded as the other.
    """
    ids = backend.get_vocab(with_added_tokens=True).values()
    if len(set(ids)) < len(ids):
        raise ValueError("two tokens of the vocabulary have the same id")
    if (largest := max(ids, default=0)) >= 2**31:
        raise ValueError(f"the vocabulary has the id {largest}, which must be below 2**31")


def check_added_ids(text: bytes, backend: Tokenizer) -> None:
    """Refuse a tokenizer.json whose added tokens did not get the ids in the file. The library only logs this."""
    for token in json.loads(text).get("added_tokens") or ():
        if (index := backend.token_to_id(token["content"])) != token["id"]:
            raise ValueError(
                f"added token {shown(token['content'])} has the id {index}, not the {token['id']} that the file says"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file; {} if there is no file."""
    if not path.is_file():
        return {}
    return json_object(read_small(path), path)


def set_prefix_space(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Set whether texts get a blank in front, as HF does.

    For a GPT2Tokenizer, tokenizer_config.json decides, and the default is no. For any other class, tokenizer.json
    decides.
    """
    kind, splitter = config.get("tokenizer_class"), backend.pre_tokenizer
    if kind is not None and not str(kind).startswith("GPT2Tokenizer"):
        return
    value, now = config.get("add_prefix_space"), getattr(splitter, "add_prefix_space", False)
    value = (now if kind is None else False) if value is None else value
    if value == now:
        return
    if not isinstance(value, bool) or not hasattr(splitter, "add_prefix_space"):
        raise ValueError(f"add_prefix_space={shown(value)} must be true or false, and needs a ByteLevel pre-tokenizer")
    splitter.add_prefix_space = value  # type: ignore[reportOptionalMemberAccess]
    backend.pre_tokenizer = splitter


def contents_of(backend: Tokenizer) -> dict[str, bytes]:
    """File name -> the content that `backend.save` and `backend.model.save` write, which overwrite files in place."""
    tokenizer_json = backend.to_str(pretty=True)
    model = json.loads(tokenizer_json)["model"]
    vocab = json.dumps(model["vocab"], ensure_ascii=False, separators=(",", ":"))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    files = {"tokenizer.json": tokenizer_json, "vocab.json": vocab, "merges.txt": f"#version: 0.2\n{merges}"}
    return {name: text.encode() for name, text in files.items()}
