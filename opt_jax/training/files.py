"""Files of a run directory, which may be on this machine or in an object store (`gs://...`)."""

import time

from etils import epath

from opt_jax.hub import check_array_path, check_remote, is_remote

_UPLOAD_SECONDS = 60.0


def run_directory(name: str) -> epath.Path:
    """ValueError: see `hub.check_remote` and `hub.check_array_path`."""
    if is_remote(name):
        check_remote(name)
    check_array_path(name)
    return epath.Path(name)


def write_text(path: epath.Path, text: str) -> None:
    """The whole file or, killed in between, the old one."""
    if is_remote(path):  # an object appears when it is complete
        path.write_bytes(text.encode())
    else:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(text.encode())
        temporary.replace(path)


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
