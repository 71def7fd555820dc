"""Reads the documents that `--data` names: text and .jsonl files, directories, globs, Hugging Face datasets.

Errors name file and line. No jax, no tokens.
"""

import codecs
import glob
import importlib.util
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from opt_jax.data.formats import check_format
from opt_jax.system.reading import open_regular

TEXT_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")
# Poor training data: tests, tables of character encodings, installed packages.
STDLIB_SKIP = {"__pycache__", "encodings", "idle_test", "site-packages", "dist-packages", "test", "tests"}
BLOCK = 1 << 16  # about so many characters of a text file are tokenised at once
_SHOWN = 20
_FEW = 100  # bad records that a source may have, whatever their share
_PART = 16 << 20  # bytes of a line of text that are read at once
_RECORD = 256 << 20  # the most bytes of a line of a .jsonl file
_LONGEST = 32 << 20  # the most characters of text without a place to cut, because they are tokenised at once
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


class BadRecords:
    """Counts records that cannot be read.

    Args:
      skip: True: leave them out, and print the first 20. False: the first one is a ValueError with file and line. None:
        the same, for a program without --skip-bad-records.
    """

    def __init__(self, skip: bool | None = False):
        self.skip, self.count = skip, 0
        self.read = 0  # records, or lines of text, that could be read

    def report(self, where: str, problem: str) -> None:
        if not self.skip:
            hint = "" if self.skip is None else "; --skip-bad-records leaves such records out"
            raise ValueError(f"{where}: {problem}{hint}")
        self.count += 1
        if self.count <= _SHOWN:
            print(f"left out: {where}: {problem}", file=sys.stderr, flush=True)
        if self.count == _SHOWN:
            print("left out: further ones are counted only", file=sys.stderr, flush=True)

    def check(self, source: Any, bad: int, read: int) -> None:
        """Raise ValueError if too many records of a source are bad: then it is not damaged, but has another format."""
        if bad and not read or bad > max(read, _FEW):
            raise ValueError(
                f"{source}: {bad:,} of its {bad + read:,} records cannot be read, too many for --skip-bad-records: it "
                "is not UTF-8 text or not what its ending says, or it is damaged; leave it out of the data"
            )


def stdlib_files() -> list[Path]:
    """The Python sources of the running interpreter's standard library, without its tests, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in _walk(root, STDLIB_SKIP, (".py",), Counter()) if path.stat().st_size)


def find_files(paths: Sequence[str | os.PathLike], suffixes: tuple[str, ...] = (*TEXT_SUFFIXES, ".npy")) -> list[Path]:
    """The files at `paths`: files, globs (also with `**`), and the files with `suffixes` below directories.

    The files of a glob or directory are sorted. The endings of files that are left out of a directory are printed.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a directory has no such files, or a file has another format (`check_format`).
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            _check_readable(path)
        if path.is_dir():
            left_out: Counter[str] = Counter()
            inside = sorted(_walk(path, {"__pycache__", ".git"}, suffixes, left_out))
            endings = ", ".join(f"{count:,} {ending}" for ending, count in left_out.most_common())
            if not inside:
                others = f"; there are {endings}" if endings else ""
                looked_for = ", ".join(suffixes)
                raise ValueError(f"{path}: no text files below this directory (looked for {looked_for}{others})")
            if endings:
                print(f"left out: {path}: what is not read: {endings}", file=sys.stderr, flush=True)
            files += inside
        elif path.is_file():
            files.append(path)
        elif matches := [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]:
            files += (regular_files := [match for match in matches if not match.is_dir()])
            if not regular_files:
                raise ValueError(f"{matches[0]} is not a regular file or a directory of them: {path} names no other")
            above = {parent for file in regular_files for parent in file.parents}
            if count := sum(match not in above for match in matches if match.is_dir()):
                print(f"left out: {path}: {count:,} directories (name them as well to read them)", file=sys.stderr)
        else:
            what = "nothing matches" if glob.has_magic(str(path)) else "no such file or directory"
            raise FileNotFoundError(f"{path}: {what}")
    for file in files:
        if file.suffix != ".npy":
            check_format(file)
    return files


def _walk(root: Path, skip: set[str], suffixes: tuple[str, ...], left_out: Counter[str]) -> Iterator[Path]:
    """The files with these endings. Counts other files, and links to directories, which could form a circle.

    Raises:
      OSError: a directory cannot be read.
    """
    for directory, subdirectories, names in os.walk(root, onerror=_raise):
        subdirectories[:] = [name for name in subdirectories if name not in skip]
        if links := sum(Path(directory, name).is_symlink() for name in subdirectories):
            left_out["linked directories (name them as well to read them)"] += links
        for name in names:
            if name.lower().endswith(suffixes):
                yield Path(directory, name)
            elif not name.endswith(".npy.json"):  # what `opt-jax tokenize` writes beside an array
                left_out[Path(name).suffix.lower() or "without ending"] += 1


def _check_readable(pattern: Path) -> None:
    """Raise OSError for a directory that the pattern searches and that cannot be read. `glob` ignores such ones."""
    for i, part in enumerate(pattern.parts):
        if glob.has_magic(part):
            looked_into = Path(*pattern.parts[: i + (part == "**")])
            for directory in glob.glob(f"{looked_into}/", recursive=True):
                os.scandir(directory).close()


