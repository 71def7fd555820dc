"""Files of a run directory, which may be on this machine or in an object store (`gs://...`)."""

import json
import time
from typing import Any

from etils import epath

from opt_jax.hub import check_array_path, check_remote, is_remote
from opt_jax.temporary import MARKER, new_file, refuse_links

_UPLOAD_SECONDS = 60.0
_WRITTEN = (
    "run.json", "metrics.jsonl", "tokenizer", "checkpoints", "best", "model", "tensorboard", "profile", "wandb-id",
)  # fmt: skip


def run_directory(name: str) -> epath.Path:
    """ValueError: see `hub.check_remote` and `hub.check_array_path`."""
    if is_remote(name):
        check_remote(name)
    check_array_path(name)
    return epath.Path(name)


def check_run_directory(output: epath.Path) -> None:
    """
    Raises:
      FileExistsError: what a run would write or clear is a link, or there already, but not a run's: `output` has no
        run.json, nor is it of a start that was killed before it wrote one.
    """
    if not is_remote(output):
        refuse_links(*(output / name for name in (*_WRITTEN, ".model.new", MARKER)))
    ours = any((output / name).exists() for name in ("run.json", MARKER))
    foreign = [name for name in _WRITTEN if not ours and (output / name).exists()]
    if not is_remote(output) and (output / "model").exists() and not (output / "model" / "config.json").exists():
        foreign.append("model")  # a model of ours appears complete
    if foreign:
        raise FileExistsError(f"{output} holds {foreign[0]}, but no run of train.py: choose another --output")


def begin_run(output: epath.Path) -> None:
    """Create the run directory, and mark it as ours until `write_record`."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "run.json").exists():
        (output / MARKER).write_bytes(b"")


def write_record(output: epath.Path, record: dict[str, Any]) -> None:
    """run.json, by which the directory is a run's from now on."""
    write_text(output / "run.json", json.dumps(record, indent=2) + "\n")
    (output / MARKER).unlink(missing_ok=True)


def write_text(path: epath.Path, text: str) -> None:
    """The whole file or, killed in between, the old one."""
    if is_remote(path):  # an object appears when it is complete
        path.write_bytes(text.encode())
    else:
        with new_file(path) as file:
            file.write(text.encode())


class Lines:
    """Appends lines to a text file. A local one has each line at once, whatever happens to this process afterwards. An
    object cannot be appended to: it is written anew by `flush`, and otherwise at most once a minute."""

    def __init__(self, path: epath.Path):
        self._path, self._remote, self._changed = path, is_remote(path), False
        self._text = [path.read_bytes().decode()] if self._remote and path.exists() else []
        self._file = None if self._remote else open(path, "a", encoding="utf-8")
        self._written = time.monotonic()

    def write(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._text.append(line)
        self._changed = True
        if time.monotonic() - self._written > _UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._changed:
            self._text = ["".join(self._text)]
            self._path.write_bytes(self._text[0].encode())
            self._changed, self._written = False, time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
