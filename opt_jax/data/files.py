"""Finds and opens the files of a corpus: on a disk or behind a URL, compressed or not. No jax, no tokens."""

import glob
import gzip
import io
import logging
import os
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

from opt_jax.data.arrays import INDEX, array_name, check_alone, is_array
from opt_jax.data.formats import COMPRESSED, TABLES, check_ending, check_head
from opt_jax.system.messages import one_line
from opt_jax.system.reading import open_regular

# What is read of a directory. Its .json and .csv files are often settings and tables.
TEXT_SUFFIXES = (".jsonl", ".md", ".parquet", ".py", ".rst", ".txt")
TEXT_SUFFIXES += tuple(ending + compressed for ending in (".jsonl", ".txt") for compressed in COMPRESSED)
# Poor training data: tests, tables of character encodings, installed packages.
STDLIB_SKIP = {"__pycache__", "encodings", "idle_test", "site-packages", "dist-packages", "test", "tests"}
_BUFFER = 1 << 20
_HEAD = 4096
# What fsspec's file systems have of these changes with the content of a file.
_VERSIONS = ("etag", "ETag", "blob_id", "md5", "mtime", "LastModified", "last_modified", "created")
_ZSTD_INPUT = 1 << 10  # bytes decompressed at once: zstd can turn 20 bytes into 128 KiB


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL (`gs://`, `s3://`, `hf://`, ...) of a file system that the package fsspec knows."""

    url: str

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    def __str__(self) -> str:
        return self.url

    def open(self) -> IO[bytes]:
        """The file, opened for reading. It downloads what is read, block by block.

        Raises:
          ValueError: no package on this machine reads such URLs.
          OSError: it cannot be opened.
        """
        system, path = _file_system(self.url)
        try:
            return system.open(path, "rb")
        except Exception as error:  # each file system has exceptions of its own
            raise _unreadable(self.url, error) from None


File = Path | RemoteFile


def is_url(name: str) -> bool:
    return "://" in name


def endings(file: Any) -> tuple[str, str]:
    """(ending, ending of the compression or ""), in lower case: (".jsonl", ".gz") for `a.jsonl.gz`."""
    name = PurePosixPath(str(file).lower())
    if name.suffix in COMPRESSED:
        return PurePosixPath(name.stem).suffix, name.suffix
    return name.suffix, ""


def size_of(file: Any) -> int | None:
    """The number of bytes that are read; None if it is not known before."""
    compressed = endings(file)[1] or endings(file)[0] in TABLES
    return file.stat().st_size if isinstance(file, Path) and not compressed else None


def state_of(file: File) -> dict[str, Any]:
    """{"name", "size", ...} of a file: another dictionary, if its content has changed.

    Raises:
      OSError: the file is not there, or its server cannot be reached.
    """
    if isinstance(file, Path):
        stat = file.stat()
        return {"name": str(file), "size": stat.st_size, "modified": stat.st_mtime_ns}
    system, path = _file_system(file.url)
    try:
        about = system.info(path)
    except Exception as error:
        raise _unreadable(file, error) from None
    version = next((str(about[key]) for key in _VERSIONS if about.get(key)), "")
    return {"name": file.url, "size": about.get("size") or 0, "version": version}


def open_file(file: File) -> Any:
    """An `io.BufferedReader` of the content of the file, decompressed. Its first bytes were looked at.

    Raises:
      ValueError: it has a format that is not read, or not that of its ending; see `RemoteFile.open`, `open_regular`.
      OSError: it cannot be opened.
    """
    check_ending(file, *endings(file))
    raw: Any = open_regular(file) if isinstance(file, Path) else file.open()
    opened = None
    try:
        opened = io.BufferedReader(_Checked(file, raw, _decompressed(file, raw)), _BUFFER)
        check_head(file, opened.peek(_HEAD)[:_HEAD], endings(file)[0])
    except BaseException:
        (opened or raw).close()
        raise
    return opened


class _Checked(io.RawIOBase):
    """The bytes of a file. An error names it: damaged data is a ValueError, a failed download an OSError."""

    def __init__(self, file: File, raw: IO[bytes], source: Any):
        """`source` reads from `raw`, or is the same."""
        self._file, self._raw, self._source = file, raw, source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._source.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self._file}: cannot be decompressed ({one_line(error)}): damaged or cut short"
            ) from None
        except Exception as error:
            if isinstance(self._file, Path):
                raise
            raise _unreadable(self._file, error) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _decompressed(file: File, raw: Any) -> Any:
    compression = endings(file)[1]
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if not compression:
        return raw
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{file} needs the package zstandard: pip install zstandard") from None
    return io.BufferedReader(_ZstdReader(raw, zstandard), _BUFFER)


class _ZstdReader(io.RawIOBase):
    """The content of zstd frames. The reader of the package would end without an error where a file is cut."""

    def __init__(self, source: IO[bytes], zstandard: Any):
        self._source, self._zstandard = source, zstandard
        self._decompressor: Any = None  # of the frame that has begun
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._source.read(_ZSTD_INPUT)
            if not self._input:
                if self._decompressor is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._decompressor = self._decompressor or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._output = self._decompressor.decompress(self._input)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            ended = self._decompressor.eof
            self._input = self._decompressor.unused_data if ended else b""
            self._decompressor = None if ended else self._decompressor
        data, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


# Finding ------------------------------------------------------------------------------------------------------


def stdlib_files() -> list[Path]:
    """The Python sources of the running interpreter's standard library, without its tests, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in _walk(root, STDLIB_SKIP, (".py",), Counter()) if path.stat().st_size)


