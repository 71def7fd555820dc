"""Reads the documents in files of records: JSON lines, a JSON array, a CSV file, a table. No jax, no tokens.

Errors name file and line, row or element.
"""

import codecs
import csv
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from opt_jax.data.files import File, endings, open_file
from opt_jax.data.formats import JSON_LINES, TABLES
from opt_jax.system.messages import one_line

TEXT_KEY = "text"
SHOWN = 20  # bad records that are printed
FURTHER = "left out: further ones are counted only"
_FEW = 100  # bad records that a source may have, whatever their share
_RECORD = 256 << 20  # the most bytes of a line of a .jsonl file, or characters of an element of a .json file
_ROWS = 1000  # of a table that are read at once
_CHUNK = 1 << 20  # characters
_BLANK = re.compile(r"[ \t\r\n]*")


class BadRecords:
    """Counts records that cannot be read.

    Args:
      skip: True: leave them out, and print the first 20. False: the first one is a ValueError with file and line. None:
        the same, for a program without --skip-bad-records.
      show: takes a line for each of the first 20; default: print it to stderr.
    """

    def __init__(self, skip: bool | None = False, show: Callable[[str], Any] | None = None):
        self.skip, self.count, self._show = skip, 0, show or _show
        self.read = 0  # records, or lines of text, that could be read

    def report(self, where: str, problem: str) -> None:
        if not self.skip:
            hint = "" if self.skip is None else "; --skip-bad-records leaves such records out"
            raise ValueError(f"{where}: {problem}{hint}")
        self.count += 1
        if self.count <= SHOWN:
            self._show(f"left out: {where}: {problem}")
        if self.count == SHOWN:
            self._show(FURTHER)

    def check(self, source: Any, bad: int, read: int) -> None:
        """Raise ValueError if too many records of a source are bad: then it is not damaged, but has another format."""
        if bad and not read or bad > max(read, _FEW):
            raise ValueError(
                f"{source}: {bad:,} of its {bad + read:,} records cannot be read, too many for --skip-bad-records: it "
                "is not UTF-8 text or not what its ending says, or it is damaged; leave it out of the data"
            )


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def reader_of(file: File) -> Callable[[File, BadRecords, str], Iterator[str]] | None:
    """The function that yields a file's documents; None: it is text, so all of it is one document."""
    ending = endings(file)[0]
    readers = {".json": _json, ".csv": _csv, ".tsv": _csv}
    readers |= dict.fromkeys(JSON_LINES, _jsonl) | dict.fromkeys(TABLES, _table)
    return readers.get(ending)


