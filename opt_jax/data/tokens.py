"""Streams of token ids: in memory, or in NumPy files that are memory-mapped and may be larger than memory. No jax.

FILE.npy is a one-dimensional array, uint16 if the vocabulary fits, else int32, with `</s>` before, between and after
documents. FILE.npy.json describes how it was made. Any .npy of integers works too; without the second file its
tokenizer cannot be checked. A directory of several arrays (`shards.py`) is the same stream.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.data.arrays import INDEX, Arrays, open_array, read_index
from opt_jax.data.documents import BLOCK, Source, cut, pieces
from opt_jax.data.records import TEXT_KEY, BadRecords
from opt_jax.data.workers import tokenizer_here, worker_processes
from opt_jax.model.ids import as_ids
from opt_jax.system.messages import one_line
from opt_jax.system.reading import json_object, read_small
from opt_jax.system.temporary import new_file, refuse_links, unfinished_files
from opt_jax.text.tokenizer import OPTTokenizer

_TASK = 1 << 20  # characters that a worker takes at once
_SAMPLES, _SAMPLE = 4096, 1024


class Tokens:
    """The part [first:last] of a token stream in memory (`array`) or on a disk (`path`); read as int32.

    A file is opened when it is read, so pickling copies its name and not its content to another process.

    Args:
      name: for messages.
      array: integers in one dimension.
      path: a .npy file of such an array, or the index of several.
      first, last: the part.

    Raises:
      ValueError: see `open_array` and `Arrays`.
    """

    def __init__(
        self,
        name: str,
        array: np.ndarray | Arrays | None = None,
        path: Path | None = None,
        first: int = 0,
        last: int | None = None,
    ):
        self.name, self.path, self.first, self._array = name, path, first, array
        self.last = len(self.array) if last is None else last

    @property
    def array(self) -> np.ndarray | Arrays:
        if self._array is None:
            assert self.path is not None
            self._array = Arrays(self.path) if self.path.name == INDEX else open_array(self.path)
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_array": None} if self.path is not None else {})

    def __len__(self) -> int:
        return self.last - self.first

    def read(self, start: int, length: int) -> np.ndarray:
        """The `length` ids from `start`, int32. Raises ValueError if one does not fit into int32."""
        start += self.first
        return as_ids(f"{self.name or 'the array'} from token {start}", self.array[start : start + length])

    def split(self, fraction: float, separator: int) -> tuple["Tokens", "Tokens"]:
        """(beginning, end). The end has about this fraction of the tokens, and starts with a document if possible."""
        cut = self.first + int(len(self) * (1 - fraction))
        near = np.flatnonzero(self.array[cut : min(self.last, cut + (1 << 20))] == separator)
        cut += int(near[0]) if len(near) else 0
        part = lambda first, last: Tokens(self.name, self._array, self.path, first, last)  # noqa: E731
        return part(self.first, cut + 1), part(cut, self.last)  # both include the `</s>` between them

    def hash_of_ids(self) -> str:
        """A hash of all ids, up to 4M of them; else of the length and of 4096 samples, as a corpus may be terabytes."""
        if len(self) <= _SAMPLES * _SAMPLE:
            return hash_of_ids(self.read(0, len(self)))
        digest = hashlib.sha256(str(len(self)).encode())
        for start in np.linspace(0, len(self) - _SAMPLE, _SAMPLES).astype(np.int64).tolist():
            digest.update(self.read(start, _SAMPLE).tobytes())
        return digest.hexdigest()[:16]


def hash_of_ids(tokens: np.ndarray) -> str:
    """A short hash of token ids, by which a resumed run notices that the files or the tokenizer have changed."""
    return hashlib.sha256(as_ids("tokens", tokens).tobytes()).hexdigest()[:16]


def hash_of_vocabulary(tokenizer: OPTTokenizer) -> str:
    vocabulary = sorted(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def open_tokens(path: Path, tokenizer: OPTTokenizer | None = None) -> Tokens:
    """The tokens in a .npy file, or in the arrays of an index.

    Raises:
      ValueError: it is neither; FILE.npy.json cannot be read, or names another tokenizer, or the index does; or see
        `Arrays.verify`.
    """
    is_index = path.name == INDEX
    about = path if is_index else Path(f"{path}.json")
    if tokenizer is not None and (is_index or about.exists()):
        name, vocabulary = _tokenizer_of(about)
        if vocabulary != hash_of_vocabulary(tokenizer):
            raise ValueError(
                f"{path} was made with another tokenizer ({one_line(name, 200)}): name that with --tokenizer"
            )
    if is_index:
        Arrays(path).verify()
    return Tokens(str(path), path=Path(path))


def _tokenizer_of(about: Path) -> tuple[str, str]:
    """(name, fingerprint) of the tokenizer. Raises ValueError if `opt-jax tokenize` did not write the file."""
    if about.name == INDEX:
        tokenizer = read_index(about)["tokenizer"]
        return tokenizer["name"], tokenizer["fingerprint"]
    text = read_small(about)
    try:
        tokenizer = json_object(text, about)["tokenizer"]
        return tokenizer["name"], tokenizer["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{about}: not what opt-jax tokenize writes beside an array: make both again") from None


def sources_of(path: Path) -> list[str]:
    """The names of what an array was made of, as they were given to `opt-jax tokenize`; [] if it is not known."""
    try:
        if path.name == INDEX:
            return [source["name"] for entry in read_index(path)["arrays"] for source in entry["sources"]]
        names = json_object(read_small(about := Path(f"{path}.json")), about)["sources"]
        return [name for name in names if isinstance(name, str)]
    except (OSError, ValueError, KeyError, TypeError):  # `open_tokens` raises what must be raised
        return []


# Making them --------------------------------------------------------------------------------------------------------


def write_tokens(
    sources: Sequence[Source],
    output: Path,
    tokenizer: OPTTokenizer,
    name: str,
    *,
    workers: int = 1,
    skip_bad: bool = False,
    text_key: str = TEXT_KEY,
    progress: Callable[[int], None] = lambda characters: None,
) -> dict[str, Any]:
    """Tokenise documents into `output` (.npy). Returns the content of `output`.json.

    The array is the same for any number of workers. Both files appear when they are complete.

    Args:
      sources: what to read.
      output: the array.
      tokenizer: the tokenizer.
      name: its name, for `output`.json.
      workers: processes that tokenise; 1: this one.
      skip_bad: leave out bad records.
      text_key: the key or column of the text in files of records.
      progress: called with the number of characters of each task when it is done.

    Raises:
      ValueError: a bad record without `skip_bad`, no documents, or a failed worker; or an `output`.json that
        `opt-jax tokenize` did not write.
      FileExistsError: `output` exists without such a file; or see `new_file`.
    """
    beside = Path(f"{output}.json")
    for path in (output, beside):
        refuse_links(path)
    if beside.exists():
        _tokenizer_of(beside)
    elif output.is_file() and output.stat().st_size and not unfinished_files(output.parent, re.escape(beside.name)):
        raise FileExistsError(
            f"{output} is there already, without the {beside.name} that opt-jax tokenize writes beside an array: "
            "move it elsewhere, or choose another name"
        )
    bad = BadRecords(skip_bad)
    dtype = dtype_of(tokenizer)
    # The description is published last. Until then its temporary file is the lock on the array.
    with new_file(beside) as about_file, new_file(output) as file:
        parts = encode(pieces(sources, bad, block_of(tokenizer), text_key), tokenizer, workers)
        total, documents = write_array(file, dtype, [tokenizer.bos_token_id], parts, progress)
        if not documents:
            raise ValueError("no documents in the data: every file is empty")
        about = {
            "tokens": total,
            "documents": documents,
            "left_out": bad.count,
            "dtype": str(dtype),
            "tokenizer": {"name": name, "fingerprint": hash_of_vocabulary(tokenizer)},
            "sources": [str(source) for source in sources],
            "text_key": text_key,
        }
        about_file.write(json.dumps(about, indent=2).encode() + b"\n")
        beside.unlink(missing_ok=True)  # of an older array of this name
    return about


def tokenize(documents: Sequence[str], tokenizer: OPTTokenizer) -> np.ndarray:
    """One int32 stream: `</s>` document `</s>` document ... `</s>`. A document follows `</s>`, as a prompt does."""
    texts = cut(documents, block_of(tokenizer), "a document")
    parts = [_encode_task(tokenizer, task)[0] for task in _tasks(texts, blank_ones=True)]
    return np.concatenate([np.array([tokenizer.bos_token_id], np.int32), *parts])


def dtype_of(tokenizer: OPTTokenizer) -> np.dtype:
    """The dtype of the arrays on a disk."""
    most = max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values())  # a vocabulary may have holes
    return np.dtype(np.uint16 if most < 1 << 16 else np.int32)


def write_array(
    file: Any,
    dtype: np.dtype,
    first: Sequence[int],
    parts: Iterable[tuple[np.ndarray, int, int]],
    progress: Callable[[int], None],
) -> tuple[int, int]:
    """Write a .npy file of the `first` ids and those of `encode`. Returns (ids, documents)."""
    begin = _write_header(file, dtype, 0)
    file.write(np.array(first, dtype).tobytes())
    total, documents = len(first), 0
    for ids, ended, characters in parts:
        file.write(ids.astype(dtype).tobytes())
        total, documents = total + len(ids), documents + ended
        progress(characters)
    file.seek(0)
    if _write_header(file, dtype, total) != begin:
        raise AssertionError("NumPy leaves room for any length in the header of an array")
    return total, documents


def _write_header(file: Any, dtype: np.dtype, length: int) -> int:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def block_of(tokenizer: OPTTokenizer) -> int | None:
    """The length of the pieces of a text file; None (do not cut) for a tokenizer whose ids the cuts would change."""
    texts = ("a\n", "b1\n", "-c", " d", " e")
    apart = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]
    return BLOCK if tokenizer.encode("".join(texts), add_special_tokens=False) == apart else None


def encode(
    texts: Iterator[tuple[str, bool]], tokenizer: OPTTokenizer, workers: int
) -> Iterator[tuple[np.ndarray, int, int]]:
    """(ids with `</s>` behind documents, documents, characters) for task after task, in order."""
    if workers == 1:
        yield from (_encode_task(tokenizer, task) for task in _tasks(texts))
        return
    with worker_processes(workers, tokenizer) as pool:
        waiting = deque()
        for task in _tasks(texts):
            waiting.append(pool.submit(_work, task))
            if len(waiting) >= 3 * workers:  # otherwise the reader would fill the memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _tasks(texts: Iterator[tuple[str, bool]], blank_ones: bool = False) -> Iterator[list[tuple[str, bool]]]:
    task, size, blank = [], 0, True
    for text, last in texts:
        blank = blank and not blank_ones and not text.strip()
        if last and blank:  # a blank document, which `read_documents` leaves out too
            continue
        blank = last
        task.append((text, last))
        size += len(text)
        if size >= _TASK:
            yield task
            task, size = [], 0
    if task:
        yield task


def _encode_task(tokenizer: OPTTokenizer, task: list[tuple[str, bool]]) -> tuple[np.ndarray, int, int]:
    rows = tokenizer([text for text, _ in task], return_tensors=None, add_special_tokens=False).input_ids
    parts = []
    for row, (_, last) in zip(rows, task, strict=True):
        parts += [np.asarray(row, np.int32), np.full(int(last), tokenizer.bos_token_id, np.int32)]
    return np.concatenate(parts), sum(last for _, last in task), sum(len(text) for text, _ in task)


def _work(task: list[tuple[str, bool]]) -> tuple[np.ndarray, int, int]:
    return _encode_task(tokenizer_here(), task)
