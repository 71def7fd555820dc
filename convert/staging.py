"""Files that several processes write for one new directory without talking to each other: `to-hf --shard-of i/n`.

They meet in `.DST.shards`, which holds a plan (what is being written, by which they know that they belong together) and
the files: a file has its name there once it is complete. Whoever finds all of them there publishes DST. So a worker may
be killed, run again, or replaced by another division of the work (1/1 writes all that is missing).
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
    """Where the workers of this destination meet."""
    destination = Path(os.path.realpath(destination))
    return destination.with_name(f".{destination.name}.shards")


def place_of(directory: Path) -> TemporaryPlace:
    return TemporaryPlace(directory, r"(plan\.json|model[-0-9a-z]*\.safetensors)(\.opt-jax-[0-9a-f]{32}\.part)?")


def read_plan(directory: Path) -> dict[str, Any] | None:
    """What the workers in `directory` write; None: nothing was begun.

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
    """The files of the plan that are not complete yet; [] as well where nothing was begun."""
    files = (read_plan(directory) or {"files": {}})["files"]
    return [name for name, size in files.items() if not complete(directory / name, size)]


def complete(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def join(directory: Path, plan: Mapping[str, Any]) -> None:
    """Make `directory` the place for this plan, or find that it is.

    plan: JSON: "files" has the names and sizes of all files, "content" a hash, the rest is for people to read.

    Raises:
      FileExistsError: it is a link, or holds what is not ours.
      ValueError: it is the place for another plan; names the first entry that differs.
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
    """A descriptor whose content becomes the file `name` when the block ends, and vanishes if it raises.

    Raises:
      FileExistsError: see `temporary.new_file`.
      OSError: the content is not `size` bytes.
    """
    with temporary.new_file(directory / name, size) as file:
        yield file.fileno()
        if (written := os.fstat(file.fileno()).st_size) != size:
            raise OSError(f"{directory / name} has {written} bytes, not {size}: nothing was published")


def discard(directory: Path) -> None:
    """Remove the directory, unless it is not ours or a worker is writing into it."""
    place = place_of(directory)
    with suppress(OSError):
        if directory.is_dir():
            with place.locked(wait=False):
                if not any(map(temporary.in_use, temporary.unfinished_files(directory))):
                    place.remove()
