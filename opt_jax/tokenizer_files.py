"""Reads files of tokenizers, which may be damaged or hostile. No jax."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opt_jax.reading import one_line, read_small


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """An error of the tokenizers library (Rust) as ValueError: it raises bare Exception, and in Python a panic is a
    BaseException, which nobody expects."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":  # which cannot be imported
            raise
        raise ValueError(
            f"the tokenizers library fails: are the tokenizer's files damaged? ({one_line(error)})"
        ) from None


def read_as(where: str, load: Callable[[], Any]) -> Any:
    """`load()`; what fails in it, other than opening files, is a ValueError that names `where`."""
    try:
        with panics_as_errors():
            return load()
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{where}: not a tokenizer that can be read ({one_line(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; {} without one."""
    if not path.is_file():
        return {}
    text = read_small(path)
    content = read_as(str(path), lambda: json.loads(text.decode()))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