def lines_of(path: File, bad: BadRecords, most: int, in_parts: bool) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end). Reports lines that are not UTF-8.

    Args:
      path: the file.
      bad: gets the reports.
      most: bytes to read at once.
      in_parts: yield a line of more than `most` bytes in parts; otherwise report it.
    """
    number, offset, ended, skipped, empty = 0, 0, True, False, True
    decoder = codecs.getincrementaldecoder("utf-8")()  # for a line in parts; its state is an incomplete character
    with open_file(path) as file:
        while line := file.readline(most):
            if len(line) == most and line.endswith(b"\r"):
                line += file.readline(1)  # its \n
            if ended:
                number, skipped = number + 1, False
            begins, ended = ended, line.endswith(b"\n") or len(line) < most
            begin = offset - (0 if begins else len(decoder.getstate()[0]))
            offset += len(line)
            if number == 1 and begins and line.startswith(codecs.BOM_UTF8):  # Windows programs write one
                begin, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
            empty = empty and not line.strip()
            if skipped:
                continue
            if not (ended or in_parts):
                bad.report(f"{path}:{number}", f"a record of {most >> 20} MiB or more")
                skipped = True
                continue
            try:
                text = line.decode("utf-8") if begins and ended else decoder.decode(line, final=ended)
            except UnicodeDecodeError as error:
                bad.report(f"{path}:{number}", f"not UTF-8 text ({error.reason} at byte {begin + error.start})")
                skipped = True
                decoder.reset()
            else:
                yield number, text.replace("\r\n", "\n")
    if decoder.getstate()[0]:
        bad.report(f"{path}:{number}", "not UTF-8 text (it ends within a character)")
    if empty:
        bad.report(f"{path}:1", "an empty file")
        bad.read += 1  # so that `check` does not count the file as a bad record


def _jsonl(path: File, bad: BadRecords, key: str) -> Iterator[str]:
    for number, line in lines_of(path, bad, _RECORD, in_parts=False):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            bad.report(where, f"not JSON ({error.msg} at column {error.colno})")
            continue
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            bad.report(where, f"not JSON that can be read ({str(error).split(';')[0]})")
            continue
        yield from _checked(document, where, bad, key)


def _checked(record: Any, where: str, bad: BadRecords, key: str) -> Iterator[str]:
    """The text of a record; nothing of a bad one, which is reported."""
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        bad.report(where, f'expected an object with a string under "{key}"')
    elif not _is_unicode(text):
        bad.report(where, r"half of a surrogate pair (\ud800 to \udfff), which is no character")
    else:
        bad.read += 1
        yield text


def _json(path: File, bad: BadRecords, key: str) -> Iterator[str]:
    """The texts of an array of objects; or of lines, each with an object."""
    with open_file(path) as file:
        head = file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()
        if not head.startswith(b"["):
            yield from _jsonl(path, bad, key)
            return
        try:
            for number, record in enumerate(_elements(io.TextIOWrapper(file, "utf-8-sig"), path)):
                yield from _checked(record, f"{path}: element {number}", bad, key)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None


def _elements(file: io.TextIOWrapper, path: File) -> Iterator[Any]:
    """The elements of a JSON array, of which one is in memory at a time.

    Raises:
      ValueError: it is not JSON, or an element has more than `_RECORD` characters.
    """
    text = _JSONText(file, path)
    separator = "["
    while text.character() == separator:
        text.position += 1
        if separator == "," or text.character() != "]":  # the array may be empty
            yield text.value()
        separator = ","
    if separator == "[" or text.character() != "]":
        raise text.error("expected , or ]")
    text.position += 1
    if text.character():
        raise text.error("text behind the array")


class _JSONText:
    """JSON text, read from a file as it is needed. `position`: of the next character."""

    def __init__(self, file: io.TextIOWrapper, path: File):
        self._file, self._path, self._decoder = file, path, json.JSONDecoder()
        self._text, self.position, self._count = "", 0, 0

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self._path}: not a JSON array ({problem} after {self._count} elements)")

    def character(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            self.position = _BLANK.match(self._text, self.position).end()  # type: ignore[reportOptionalMemberAccess]
            if self.position < len(self._text) or not self._read(_CHUNK):
                return self._text[self.position : self.position + 1]

    def value(self) -> Any:
        self.character()
        size = _CHUNK
        while True:
            problem = "it ends"
            try:
                value, end = self._decoder.raw_decode(self._text, self.position)
                if end < len(self._text):  # otherwise a number may go on
                    self.position, self._count = end, self._count + 1
                    return value
            except RecursionError:
                raise self.error("too many levels") from None
            except ValueError as error:
                problem = getattr(error, "msg", str(error).split(";")[0])
            if len(self._text) - self.position > _RECORD:
                raise self.error(f"an element of more than {_RECORD >> 20} Mi characters, or {problem}")
            if not self._read(size):
                raise self.error(problem)
            size *= 2  # so that the time stays in proportion to the element

    def _read(self, size: int) -> bool:
        """Whether there was more text."""
        more = self._file.read(size)
        self._text, self.position = self._text[self.position :] + more, 0
        return bool(more)


def _csv(path: File, bad: BadRecords, key: str) -> Iterator[str]:
    """The column `key` of a file with a line of names; tabs separate the fields of a .tsv file."""
    csv.field_size_limit(max(csv.field_size_limit(), _RECORD))  # of this process; the default is 128 KiB
    separator = "\t" if endings(path)[0] == ".tsv" else ","
    rows = csv.reader(
        (line for _, line in lines_of(path, bad, _RECORD, in_parts=False)), delimiter=separator, strict=True
    )
    names = None
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            bad.report(where, f"not CSV ({one_line(error)})")
            continue
        if row is None:
            return
        if names is None:
            names = row
            _check_column(path, key, names)
        elif row and len(row) != len(names):
            bad.report(where, f"{len(row)} fields, not {len(names)}")
        elif row:
            yield from _checked(dict(zip(names, row, strict=True)), where, bad, key)


def _check_column(path: Any, key: str, names: list[str]) -> None:
    if names.count(key) != 1:
        problem = "no column" if key not in names else "more than one column"
        raise ValueError(f'{path}: {problem} "{key}", but {one_line(", ".join(names), 300)}: choose one by --text-key')


def _table(path: File, bad: BadRecords, key: str) -> Iterator[str]:
    """The column `key` of a parquet or arrow file."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow")
    import pyarrow as pa

    number = 0
    with open_file(path) as file:
        try:
            for column in _columns(path, file, key):
                if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                    raise ValueError(f'{path}: column "{key}" holds {column.type}, not strings')
                for text in column.to_pylist():
                    yield from _checked({key: text}, f"{path}: row {number}", bad, key)
                    number += 1
        except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({one_line(error, 200)}): damaged or cut short") from None


