"""What `--data` names -> documents: text and .jsonl files, directories, globs, Hugging Face datasets; and what is wrong
in them, by file and line. No jax, no tokens."""

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
# Not prose and not what anybody wants to imitate: tests, charmap tables, other people's packages.
STDLIB_SKIP = {"__pycache__", "encodings", "idle_test", "site-packages", "dist-packages", "test", "tests"}
BLOCK = 1 << 16  # characters of a text file that are tokenised at once, about
_SHOWN = 20
_FEW = 100  # bad records that a source may have whatever their share
_PART = 16 << 20  # bytes of a line of text that are read at once
_RECORD = 256 << 20  # of a line of a .jsonl file at most
_LONGEST = 32 << 20  # characters of text without a place to cut them at most: they are tokenised at once
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


class BadRecords:
    """Counts what cannot be read. Without `skip` the first one is an error, as ValueError with file and line (None: of
    a program that has no --skip-bad-records); with it, each is left out, and the first 20 are printed."""

    def __init__(self, skip: bool | None = False):
        self.skip, self.count = skip, 0
        self.read = 0  # records, or lines of text, that could be

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
        """ValueError unless records that can be read are left of a source: else it is no damage, but another format."""
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
    """Files as given, globs (`**` too) expanded, directories searched for `suffixes`; sorted within each of them. What
    is left out of a directory is printed, by its endings.

    Raises FileNotFoundError for a path that is not there, ValueError for a directory without such files and for a file
    of another format (`check_format`).
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            _check_readable(path)
        if path.is_dir():
            left_out: Counter[str] = Counter()
            found = sorted(_walk(path, {"__pycache__", ".git"}, suffixes, left_out))
            endings = ", ".join(f"{count:,} {ending}" for ending, count in left_out.most_common())
            if not found:
                others = f"; there are {endings}" if endings else ""
                looked_for = ", ".join(suffixes)
                raise ValueError(f"{path}: no text files below this directory (looked for {looked_for}{others})")
            if endings:
                print(f"left out: {path}: what is not read: {endings}", file=sys.stderr, flush=True)
            files += found
        elif path.is_file():
            files.append(path)
        elif matches := [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]:
            files += (found := [match for match in matches if not match.is_dir()])
            if not found:
                raise ValueError(f"{matches[0]} is not a regular file or a directory of them: {path} names no other")
            above = {parent for file in found for parent in file.parents}
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
    """The files with these endings; counts those with others, and links to directories: they may lead in a circle.

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
    """Raise OSError for a directory that a glob would look into, but that cannot be read: it passes over such ones."""
    for i, part in enumerate(pattern.parts):
        if glob.has_magic(part):
            looked_into = Path(*pattern.parts[: i + (part == "**")])
            for directory in glob.glob(f"{looked_into}/", recursive=True):
                os.scandir(directory).close()


def _raise(error: OSError) -> NoReturn:
    raise error


def read_documents(sources: Iterable["Path | HFSource"], bad: BadRecords | None = None) -> list[str]:
    """A text file is one document; a `.jsonl` file has one per line, under the key "text". Blank ones are left out.

    Raises ValueError naming file and line for bytes that are not UTF-8, for lines that are not {"text": "..."}, and for
    empty files.
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
    """(text, whether it ends its document), in order, never a whole large file at once.

    block: cut texts about so long, and only where GPT-2's pattern cuts in any case: between a line and the next,
    neither of them blank there; in a line that is longer, before a space between words. Default: not at all.

    Raises ValueError, with --skip-bad-records too, for a source that has too many bad records (`BadRecords.check`).
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
    """(text, whether it ends its document) of whole documents, cut as in `pieces`. source: for messages."""
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
        raise ValueError(f"{source}: {_LONGEST >> 20} Mi characters without a space between words, where to cut them")


def _lines(path: Path, bad: BadRecords, most: int, in_parts: bool) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end); reports lines that are not UTF-8.

    in_parts: a line of more than `most` bytes comes in parts; else it is reported.
    """
    check_format(path)
    number, offset, ended, skipped, empty = 0, 0, True, False, True
    decoder = codecs.getincrementaldecoder("utf-8")()  # of a line in parts; what it keeps is half a character
    with open_regular(path) as file:
        while line := file.readline(most):
            if len(line) == most and line.endswith(b"\r"):
                line += file.readline(1)  # its \n
            if ended:
                number, skipped = number + 1, False
            begins, ended = ended, line.endswith(b"\n") or len(line) < most
            begin = offset - (0 if begins else len(decoder.getstate()[0]))
            offset += len(line)
            if number == 1 and begins and line.startswith(codecs.BOM_UTF8):  # as programs of Windows begin their files
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
        bad.read += 1  # which is another fault than that of records


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
    """A line, which may be all of a corpus, in parts of at least `block` characters."""
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
    """JSON can write half of a surrogate pair, of a text that was cut within a character; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class HFSource:
    """The column "text" of a Hugging Face dataset: `hf:NAME[,CONFIG][:SPLIT]`, split "train" where none is given; NAME
    is a hub id, or a directory that `save_to_disk` has written.

    Raises:
      ValueError: the extra is missing, there is no such dataset or split, or it has no column "text".
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
    """`find_files`, and datasets for what begins with `hf:`."""
    sources: list[Path | HFSource] = []
    for path in map(str, paths):
        sources += [HFSource(path)] if path.startswith("hf:") else find_files([path], suffixes)
    if not sources:
        raise ValueError("no data: name files, directories or hf:NAME")
    return sources
