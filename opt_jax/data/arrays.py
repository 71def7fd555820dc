"""Token ids on a disk, memory-mapped: a .npy file, or a directory of such files that are one sequence. No jax.

The directory has INDEX, which names its arrays in their order, with lengths and hashes. `shards.py` writes both.
"""

import hashlib
import re
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from opt_jax.system.messages import one_line
from opt_jax.system.reading import json_object, name_from_outside, open_regular, read_small

INDEX = "opt-jax.index.json"
_HEADER_BYTES = 1024  # NumPy writes 118; parsing a damaged header takes time that grows with the square of its length
_OPEN = 128  # arrays that are mapped at once; each takes a file descriptor
_SAMPLES, _SAMPLE = 8, 1024
_AGAIN = "copy or make the whole directory again"


def is_array(source: object) -> bool:
    """Whether a source is token ids: a .npy file, or the index of several."""
    path = PurePath(str(source))
    return path.suffix == ".npy" or path.name == INDEX


def array_name(number: int) -> str:
    return f"opt-jax-{number:05}.npy"


def check_alone(path: Path) -> None:
    """Raise ValueError for one of the arrays of a directory: it is a part of a sequence, and may be unfinished."""
    if re.fullmatch(r"opt-jax-\d{5,}\.npy", path.name):
        if path.with_name(INDEX).exists():
            raise ValueError(f"{path} is one of several arrays: name their directory, {path.parent}")
        raise ValueError(
            f"{path} is one of several arrays, but {INDEX} is not beside it: opt-jax tokenize has not finished, or the "
            "directory was copied in part"
        )


def open_array(path: Path) -> np.ndarray:
    """The array in a .npy file, memory-mapped.

    Raises:
      ValueError: not a .npy file of integers with one dimension.
      OSError: it cannot be opened.
    """
    open_regular(path).close()  # NumPy would wait at a pipe
    try:
        array = np.lib.format.open_memmap(path, mode="r", max_header_size=_HEADER_BYTES)
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header as Python, which raises several types of errors
        raise ValueError(f"{path}: not an array of token ids ({one_line(error)})") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        what = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{path}: holds {one_line(what)}, not integers in one dimension")
    return array


def hash_of_samples(array: np.ndarray) -> str:
    """A hash of the length and of eight samples, of which one is the beginning and one the end."""
    digest = hashlib.sha256(f"{len(array)} {array.dtype}".encode())
    for start in np.linspace(0, max(0, len(array) - _SAMPLE), _SAMPLES).astype(np.int64).tolist():
        digest.update(np.asarray(array[start : start + _SAMPLE]).tobytes())
    return digest.hexdigest()[:16]


class Arrays:
    """The arrays of a directory as one sequence. `arrays[start:stop]` is a NumPy array.

    Args:
      index: the file INDEX of the directory.

    Raises:
      ValueError: the index is not one.
    """

    def __init__(self, index: Path):
        content = read_index(index)
        self._index, self.dtype = index, np.dtype(content["dtype"])
        self._paths = [index.with_name(name_from_outside(entry["file"])) for entry in content["arrays"]]
        self._hashes = [entry["hash"] for entry in content["arrays"]]
        self._ends = np.cumsum([entry["tokens"] for entry in content["arrays"]], dtype=np.int64)
        self._array = lru_cache(_OPEN)(self._open)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        assert step == 1
        pieces: list[np.ndarray] = []
        number = int(np.searchsorted(self._ends, start, side="right"))  # the array that has the first id
        while start < stop:
            array, end = self._array(number), int(self._ends[number])
            begin = end - len(array)
            pieces.append(array[start - begin : min(stop, end) - begin])
            start, number = end, number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])

    def verify(self) -> None:
        """Compare all arrays with the index: their lengths, and a hash of samples.

        Raises:
          ValueError: an array is missing, or is another than the one that the index describes.
          OSError: an array cannot be read.
        """
        for number, (path, expected) in enumerate(zip(self._paths, self._hashes, strict=True)):
            if hash_of_samples(self._open(number)) != expected:
                raise ValueError(f"{path} is not the array that {self._index.name} describes: {_AGAIN}")

    def _open(self, number: int) -> np.ndarray:
        path = self._paths[number]
        try:
            array = open_array(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing, which {self._index.name} names: {_AGAIN}") from None
        tokens = int(np.diff(self._ends, prepend=0)[number])
        if (len(array), array.dtype) != (tokens, self.dtype):
            what = f"{len(array):,} ids of {array.dtype}, not the {tokens:,} of {self.dtype}"
            raise ValueError(f"{path} holds {what} that {self._index.name} says: {_AGAIN}")
        return array


def read_index(index: Path) -> dict[str, Any]:
    """The content of an index, whose fields have the right types.

    Raises:
      ValueError: `opt-jax tokenize` did not write it.
    """
    try:
        content = json_object(read_small(index), index)
        tokenizer, arrays = content["tokenizer"], content["arrays"]
        texts = [content["dtype"], content["text_key"], *(tokenizer[k] for k in ("name", "fingerprint", "content"))]
        texts += [name_from_outside(entry["file"]) for entry in arrays]
        texts += [entry["hash"] for entry in arrays]
        texts += [source["name"] for entry in arrays for source in entry["sources"]]
        sizes = [content["documents"], content["left_out"]]
        sizes += [entry[key] for entry in arrays for key in ("tokens", "documents", "left_out")]
        right = all(isinstance(text, str) for text in texts) and all(type(n) is int and 0 <= n < 2**62 for n in sizes)
        tokens = sum(entry["tokens"] for entry in arrays)
        right = right and all(entry["sources"] for entry in arrays)
        if not right or not arrays or content["tokens"] != tokens or content["dtype"] not in ("uint16", "int32"):
            raise ValueError("a field has another type or value")
    except (ValueError, KeyError, TypeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{index}: not an index that opt-jax tokenize writes ({one_line(problem, 200)})") from None
    return content
