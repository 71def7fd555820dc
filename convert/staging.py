"""Files that several processes write for one new directory without talking to each other: `to-hf --shard-of i/n`.

They meet in `.DST.shards`, which holds a plan (what is being written, by which they know that they belong together) and
the files: a file has its name there once it is complete. Whoever finds all of them there publishes DST. So a worker may
be killed, run again, or replaced by another division of the work (1/1 writes all that is missing).
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def directory_of(destination: Path) -> Path:
    """Where the workers of this destination meet."""
    destination = Path(os.path.realpath(destination))
    return destination.with_name(f".{destination.name}.shards")


def read_plan(directory: Path) -> dict[str, Any] | None:
    """What the workers in `directory` write; None: nothing was begun.

    Raises:
      ValueError: the plan is damaged.
    """
    try:
        plan = json.loads((directory / "plan.json").read_bytes())
        if not isinstance(plan, dict) or not isinstance(plan.get("files"), dict):
            raise ValueError("not a plan")
        return plan
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        raise ValueError(f"{directory / 'plan.json'} is damaged ({e}): remove {directory}") from None


def unfinished(directory: Path) -> list[str]:
    """The files of the plan that are not complete yet; [] as well where nothing was begun."""
    files = (read_plan(directory) or {"files": {}})["files"]
    return [name for name, size in files.items() if not complete(directory / name, size)]


def complete(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def join(directory: Path, plan: Mapping[str, Any]) -> None:
    """Make `directory` the place for this plan, or find that it is.

    plan: JSON: "files" has the names and sizes of all files, "content" a hash, the rest is for people to read.

    Raises:
      ValueError: it is the place for another plan; names the first entry that differs.
    """
    with locked(directory):
        begun = read_plan(directory)
        if begun is None:
            (directory / "plan.json.part").write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
            os.rename(directory / "plan.json.part", directory / "plan.json")
            return
    for key in plan:
        if begun.get(key) != plan[key]:
            values = "" if key in ("content", "files") else f" ({begun.get(key)}, not {plan[key]})"
            raise ValueError(
                f"{directory} was begun with another {key}{values}: finish it with the same source and options, "
                "or remove it"
            )


@contextmanager
def new_file(directory: Path, name: str, size: int) -> Iterator[int]:
    """A descriptor whose content becomes the file `name` when the block ends, and vanishes if it raises.

    Raises:
      FileExistsError: another process is writing this file now.
      OSError: the content is not `size` bytes.
    """
    for left in directory.glob(f"{name}.*.part"):
        if _in_use(left):
            raise FileExistsError(f"{left}: another process is writing this file now (the same --shard-of twice?)")
        left.unlink(missing_ok=True)
    # A name of its own: even where locks do not reach across machines, two writers never share a file.
    part = directory / f"{name}.{uuid.uuid4().hex}.part"
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
            os.fsync(fd)  # whoever finds the file, after a crash of the machine too, believes its size
            if (written := os.fstat(fd).st_size) != size:
                raise OSError(f"{part} has {written} bytes, not {size}: nothing was published")
        finally:
            os.close(fd)
        os.rename(part, directory / name)
    finally:
        part.unlink(missing_ok=True)


def discard(directory: Path) -> None:
    """Remove the directory, unless a worker is writing into it."""
    if directory.is_dir() and not any(_in_use(part) for part in directory.glob("*.part")):
        shutil.rmtree(directory, ignore_errors=True)


def _in_use(part: Path) -> bool:
    try:
        fd = os.open(part, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Create the directory if need be, and be the only one to begin or to publish there."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if _is_same(fd, directory / "lock"):
            break
        os.close(fd)  # published, and removed, while we waited
    try:
        yield
    finally:
        os.close(fd)


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
