"""Files that several processes write for one new directory without communication: `to-hf --shard-of i/n`.

The processes (workers) share the directory `.DST.shards`. Its plan.json says what is written, and a worker with another
plan is refused. A file gets its name there once it is complete. The worker that finds all files complete publishes DST.
So a worker may be killed and run again, and the work may be divided anew (1/1 writes all that is missing).
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opt_jax.system import temporary
from opt_jax.system.reading import json_object, read_small
from opt_jax.system.temporary import TemporaryPlace


def directory_of(destination: Path) -> Path:
    """The directory that the workers for this destination share."""
    destination = Path(os.path.realpath(destination))
    return destination.with_name(f".{destination.name}.shards")


def place_of(directory: Path) -> TemporaryPlace:
    return TemporaryPlace(directory, r"(plan\.json|model[-0-9a-z]*\.safetensors)(\.opt-jax-[0-9a-f]{32}\.part)?")


def read_plan(directory: Path) -> dict[str, Any] | None:
    """The plan in `directory`, or None if no worker has begun.

    Raises:
      ValueError: the plan is damaged.
    """
    try:
        plan = json_object(read_small(directory / "plan.json"), "it")
        if not isinstance(plan.get("files"), dict):
            raise ValueError("not a plan")
        return plan
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        raise ValueError(f"{directory / 'plan.json'} is damaged ({e}): remove {directory}") from None


def unfinished(directory: Path) -> list[str]:
    """The names of the plan's files that are not complete; [] if no worker has begun."""
    files = (read_plan(directory) or {"files": {}})["files"]
    return [name for name, size in files.items() if not complete(directory / name, size)]


def complete(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def join(directory: Path, plan: Mapping[str, Any]) -> None:
    """Write `plan` into `directory`, or check that the plan there is the same.

    Args:
      directory: see `directory_of`; created if it does not exist.
      plan: JSON. "files" maps the name of each file to its size in bytes, "content" is a hash, and the other entries
        tell people what differs.

    Raises:
      FileExistsError: the directory is a link, or holds files that are not ours.
      ValueError: it holds another plan; names the first entry that differs.
    """
    with place_of(directory).locked():
        begun = read_plan(directory)
        if begun is None:
            temporary.write_file(directory / "plan.json", json.dumps(plan, indent=2).encode() + b"\n")
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
    """A context with a file descriptor. The file gets its name when the block ends, and is removed if it raises.

    Args:
      size: its size in bytes.

    Raises:
      FileExistsError: see `temporary.new_file`.
      OSError: the content is not `size` bytes.
    """
    with temporary.new_file(directory / name, size) as file:
        yield file.fileno()
        if (written := os.fstat(file.fileno()).st_size) != size:
            raise OSError(f"{directory / name} has {written} bytes, not {size}: nothing was published")


def discard(directory: Path) -> None:
    """Remove the directory, unless it is not ours or a worker is writing to it."""
    place = place_of(directory)
    with suppress(OSError):
        if directory.is_dir():
            with place.locked(wait=False):
                if not any(map(temporary.in_use, temporary.unfinished_files(directory))):
                    place.remove()
