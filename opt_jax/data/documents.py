"""The documents that `--data` names: text files, files of records, directories, globs, URLs, Hugging Face datasets.

Errors name file and line. No jax, no tokens.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence

from opt_jax.data.files import TEXT_SUFFIXES, File, find_files, is_url
from opt_jax.data.records import TEXT_KEY, BadRecords, HFSource, lines_of, reader_of

BLOCK = 1 << 16  # about so many characters of a text file are tokenised at once
_PART = 16 << 20  # bytes of a line of text that are read at once
_LONGEST = 32 << 20  # the most characters of text without a place to cut, because they are tokenised at once
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")
Source = File | HFSource


def find_sources(
    names: Sequence[str | os.PathLike],
    suffixes: tuple[str, ...] = (*TEXT_SUFFIXES, ".npy"),
    text_key: str = TEXT_KEY,
) -> list[Source]:
    """As `find_files`, but names that begin with `hf:` (not `hf://`) become datasets, and an empty name is an error."""
    sources: list[Source] = []
    for name in map(str, names):
        if not name:  # as of a shell's variable that is not set; a Path of it is the current directory
            raise FileNotFoundError("no directory or file '': the name is empty")
        is_dataset = name.startswith("hf:") and not is_url(name)
        sources += [HFSource(name, text_key)] if is_dataset else find_files([name], suffixes)
    if not sources:
        raise ValueError("no data: name files, directories or hf:NAME")
    return sources


def read_documents(sources: Iterable[Source], bad: BadRecords | None = None, text_key: str = TEXT_KEY) -> list[str]:
    """The documents of the sources: one per text file, and one per record of other files, under `text_key`.

    Blank documents are left out.

    Raises:
      ValueError: bytes that are not UTF-8, a line that is not {"text": "..."}, or an empty file; with file and line.
    """
    documents, parts = [], []
    for text, last in pieces(sources, bad or BadRecords(None), text_key=text_key):
        parts.append(text)
        if last:
            document, parts = "".join(parts), []
            if document.strip():
                documents.append(document)
    if not documents:
        raise ValueError("no documents in the data: every file is empty")
    return documents


def pieces(
    sources: Iterable[Source], bad: BadRecords, block: int | None = None, text_key: str = TEXT_KEY
) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends its document), in order, without holding a large file in memory.

    Args:
      sources: what to read.
      bad: counts bad records.
      block: cut texts to about this length, only at places where GPT-2's pattern always splits: between two lines, if
        there is no blank on either side; in a longer line, before a space between words. None: do not cut.
      text_key: the key or column of the text in files of records.

    Raises:
      ValueError: a bad record, if they are not skipped; a source with too many of them (`BadRecords.check`).
    """
    for source in sources:
        count, read = bad.count, bad.read
        if isinstance(source, HFSource):
            yield from cut(source.texts(bad), block, source)
        elif (read_records := reader_of(source)) is not None:
            yield from cut(read_records(source, bad, text_key), block, source)
        else:
            yield from _text(source, bad, block)
        bad.check(source, bad.count - count, bad.read - read)


def cut(texts: Iterable[str], block: int | None, source: object) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends its document) of documents, cut as in `pieces`. `source` is for messages."""
    for text in texts:
        before = None
        for part in _parts(text, block):
            if before is not None:
                yield before, False
            before = part
            _check_length(len(part), block, source)
        yield before or "", True


def _check_length(size: int, block: int | None, source: object) -> None:
    if block is not None and size > _LONGEST:
        raise ValueError(f"{source}: {_LONGEST >> 20} Mi characters without a space between words, so no place to cut")


def _text(path: File, bad: BadRecords, block: int | None) -> Iterator[tuple[str, bool]]:
    lines: list[str] = []
    size = 0
    for line_number, line in lines_of(path, bad, _PART, in_parts=True):
        bad.read += 1
        for number, part in enumerate(_parts(line, block)):
            if block is not None and size >= block and (number or _may_be_apart(lines[-1], part)):
                yield "".join(lines), False
                lines, size = [], 0
            lines.append(part)
            size += len(part)
        _check_length(size, block, f"{path}:{line_number}")
    if lines:
        yield "".join(lines), True


def _may_be_apart(line: str, following: str) -> bool:
    return len(line) > 1 and line.endswith("\n") and not line[-2].isspace() and not following[0].isspace()


def _parts(line: str, block: int | None) -> Iterator[str]:
    """A line, which may be a complete corpus, in parts of at least `block` characters."""
    begin = 0
    while block is not None and (space := _BETWEEN_WORDS.search(line, begin + block)):
        yield line[begin : space.start()]
        begin = space.start()
    yield line[begin:]
