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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")
# Not prose and not what anybody wants to imitate: tests, charmap tables, other people's packages.
STDLIB_SKIP = {"__pycache__", "encodings", "idle_test", "site-packages", "dist-packages", "test", "tests"}
BLOCK = 1 << 16  # characters of a text file that are tokenised at once, about
_SHOWN = 20
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


class BadRecords:
    """Counts what cannot be read. Without `skip` the first one is an error, as ValueError with file and line (None: of
    a program that has no --skip-bad-records); with it, each is left out, and the first 20 are printed."""

    def __init__(self, skip: bool | None = False):
        self.skip, self.count = skip, 0

    def report(self, where: str, problem: str) -> None:
        if not self.skip:
            hint = "" if self.skip is None else "; --skip-bad-records leaves such records out"
            raise ValueError(f"{where}: {problem}{hint}")
        self.count += 1
        if self.count <= _SHOWN:
            print(f"left out: {where}: {problem}", file=sys.stderr, flush=True)
        if self.count == _SHOWN:
            print("left out: further ones are counted only", file=sys.stderr, flush=True)


def stdlib_files() -> list[Path]:
    """The Python sources of the running interpreter's standard library, without its tests, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in _walk(root, STDLIB_SKIP, (".py",)) if path.stat().st_size)


def find_files(paths: Sequence[str | os.PathLike], suffixes: tuple[str, ...] = (*TEXT_SUFFIXES, ".npy")) -> list[Path]:
    """Files as given, globs (`**` too) expanded, directories searched for `suffixes`; sorted within each of them.

    Raises FileNotFoundError for a path that is not there, ValueError for a directory without such files.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(_walk(path, skip={"__pycache__", ".git"}, suffixes=suffixes))
            if not found:
                raise ValueError(f"{path}: no text files below this directory (looked for {', '.join(suffixes)})")
            files += found
        elif path.is_file():
            files.append(path)
        elif matches := sorted(glob.glob(str(path), recursive=True)):
            files += [Path(match) for match in matches if os.path.isfile(match)]
        else:
            what = "nothing matches" if glob.has_magic(str(path)) else "no such file or directory"
            raise FileNotFoundError(f"{path}: {what}")
    return files


def _walk(root: Path, skip: set[str], suffixes: tuple[str, ...]) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in skip]
        yield from (Path(directory, name) for name in names if name.endswith(suffixes))


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

    block: cut text files about so long, and only where GPT-2's pattern cuts in any case: between a line and the next,
    neither of them blank there; in a line that is longer, before a space between words. Default: not at all.
    """
    for source in sources:
        if isinstance(source, HFSource):
            yield from ((text, True) for text in source.texts(bad))
        elif source.suffix == ".jsonl":
            yield from ((text, True) for text in _jsonl(source, bad))
        else:
            yield from _text(source, bad, block)


def _lines(path: Path, bad: BadRecords) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end); reports lines that are not UTF-8, and empty files."""
    offset, empty = 0, True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(codecs.BOM_UTF8):  # as programs of Windows begin their files
                offset, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
            empty = empty and not line.strip()
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad.report(f"{path}:{number}", f"not UTF-8 text ({error.reason} at byte {offset + error.start})")
            else:
                yield number, text.replace("\r\n", "\n")
            offset += len(line)
    if empty:
        bad.report(f"{path}:1", "an empty file")


def _text(path: Path, bad: BadRecords, block: int | None) -> Iterator[tuple[str, bool]]:
    lines: list[str] = []
    size = 0
    for _, line in _lines(path, bad):
        for number, part in enumerate(_parts(line, block)):
            if block is not None and size >= block and (number or _may_be_apart(lines[-1], part)):
                yield "".join(lines), False
                lines, size = [], 0
            lines.append(part)
            size += len(part)
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
    for number, line in _lines(path, bad):
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