def find_files(names: Sequence[str | os.PathLike], suffixes: tuple[str, ...] = (*TEXT_SUFFIXES, ".npy")) -> list[File]:
    """The files at `names`: files, globs (also with `**`), and the files with `suffixes` below directories.

    A name may be a URL. The files of a glob or directory are sorted. The endings of files that are left out of a
    directory are printed.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a directory has no such files, or a file has another format.
    """
    files: list[File] = []
    for name in names:
        files += _remote_files(str(name), suffixes) if is_url(str(name)) else _local_files(Path(name), suffixes)
    for file in files:
        if isinstance(file, RemoteFile):
            if is_array(file):
                raise ValueError(f"{file}: arrays of token ids are memory-mapped: copy it to a disk")
            check_ending(file, *endings(file))
        elif is_array(file):
            check_alone(file)
        else:
            open_file(file).close()
    return files


def _local_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not path.exists():
        _check_readable(path)
    if path.is_dir():
        left_out: Counter[str] = Counter()
        inside = sorted(_walk(path, {"__pycache__", ".git"}, suffixes, left_out))
        _report(path, inside, left_out, suffixes)
        return inside
    if path.is_file():
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
        what = "nothing matches" if glob.has_magic(str(path)) else "no such file or directory"
        raise FileNotFoundError(f"{path}: {what}")
    regular_files = [match for match in matches if not match.is_dir()]
    if not regular_files:
        raise ValueError(f"{matches[0]} is not a regular file or a directory of them: {path} names no other")
    above = {parent for file in regular_files for parent in file.parents}
    if count := sum(match not in above for match in matches if match.is_dir()):
        print(f"left out: {path}: {count:,} directories (name them as well to read them)", file=sys.stderr)
    return regular_files


def _remote_files(url: str, suffixes: tuple[str, ...]) -> list[RemoteFile]:
    system, path = _file_system(url)
    left_out: Counter[str] = Counter()
    logging.getLogger("gcsfs").addFilter(_without_traceback)  # gcsfs logs each error that it raises
    try:
        if glob.has_magic(path):
            inside = [match for match in system.glob(path) if system.isfile(match)]
        elif system.info(path)["type"] == "directory":  # (`isdir` is false, too, when the network is down)
            everything = system.find(path)
            inside = [file for file in everything if file.lower().endswith(suffixes)]
            left_out.update(_ending(file) for file in everything if not file.lower().endswith(suffixes))
            _report(url, inside, left_out, suffixes)
        else:
            inside = [path]
    except FileNotFoundError:
        inside = []
    except ValueError:
        raise
    except Exception as error:
        raise _unreadable(url, error) from None
    if not inside:
        raise FileNotFoundError(f"{url}: {'nothing matches' if glob.has_magic(path) else 'no such file or directory'}")
    return [RemoteFile(system.unstrip_protocol(file)) for file in sorted(inside)]


def _without_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for the URL, and the path there."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the package for it is not installed, or there is no such protocol
        hint = "; gs:// needs the package gcsfs, s3:// needs s3fs"
        raise ValueError(f"{url}: cannot be read here: {one_line(error)}{hint}") from None
    except Exception as error:
        raise _unreadable(url, error) from None


def _unreadable(file: Any, error: Exception) -> OSError:
    """One line for an error of a file system; some print the answer of a server."""
    kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else OSError
    return kind(f"{file}: cannot be read: {one_line(error, 200) or type(error).__name__}")


def _report(directory: Any, inside: Sequence[Any], left_out: Counter[str], suffixes: tuple[str, ...]) -> None:
    others = ", ".join(f"{count:,} {ending}" for ending, count in left_out.most_common())
    if not inside:
        there_are = f"; there are {others}" if others else ""
        looked_for = ", ".join(suffixes)
        raise ValueError(f"{directory}: no text files below this directory (looked for {looked_for}{there_are})")
    if others:
        print(f"left out: {directory}: what is not read: {others}", file=sys.stderr, flush=True)


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower() or "without ending"


def _walk(root: Path, skip: set[str], suffixes: tuple[str, ...], left_out: Counter[str]) -> Iterator[Path]:
    """The files with these endings. Counts other files, and links to directories, which could form a circle.

    Raises:
      OSError: a directory cannot be read.
    """
    for directory, subdirectories, names in os.walk(root, onerror=_raise):
        subdirectories[:] = [name for name in subdirectories if name not in skip]
        if links := sum(Path(directory, name).is_symlink() for name in subdirectories):
            left_out["linked directories (name them as well to read them)"] += links
        if INDEX in names and ".npy" in suffixes:
            yield Path(directory, INDEX)
            arrays = {array_name(number) for number in range(len(names))}
            names = [name for name in names if name != INDEX and name not in arrays]
        for name in names:
            if name.lower().endswith(suffixes):
                yield Path(directory, name)
            elif not name.endswith(".npy.json"):  # what `opt-jax tokenize` writes beside an array
                left_out[_ending(name)] += 1


def _check_readable(pattern: Path) -> None:
    """Raise OSError for a directory that the pattern searches and that cannot be read. `glob` ignores such ones."""
    for i, part in enumerate(pattern.parts):
        if glob.has_magic(part):
            looked_into = Path(*pattern.parts[: i + (part == "**")])
            for directory in glob.glob(f"{looked_into}/", recursive=True):
                os.scandir(directory).close()


def _raise(error: OSError) -> NoReturn:
    raise error
