"""Several checkpoints of metaseq in one call: each to its own sub-directory, which later calls verify and pass over."""

import ctypes
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import jax

from opt_jax.checkpoints import hub
from opt_jax.parallel import processes
from opt_jax.parallel.agreement import on_every_process
from opt_jax.system.disk import error_line

from .checkpoint import Checkpoint
from .inspect import compare
from .metaseq import find_files, stem
from .progress import Report
from .source import open_source
from .to_orbax import cast


def find(patterns: Sequence[str]) -> dict[str, list[str]]:
    """The name of each checkpoint -> its files. Checkpoints are in the order of the numbers in their names.

    A checkpoint is named after its files, without part and shard: `checkpoint_2_1000`. If files in several directories
    have the same names, it is named after its directory.

    Args:
      patterns: files, globs, and directories. A directory stands for its `*.pt`, or for those one level below.

    Raises:
      FileNotFoundError: a pattern stands for no file.
      ValueError: two checkpoints would get the same name.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = hub.disk_path(pattern)
        below = sorted(path.glob("*/*.pt")) if path.is_dir() and not any(path.glob("*.pt")) else []
        files += below or find_files([pattern])
    groups: dict[tuple[Path, str], list[str]] = {}
    for file in files:
        groups.setdefault((file.parent, stem(file)), []).append(str(file))
    counts = Counter(name for _, name in groups)
    named: dict[str, list[str]] = {}
    for (folder, name), paths in groups.items():
        name = name if counts[name] == 1 else folder.resolve().name
        if name in named:
            raise ValueError(f"{paths[0]} and {named[name][0]} would both be written to {name}: convert them apart")
        named[name] = paths
    return dict(sorted(named.items(), key=lambda item: hub.by_number(Path(item[0]))))


def convert_each(
    checkpoints: Mapping[str, list[str]],
    directory: str,
    overwrite: bool,
    convert: Callable[[list[str], str], None],
    verify: Callable[[list[str], str], None],
) -> None:
    """Convert each checkpoint to `directory/name`. If one fails, print a line and go on with the next.

    In a job of several processes, the first error ends it.

    Args:
      checkpoints: what `find` returns.
      directory: on a disk or in an object store.
      overwrite: convert those that are there already, instead of verifying them.
      convert: called with the files and the directory to write.
      verify: called with the files and the directory that is there already.

    Raises:
      FileExistsError: `directory` is a model itself.
      ValueError: some checkpoints failed.
    """
    if (hub.as_path(directory) / "config.json").is_file():
        raise FileExistsError(f"{directory} is a model: name a directory in which each checkpoint gets its own")
    _return_freed_memory()
    failed = 0
    for name, files in checkpoints.items():
        place = f"{directory.rstrip('/')}/{name}"
        try:
            there = (hub.as_path(place) / "config.json").is_file()
            (verify if there and not overwrite else convert)(files, place)
        except (OSError, ValueError) as error:
            if jax.process_count() > 1:
                raise
            print(f"error: {error_line(error)}", file=sys.stderr, flush=True)
            failed += 1
    if failed:
        raise ValueError(f"{failed} of {len(checkpoints)} checkpoints failed, see above; the others are in {directory}")


def _return_freed_memory() -> None:
    """Make glibc return arrays of 1 MB and more to the system when they are freed, also those that threads allocated.

    Otherwise each conversion of a series adds to what it keeps: 0.8 GB after 20 conversions of 0.13 GB.
    """
    with suppress(OSError, AttributeError):  # not on Linux, or with another C library
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def verify(files: list[str], place: str, dtype: str | None, quiet: bool, **architecture) -> None:
    """Check that the directory `place` is the conversion of `files`, every bit; print a line.

    The processes of a job share the work.

    Args:
      dtype: the one that the conversion casts to.
      quiet: print no progress.
      architecture: `model` and `config` of `open_source`.

    Raises:
      OSError, ValueError: it is not, or one of the two cannot be read.
    """

    def check() -> None:
        ours, source = open_source([place]), open_source(files, **architecture, from_metaseq=True)
        for opened in (ours, source):
            opened.check()
        theirs = dataclasses.replace(source, arrays={path: cast(source, path, dtype) for path in source.arrays})
        paths = sorted(ours.arrays.keys() | theirs.arrays.keys())[jax.process_index() :: jax.process_count()]
        shares = [_only(opened, paths) for opened in (ours, theirs)]
        with Report(shares[1].nbytes, quiet or jax.process_index() > 0) as report:

            def progress(path: str, nbytes: int) -> None:
                processes.reached(path)
                report(path, nbytes)

            difference = compare(shares[0], shares[1], progress)
        for opened in (ours, source):
            opened.files.check()
        if difference is not None:
            raise ValueError(f"{place} is there already, and differs ({difference}): remove it, or pass --overwrite")
        if jax.process_index() == 0:
            print(f"{place}: is there already, the same {len(theirs.arrays)} tensors as {theirs.where}", flush=True)

    on_every_process(check)


def _only(opened: Checkpoint, paths: Sequence[str]) -> Checkpoint:
    """The checkpoint with these arrays only: the share of a process."""
    return dataclasses.replace(opened, arrays={path: opened.arrays[path] for path in paths if path in opened.arrays})
