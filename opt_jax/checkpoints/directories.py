"""Directories that appear complete or not at all, on this machine or in an object store."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from etils import epath

from opt_jax.checkpoints import hub
from opt_jax.parallel.agreement import on_first_process
from opt_jax.system.disk import free_bytes
from opt_jax.system.temporary import MARKER, TemporaryPlace, refuse_links


@contextmanager
def new_directory(
    path: str | os.PathLike, overwrite: bool = False, replaceable: Callable[[Path], bool] = hub.is_orbax
) -> Iterator[Path]:
    """A context whose temporary directory becomes `path` when the block ends, and is removed if it raises.

    An object store renames no directories, so there the block gets `path` itself. It is a model once it has its
    config.json, which must be written last. The directory that `overwrite` replaces is removed at the start.

    The next call with the same `path` removes the files of a killed process, and nothing else (see `temporary.py`). All
    processes of a `jax.distributed` job enter and leave together.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false, or it is not `replaceable`; it or the temporary directory
        is a link; the latter holds files that we did not write; or another process is writing it now.
    """
    if hub.is_remote(path):
        remote = epath.Path(path)
        on_first_process(lambda: _begin_remote(remote, overwrite))
        try:
            yield hub.as_path(path)
        except BaseException:
            if jax.process_index() == 0:
                _clear_remote(remote)
            raise
        on_first_process((remote / MARKER).unlink)
        return
    refuse_links(path := hub.as_path(path))
    path = Path(os.path.realpath(path))
    place = TemporaryPlace(path.with_name(f".{path.name}.new"), "new|old")
    new, old = place.path / "new", place.path / "old"

    def begin() -> None:
        check_destination(path, overwrite, replaceable)
        held.enter_context(place.locked(wait=False))
        held.callback(place.remove)
        if old.exists() and not path.exists():  # killed between the two renamings below
            old.rename(path)
            check_destination(path, overwrite, replaceable)
        place.clear()
        new.mkdir()

    def publish() -> None:
        check_destination(path, overwrite, replaceable)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:  # after any error, also Ctrl-C
            if old.exists() and not path.exists():
                old.rename(path)

    with ExitStack() as held:  # process 0 has the lock until the end
        on_first_process(begin)
        yield new
        on_first_process(publish)


def _begin_remote(path: epath.Path, overwrite: bool) -> None:
    _check_remote(path, overwrite)
    (path / MARKER).write_bytes(b"")  # from now on the directory may be cleared, also by the next process
    (path / "config.json").unlink(missing_ok=True)
    _clear_remote(path, but=MARKER)


def _check_remote(path: epath.Path, overwrite: bool) -> None:
    names = [entry.name for entry in path.iterdir()] if path.exists() else []
    if "config.json" in names and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or pass overwrite=True (--overwrite)")
    if MARKER in names:  # a killed process left it
        parts = {name.partition(".orbax-checkpoint-tmp")[0] for name in names} - {MARKER}
        foreign = next((name for name in parts if not hub.is_model_file(name)), None)
    elif names and not ("config.json" in names and hub.is_orbax(path)):
        raise FileExistsError(f"{path} holds {names[0]}, but is not a model directory: choose another name")
    else:
        foreign = hub.foreign_file(path) if names else None
    if foreign:
        raise FileExistsError(f"{path} holds {foreign}, which is no part of a model: choose another name")


def _clear_remote(path: epath.Path, but: str = "") -> None:
    entries = [entry for entry in path.iterdir() if entry.name != but] if path.exists() else []
    for entry in sorted(entries, key=lambda entry: entry.name == MARKER):  # the marker last
        entry.rmtree() if entry.is_dir() else entry.unlink()


def check_destination(path: Path, overwrite: bool | None, replaceable: Callable[[Path], bool] = hub.is_orbax) -> None:
    """Raise FileExistsError where `new_directory` would refuse to write. overwrite: None where this is no option."""
    if hub.is_remote(path):
        return _check_remote(epath.Path(path), bool(overwrite))
    refuse_links(path)
    if not path.exists():
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    if not names:  # as from `os.makedirs`
        return
    if names <= {*hub.COMPANION_FILES}:
        how = "save it after the model, or pass tokenizer= to the model's save_pretrained"
        raise FileExistsError(f"{path} holds a tokenizer already: {how}")
    if not overwrite:
        remedy = "remove it first" if overwrite is None else "pass overwrite=True (--overwrite)"
        raise FileExistsError(f"{path} exists already: choose another name, or {remedy}")
    if not replaceable(path):
        raise FileExistsError(f"{path} is not a model directory, so it will not be overwritten: remove it yourself")
    if foreign := hub.foreign_file(path):
        raise FileExistsError(
            f"{path} holds {foreign}, which is no part of a model, so it will not be overwritten: move it elsewhere"
        )


def check_space(path: Path, nbytes: int) -> None:
    """Raise OSError unless the disk of `path` has room for `nbytes` more. Does nothing for an object store."""
    if hub.is_remote(path):
        return
    if (free := free_bytes(path)) < nbytes:
        what = f"{nbytes / 1e6:,.1f} MB are needed, but {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{what}: make room there, or choose another disk", str(path))