def _columns(path: File, file: Any, key: str) -> Iterator[Any]:
    """Parts of the column, as Arrow arrays."""
    import pyarrow as pa

    if endings(path)[0] == ".parquet":
        import pyarrow.parquet as pq

        parquet = pq.ParquetFile(file)
        _check_column(path, key, parquet.schema_arrow.names)
        for batch in parquet.iter_batches(_ROWS, columns=[key]):
            yield _plain(batch.column(0))
        return
    is_file = file.peek(6).startswith(b"ARROW1")
    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
    _check_column(path, key, reader.schema.names)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in batches:
        yield _plain(batch.column(key))


def _plain(column: Any) -> Any:
    """Without a dictionary of equal values."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogate. JSON can contain one, but no tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class HFSource:
    """A column of a Hugging Face dataset: `hf:NAME[,CONFIG][:SPLIT]`.

    NAME is a hub id, or a directory that `save_to_disk` has written. The default split is "train".

    Raises:
      ValueError: the extra is not installed, there is no such dataset or split, or it has no such column.
    """

    suffix = ""

    def __init__(self, name: str, key: str = TEXT_KEY):
        self.name, self._key = name, key
        match = re.fullmatch(r"hf:([^,]+?)(?:,([^:]+))?(?::([^:/]+))?", name)
        if match is None:
            raise ValueError(f"{name}: needs the form hf:NAME[,CONFIG][:SPLIT]")
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(f"{name} needs the package datasets: pip install datasets")
        self._rows = self._load(match[1], match[2], match[3] or "train")
        _check_column(name, key, self._rows.column_names)

    def _load(self, name: str, config: str | None, split: str) -> Any:
        import datasets

        try:
            if not os.path.isdir(name):
                return datasets.load_dataset(name, config, split=split)
            if not any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
                raise ValueError("this directory is not what save_to_disk writes; name its files instead")
            loaded = datasets.load_from_disk(name)
        except Exception as error:  # the library raises many kinds, some of its own
            raise ValueError(f"{self.name}: cannot be loaded ({str(error).splitlines()[0]})") from None
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{self.name}: no split {split!r}, but {', '.join(map(str, loaded))}")
            return loaded[split]
        return loaded

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> Any:  # another process loads it again: the rows may be gigabytes
        return HFSource, (self.name, self._key)

    def __len__(self) -> int:
        return len(self._rows)

    def state(self) -> dict[str, Any]:
        """As `files.state_of`."""
        return {"name": self.name, "rows": len(self), "version": vars(self._rows)["_fingerprint"]}

    def texts(self, bad: BadRecords) -> Iterator[str]:
        for number, row in enumerate(self._rows):
            yield from _checked(row, f"{self.name}: row {number}", bad, self._key)