def _raise(error: OSError) -> NoReturn:
    raise error


def read_documents(sources: Iterable["Path | HFSource"], bad: BadRecords | None = None) -> list[str]:
    """The documents of the sources: one per text file, and one per line of a `.jsonl` file, under the key "text".

    Blank documents are left out.

    Raises:
      ValueError: bytes that are not UTF-8, a line that is not {"text": "..."}, or an empty file; with file and line.
    """
    documents, parts = [], []
    for text, last in pieces(sources, bad or BadRecords(None)):
        parts.append(text)
        if last:
            document, parts = "".join(parts), []
            if document.strip():
                documents.append(document)
    if not documents:
        raise ValueError("no documents in the data: every file is empty")
    return documents


def pieces(
    sources: Iterable["Path | HFSource"], bad: BadRecords, block: int | None = None
) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends its document), in order, without holding a large file in memory.

    Args:
      sources: what to read.
      bad: counts bad records.
      block: cut texts to about this length, only at places where GPT-2's pattern always splits: between two lines, if
        there is no blank on either side; in a longer line, before a space between words. None: do not cut.

    Raises:
      ValueError: a bad record, if they are not skipped; a source with too many of them (`BadRecords.check`).
    """
    for source in sources:
        count, read = bad.count, bad.read
        if isinstance(source, HFSource):
            yield from cut(source.texts(bad), block, source)
        elif source.suffix.lower() == ".jsonl":
            yield from cut(_jsonl(source, bad), block, source)
        else:
            yield from _text(source, bad, block)
        bad.check(source, bad.count - count, bad.read - read)


def cut(texts: Iterable[str], block: int | None, source: Any) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends its document) of documents, cut as in `pieces`. `source` is for messages."""
    for text in texts:
        before = None
        for part in _parts(text, block):
            if before is not None:
                yield before, False
            before = part
            _check_length(len(part), block, source)
        yield before or "", True


def _check_length(size: int, block: int | None, source: Any) -> None:
    if block is not None and size > _LONGEST:
        raise ValueError(f"{source}: {_LONGEST >> 20} Mi characters without a space between words, so no place to cut")


def _lines(path: Path, bad: BadRecords, most: int, in_parts: bool) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end). Reports lines that are not UTF-8.

    Args:
      path: the file.
      bad: gets the reports.
      most: bytes to read at once.
      in_parts: yield a line of more than `most` bytes in parts; otherwise report it.
    """
    check_format(path)
    number, offset, ended, skipped, empty = 0, 0, True, False, True
    decoder = codecs.getincrementaldecoder("utf-8")()  # for a line in parts; its state is an incomplete character
    with open_regular(path) as file:
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


def _text(path: Path, bad: BadRecords, block: int | None) -> Iterator[tuple[str, bool]]:
    lines: list[str] = []
    size = 0
    for line_number, line in _lines(path, bad, _PART, in_parts=True):
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


def _jsonl(path: Path, bad: BadRecords) -> Iterator[str]:
    for number, line in _lines(path, bad, _RECORD, in_parts=False):
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
        text = document.get("text") if isinstance(document, dict) else None
        if not isinstance(text, str):
            bad.report(where, 'expected an object with a string under "text"')
        elif not _is_unicode(text):
            bad.report(where, r"half of a surrogate pair (\ud800 to \udfff), which is no character")
        else:
            bad.read += 1
            yield text


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogate. JSON can contain one, but no tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class HFSource:
    """The column "text" of a Hugging Face dataset: `hf:NAME[,CONFIG][:SPLIT]`.

    NAME is a hub id, or a directory that `save_to_disk` has written. The default split is "train".

    Raises:
      ValueError: the extra is not installed, there is no such dataset or split, or it has no column "text".
    """

    suffix = ""

    def __init__(self, name: str):
        self.name = name
        match = re.fullmatch(r"hf:([^,]+?)(?:,([^:]+))?(?::([^:/]+))?", name)
        if match is None:
            raise ValueError(f"{name}: needs the form hf:NAME[,CONFIG][:SPLIT]")
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(f"{name} needs the package datasets: pip install 'opt-jax[datasets]'")
        self._rows = self._load(match[1], match[2], match[3] or "train")
        if "text" not in self._rows.column_names:
            raise ValueError(f'{name}: no column "text", but {", ".join(self._rows.column_names)}: rename one to it')

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

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self, bad: BadRecords) -> Iterator[str]:
        for number, row in enumerate(self._rows):
            if isinstance(row["text"], str):
                bad.read += 1
                yield row["text"]
            else:
                bad.report(f"{self.name}: row {number}", 'expected a string under "text"')


def find_sources(
    paths: Sequence[str | os.PathLike], suffixes: tuple[str, ...] = (*TEXT_SUFFIXES, ".npy")
) -> list["Path | HFSource"]:
    """As `find_files`, but names that begin with `hf:` become datasets, and an empty name is an error."""
    sources: list[Path | HFSource] = []
    for path in map(str, paths):
        if not path:  # as of a shell's variable that is not set; a Path of it is the current directory
            raise FileNotFoundError("no directory or file '': the name is empty")
        sources += [HFSource(path)] if path.startswith("hf:") else find_files([path], suffixes)
    if not sources:
        raise ValueError("no data: name files, directories or hf:NAME")
    return sources
