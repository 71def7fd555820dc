"""The files of a run directory, which may be on a disk or in an object store (`gs://...`)."""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from etils import epath

from opt_jax.checkpoints.hub import as_path, check_array_path, check_remote, is_remote
from opt_jax.system.disk import disk_errors
from opt_jax.system.reading import json_object, open_regular, read_small
from opt_jax.system.temporary import MARKER, refuse_links, write_file

LOCK = f"{MARKER}.lock"  # see run_lock.py
_UPLOAD_SECONDS = 60.0
_MOST_BYTES = 16 << 20  # the longest line of metrics.jsonl; a line may list the rows of a batch
_WRITTEN = (
    "run.json",
    "metrics.jsonl",
    "tokenizer",
    "checkpoints",
    "best",
    "model",
    "adapter",
    "tensorboard",
    "profile",
    "wandb-id",
)


def run_directory(name: str) -> epath.Path:
    """The path of the run directory called `name`.

    Raises:
      ValueError: see `hub.check_remote`, `hub.as_path` and `hub.check_array_path`.
    """
    if is_remote(name):
        check_remote(name)
    path = as_path(name)
    check_array_path(path)
    return epath.Path(path)


def check_run_directory(output: epath.Path) -> None:
    """Check that `output` is new or the directory of a run.

    Raises:
      FileExistsError: a file that a run would write is a link; or it exists, although `output` has neither a run.json
        nor the marker of a start that was killed before it wrote one; or `model` is not a saved model.
    """
    if not is_remote(output):
        refuse_links(*(output / name for name in (*_WRITTEN, ".model.new", MARKER, LOCK)))
    ours = any((output / name).exists() for name in ("run.json", MARKER))
    foreign = [name for name in _WRITTEN if not ours and (output / name).exists()]
    if not is_remote(output) and (output / "model").exists() and not (output / "model" / "config.json").exists():
        foreign.append("model")  # a run's model always has a config.json, because it appears complete
    if foreign:
        raise FileExistsError(f"{output} holds {foreign[0]}, but no run of train.py: choose another --output")


def begin_run(output: epath.Path) -> None:
    """Create the run directory, and mark it as ours until `write_record` writes run.json."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "run.json").exists():
        (output / MARKER).write_bytes(b"")


def write_record(output: epath.Path, record: dict[str, Any]) -> None:
    """Write run.json, which makes the directory a run's."""
    write_file(output / "run.json", json.dumps(record, indent=2).encode() + b"\n")
    (output / MARKER).unlink(missing_ok=True)


def read_record(path: epath.Path) -> dict[str, dict[str, Any]]:
    """The record of a run: section -> name -> value.

    Raises:
      ValueError: `path` does not hold what `write_record` wrote.
    """
    with suppress(ValueError):
        record = json_object(read_small(path), path)
        if {"options", "model"} <= set(record) and all(isinstance(section, dict) for section in record.values()):
            return record
    raise ValueError(
        f"{path} is damaged: not the JSON that train.py wrote. Copy it back from elsewhere. If you know that options "
        f"and data are those of the first start, you can do without it: mv {path} {path.parent / MARKER}"
    )


def read_metrics(path: epath.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a run's `metrics.jsonl` and their values, in order. No lines if the file does not exist.

    Leaves out an incomplete last line, which is being written or whose writer was killed.

    Raises:
      ValueError: a line (its number is named) is not one of a run's metrics, once it is reached; or the path is not a
        regular file.
    """
    if not path.exists():
        return
    with io.BytesIO(path.read_bytes()) if is_remote(path) else open_regular(path) as file:
        before = 0
        for number, line in enumerate(iter(partial(file.readline, _MOST_BYTES), b""), 1):
            if len(line) < _MOST_BYTES and not line.endswith(b"\n") and b"\r" not in line:
                return
            values = _metrics_of(line)
            if values is None:
                raise ValueError(
                    f"{path}:{number}: not a line that train.py writes, a JSON object with a step and numbers: "
                    "mend this line or remove it"
                )
            if values["step"] <= before:
                raise ValueError(
                    f"{path}:{number}: step {values['step']} comes after step {before}: mend the order of the lines, "
                    "or remove those that do not belong there"
                )
            before = values["step"]
            yield line, values


def _metrics_of(line: bytes) -> dict[str, Any] | None:
    """The values in a line; None if a run does not write such lines."""
    with suppress(ValueError, RecursionError):
        values = json.loads(line.decode("utf-8-sig"), parse_constant=int)  # ValueError for NaN: a run writes null
        if isinstance(values, dict) and type(values.get("step")) is int and values["step"] > 0:
            rows = values.get("batch", [])
            others = [value for name, value in values.items() if name != "batch"]
            if isinstance(rows, list) and all(value is None or _is_finite(value) for value in others):
                return values
    return None


def _is_finite(value: Any) -> bool:
    """True for a finite number. In JSON, 1e999 is read as infinity, and an integer may be larger than any float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def ranges(numbers: Sequence[int]) -> str:
    """The numbers as text: [2, 3, 4, 7] becomes "2 to 4, 7". At most eight ranges are shown."""
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n + 1]
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    texts = [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(texts[:8] + ["..."] * (len(texts) > 8))


class Lines:
    """Appends lines to a text file.

    A local file has each line at once, even if this process is killed afterwards. An object in a store cannot be
    appended to, so it is rewritten: by `flush`, and else at most once a minute.

    Args:
      before_write: called before each write. If it raises, nothing is written.
    """

    def __init__(self, path: epath.Path, before_write: Callable[[], None] = lambda: None):
        self._path, self._remote, self._changed = path, is_remote(path), False
        self._before_write = before_write
        self._text = [path.read_bytes().decode()] if self._remote and path.exists() else []
        self._file = None if self._remote else open(path, "a", encoding="utf-8")
        self._written = time.monotonic()

    def write(self, line: str) -> None:
        if self._file is not None:
            self._before_write()
            with disk_errors(self._path, len(line)):
                self._file.write(line)
                self._file.flush()
            return
        self._text.append(line)
        self._changed = True
        if time.monotonic() - self._written > _UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._changed:
            self._before_write()
            self._text = ["".join(self._text)]
            write_file(self._path, self._text[0].encode())
            self._changed, self._written = False, time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            with disk_errors(self._path):
                self._file.close()
