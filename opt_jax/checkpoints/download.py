"""Downloads a model or adapter from the Hugging Face hub, or a mirror with its API, to a directory in its cache.

`huggingface_hub` makes the requests, keeps the cache, and honours HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE. This module adds what it lacks: the choice of files; large files that resume after an interruption
(since 1.19 it restarts each: huggingface_hub#4196) and are compared with the hub's SHA-256; limits on a server's
answers (answers.py); and errors of one line.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from opt_jax.checkpoints.answers import NO_HUB, guarded
from opt_jax.checkpoints.formats import foreign
from opt_jax.checkpoints.formats.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHT_FILES, read_index
from opt_jax.system.messages import one_line
from opt_jax.system.reading import SMALL_FILE
from opt_jax.system.temporary import refuse_links

_PARALLEL = 4  # files at once, because one connection seldom uses the full bandwidth
_HTTP_LIMIT = 50_000_000_000  # the hub serves larger files over its Xet protocol only
_OVERLOADED = (408, 429, 500, 502, 503, 504)
_WAITS = (1, 2, 4, 8)  # seconds before trying again
_OF_WRONG_SHAPE = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
    UnicodeDecodeError,
    UnicodeEncodeError,
)
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A repository as the caller named it. With `offline`, only the cache is read. `adapter`: it is one of PEFT."""

    name: str
    revision: str | None = None
    cache_dir: str | os.PathLike | None = None
    offline: bool = False
    adapter: bool = False

    @property
    def config_file(self) -> str:
        return ADAPTER_CONFIG if self.adapter else "config.json"

    @property
    def weight_files(self) -> tuple[str, ...]:
        return ADAPTER_WEIGHTS if self.adapter else WEIGHT_FILES


def download(repository: Repository, small_files: Iterable[str], weights: bool) -> Path:
    """The cache's directory of the repository at its revision, with its config and the small files that exist.

    Args:
      repository: the repository.
      small_files: names of small files to download if the repository has them.
      weights: also download the weights: the first of `weight_files`, and the files that it names if it is an index.

    Raises:
      FileNotFoundError: no such repository, revision or file; or the hub cannot be reached and the cache lacks it.
      PermissionError: a gated repository, or a token that the hub refuses.
      OSError: a file arrived with a wrong size or content, or does not fit on the disk; or see `guarded`.
      ValueError: an index of weight files is malformed.
    """
    from huggingface_hub import constants  # in functions, because it is slow to import

    if constants.HF_HUB_OFFLINE and not repository.offline:
        repository = replace(repository, offline=True)
    try:
        folder = _snapshot(repository, [repository.config_file, *small_files])
        if weights:
            _complete(repository, folder)
        return folder
    except Exception as e:  # huggingface_hub's own and whatever its HTTP library raises
        error = _explain(repository, e)
        if error is e:
            raise
        raise error from e


def missing_file(repository: Repository, folder: Path) -> str | None:
    """The file that the repository's directory lacks to be loaded, or a list of alternatives; None if it is complete.

    Raises:
      ValueError: its index of weight files is malformed.
    """
    if not (folder / repository.config_file).is_file():
        return repository.config_file
    # `lexists`, so that a broken link counts and is named.
    weights = next((name for name in repository.weight_files if os.path.lexists(folder / name)), None)
    if weights is not None and not (folder / weights).is_file():
        return weights
    if weights is None:
        return f"weights ({', '.join(repository.weight_files[:-1])} or {repository.weight_files[-1]})"
    return next((name for name in _needed(folder / weights) if not (folder / name).is_file()), None)


def _needed(path: Path) -> list[str]:
    """The names of the weight files: `path` itself, or the files that it names if it is an index."""
    return sorted(set(read_index(path).values())) if path.suffix == ".json" else [path.name]


def _complete(repository: Repository, folder: Path) -> None:
    """Download the weights that the snapshot lacks."""
    missing = missing_file(repository, folder)
    if repository.offline:
        if missing:
            raise FileNotFoundError(f"the copy of {repository.name} in the cache lacks {missing}: {_go_online()}")
        return
    try:
        files = _list(repository, folder.name)
    except Exception as e:
        if missing:
            raise
        log.warning("%s; using the copy in the cache, %s", _explain(repository, e), folder)
        return
    if missing is None:
        return
    chosen = next((name for name in repository.weight_files if name in files), None)
    if chosen is None or repository.config_file not in files:
        adapter = "; it is a PEFT adapter: give its base as the model, and this as its adapter (adapter=, --adapter)"
        hint = "" if repository.adapter else adapter if ADAPTER_CONFIG in files else foreign.hint(files)
        lacking = repository.config_file if chosen else f"weights: none of {', '.join(repository.weight_files)}{hint}"
        raise FileNotFoundError(f"{_where(repository)} has no {lacking}")
    at_commit = replace(repository, revision=folder.name)
    if chosen.endswith(".json"):
        _snapshot(at_commit, [chosen])
    names = _needed(folder / chosen)
    if absent := [name for name in names if name not in files]:  # before anything large is downloaded
        raise FileNotFoundError(f"{_where(repository)} has no {absent[0]}, but {chosen} names it")
    all_there = _fetch_all(at_commit, folder, [files[name] for name in names if not (folder / name).is_file()])
    largest = max(files[name].size or 0 for name in names)
    _snapshot(at_commit, names, silent=all_there, largest=largest, seconds=math.inf)
    if missing := missing_file(repository, folder):
        raise FileNotFoundError(f"{_where(repository)} did not provide {missing}: try again")


def _snapshot(
    repository: Repository,
    names: list[str],
    silent: bool = True,
    largest: int = SMALL_FILE,
    seconds: float | None = None,
) -> Path:
    """The snapshot's directory, with the named files that the repository has.

    Args:
      repository: the repository.
      names: names of files.
      silent: show no progress bars.
      largest, seconds: see `guarded`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})

    options: dict[str, Any] = {"revision": repository.revision, "cache_dir": repository.cache_dir}
    options |= {"local_files_only": repository.offline, "tqdm_class": Silent if silent else None}
    call = lambda headers: snapshot_download(repository.name, allow_patterns=names, headers=headers, **options)  # noqa: E731
    return Path(call(None) if repository.offline else _ask(call, largest, seconds))


def _list(repository: Repository, commit: str) -> Mapping[str, Any]:
    """The repository's files: name -> huggingface_hub's description (size, lfs.sha256)."""
    from huggingface_hub import HfApi

    call = lambda headers: HfApi(headers=headers).model_info(repository.name, revision=commit, files_metadata=True)  # noqa: E731
    return {file.rfilename: file for file in _ask(call).siblings or ()}


def _ask(call: Callable[[dict[str, str]], T], largest: int = SMALL_FILE, seconds: float | None = None) -> T:
    """The result of a call of huggingface_hub, which must pass on the headers."""
    with guarded(largest, seconds) as headers:
        try:
            return _patiently(lambda: call(headers))
        except Exception as e:  # huggingface_hub does not check the structure of an answer
            if type(e) in _OF_WRONG_SHAPE:
                raise OSError(f"{NO_HUB} ({type(e).__name__}: {e})") from e
            raise


def _patiently(call: Callable[[], T]) -> T:
    """The call's result, with retries if the server is overloaded or the connection breaks.

    (Only parts of huggingface_hub retry.) There is no retry without any connection, because then the cache is used.
    """
    for wait in _WAITS:
        try:
            return call()
        except Exception as e:
            response = getattr(e, "response", getattr(e.__cause__, "response", None))
            broken = _of_connection(e) and type(e).__name__ in ("ReadError", "ReadTimeout", "RemoteProtocolError")
            if not broken and (response is None or response.status_code not in _OVERLOADED):
                raise
            time.sleep(wait)
    return call()


# Large files ------------------------------------------------------------------------------------------------


def _fetch_all(repository: Repository, folder: Path, files: list[Any]) -> bool:
    """Download large files into the cache, where `snapshot_download` finds them. False: it must download the rest."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    blobs = folder.parents[1] / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    _check_room(repository, blobs, files)
    urls = {file.rfilename: hf_hub_url(repository.name, file.rfilename, revision=folder.name) for file in files}
    large = []
    for file in files:  # all are checked before anything large is downloaded
        about = _ask(lambda headers, file=file: get_hf_file_metadata(urls[file.rfilename], headers=headers))
        if file.size is not None and about.size is not None and file.size != about.size:
            raise _wrong_size(file, about.size)
        # Xet cannot resume, and we cannot limit its memory, so it is used on request only.
        by_xet = about.xet_file_data is not None and constants.HF_XET_HIGH_PERFORMANCE or (file.size or 0) > _HTTP_LIMIT
        if file.lfs is not None and about.etag == file.lfs.sha256 and not by_xet:
            large.append(file)
    stop = threading.Event()
    with ThreadPoolExecutor(_PARALLEL) as pool:
        jobs = [pool.submit(_fetch, urls[file.rfilename], file, blobs, stop) for file in large]
        try:
            for job in as_completed(jobs):
                job.result()
        finally:
            stop.set()  # after an error or Ctrl-C; the partial files of the others are kept
    return len(large) == len(files)


def _check_room(repository: Repository, blobs: Path, files: list[Any]) -> None:
    there = 0
    for file in files:
        paths = (blobs / file.lfs.sha256, _partial(blobs, file)) if file.lfs is not None else ()
        there += max((path.stat().st_size for path in paths if path.is_file()), default=0)
    needed, free = sum(file.size or 0 for file in files) - there, shutil.disk_usage(blobs).free
    if needed > free:
        what = f"{repository.name} needs {needed / 1e9:.1f} GB, but there are {free / 1e9:.1f} GB for the cache"
        raise OSError(errno.ENOSPC, f"{what}; choose another disk with --cache-dir or HF_HOME", str(blobs))


def _partial(blobs: Path, file: Any) -> Path:
    return blobs / f"{file.lfs.sha256}.opt-jax.incomplete"


def _fetch(url: str, file: Any, blobs: Path, stop: threading.Event) -> None:
    """Download one file into the cache, under its SHA-256 and with the lock of huggingface_hub, as that does."""
    from huggingface_hub.utils import WeakFileLock, tqdm

    name, size, sha256 = file.rfilename, file.size, file.lfs.sha256
    partial = _partial(blobs, file)
    locks = blobs.parents[1] / ".locks" / blobs.parent.name
    locks.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / f"{sha256}.lock"):
        if (blobs / sha256).exists() or stop.is_set():
            return
        refuse_links(partial)
        with open(partial, "a+b") as out:
            if os.fstat(out.fileno()).st_nlink > 1:
                raise FileExistsError(
                    f"{partial} is a hard link: the file has another name, so it is not written; remove this name"
                )
            with tqdm(desc=name, total=size, initial=out.tell(), unit="B", unit_scale=True, disable=None) as bar:
                _continue(url, file, out, bar, stop)
            if out.tell() < size:
                return
        with open(partial, "rb") as downloaded:
            same = hashlib.file_digest(downloaded, "sha256").hexdigest() == sha256
        if not same:
            partial.unlink()
            raise OSError(f"{name} arrived damaged: its size or SHA-256 is not the hub's. It was removed: try again")
        os.replace(partial, blobs / sha256)


def _continue(url: str, file: Any, out: BinaryIO, bar: Any, stop: threading.Event) -> None:
    """Append the missing bytes to `out`. Reconnects after errors, and gives up after several without a new byte."""
    failures = 0
    while (start := out.tell()) < file.size and not stop.is_set():
        try:
            _stream(url, file, out, bar, stop)
        except Exception as e:
            if not _of_connection(e):  # a full disk, or an answer that a retry does not change
                raise
            failures = 0 if out.tell() > start else failures + 1
            state = f"{_public(e)} ({type(e).__name__}); {out.tell():,} of {file.size:,} bytes are there"
            if failures > len(_WAITS):
                raise OSError(f"{file.rfilename}: {state}: run again to continue") from e
            log.info("%s: %s, continuing", file.rfilename, state)
            time.sleep(_WAITS[max(failures, 1) - 1])


def _stream(url: str, file: Any, out: BinaryIO, bar: Any, stop: threading.Event) -> None:
    """Append one answer of the server to `out`. If the answer is not this file, empty `out`."""
    from huggingface_hub import constants, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers, http_stream_backoff

    start = out.tell()
    headers = build_hf_headers() | ({"Range": f"bytes={start}-"} if start else {})
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # Always from the hub's own address, because the address that it redirects to expires.
    with (
        guarded(math.inf, math.inf) as guard,  # type: ignore[reportArgumentType]  (stops by itself)
        http_stream_backoff("GET", url, headers=headers | guard, timeout=timeout, retry_on_exceptions=()) as response,
    ):
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # a server without ranges sends the complete file
            bar.update(-start)
            _empty(out)
        total = response.headers.get("Content-Range", response.headers.get("Content-Length", "")).rpartition("/")[2]
        if total.isdecimal() and (announced := int(total[:20])) != file.size:
            _empty(out)
            raise _wrong_size(file, announced)
        for chunk in response.iter_bytes():
            out.write(chunk)
            bar.update(len(chunk))
            if stop.is_set():
                return
            if out.tell() > file.size:  # also for an answer without a length
                break
    if (size := out.tell()) != file.size:
        _empty(out)
        raise _wrong_size(file, size)


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _of_connection(e: BaseException | None) -> bool:
    """Whether it is an error of the HTTP library of huggingface_hub: httpx, or a module whose name begins so."""
    return type(e).__module__.startswith("httpx")


def _wrong_size(file: Any, size: int) -> OSError:
    return OSError(f"{file.rfilename} arrives with {size:,} bytes, but the hub lists it with {file.size:,}: try again")


# Errors -----------------------------------------------------------------------------------------------------


def _where(repository: Repository) -> str:
    from huggingface_hub import constants

    revision = f" (revision {repository.revision})" if repository.revision else ""
    return f"{repository.name}{revision} at {_public(constants.ENDPOINT)}"


def _go_online() -> str:
    return "run once without --offline (local_files_only, HF_HUB_OFFLINE) to complete it"


def _public(text: object) -> str:
    """One line without secrets: the token, a mirror's password, the signature in an address's query."""
    from huggingface_hub import get_token

    line = " ".join(str(text).split())
    if token := get_token():
        line = line.replace(token, "***")
    line = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", re.sub(r"//[^/@\s]+@", "//", line))
    return one_line(line)  # a server's message may be long, or contain control characters


def _explain(repository: Repository, e: Exception) -> Exception:
    """The error as one line: what, where and what to do. Our own errors and those of the disk are unchanged."""
    from huggingface_hub import constants, errors, get_token

    name, where, endpoint = repository.name, _where(repository), _public(constants.ENDPOINT)
    cache = repository.cache_dir or constants.HF_HUB_CACHE
    cause = e.__cause__ if isinstance(e, errors.LocalEntryNotFoundError) and isinstance(e.__cause__, Exception) else e
    response = getattr(cause, "response", None)
    if isinstance(cause, errors.GatedRepoError):
        refused = "the token in use may not read it" if get_token() else "set HF_TOKEN"
        return PermissionError(f"{where} is gated: accept its licence at {endpoint}/{name}, and {refused}")
    if isinstance(cause, errors.RepositoryNotFoundError):
        hint = "the token in use may not read it" if get_token() else "set HF_TOKEN"
        where = f"no repository {where}: check the name; if it is private, {hint}"
        return FileNotFoundError(f"no directory {name}, and {where}")
    if isinstance(cause, errors.RevisionNotFoundError):
        revision = repository.revision
        return FileNotFoundError(f"{name} at {endpoint} has no revision {revision!r}: give a branch, tag or commit")
    if isinstance(cause, errors.HfHubHTTPError) and response is not None:
        file = str(response.request.url.path).rpartition("/")[2]
        if isinstance(cause, errors.RemoteEntryNotFoundError):
            return FileNotFoundError(f"{where} lists {file}, but does not have it ({response.status_code})")
        if response.status_code in (401, 403):
            hint = "check the token in use (HF_TOKEN)" if get_token() else "set HF_TOKEN"
            return PermissionError(f"{where} may not be read ({response.status_code}, {file}): {hint}")
        return OSError(f"{where}: the server answers {response.status_code} for {file}: {_public(cause)}")
    if hasattr(cause, "snapshot_path") and repository.offline:  # IncompleteSnapshotError, which 1.0 does not have
        return FileNotFoundError(f"{_go_online()}: {_public(cause).partition(' Outgoing')[0]}")
    if isinstance(cause, errors.LocalEntryNotFoundError) and repository.offline:
        revision = f" at revision {repository.revision}" if repository.revision else ""
        return FileNotFoundError(f"no directory {name}, and not in the cache {cache}{revision}: {_go_online()}")
    if isinstance(cause, errors.HFValidationError):
        return FileNotFoundError(f"no directory {name}, and not a possible name on the hub: {_public(cause)}")
    if isinstance(cause, json.JSONDecodeError):
        return OSError(f"{where}: {NO_HUB} ({_public(cause)})")
    if _of_connection(cause):
        kind = type(cause.__cause__ if _of_connection(cause.__cause__) else cause).__name__  # see answers.py
        what = f"{endpoint} cannot be reached ({kind}: {_public(cause)})"
        return FileNotFoundError(f"no directory {name}, not in the cache {cache}, and {what}")
    if isinstance(cause, errors.FileMetadataError) or type(cause) is OSError and not cause.filename:
        advice = ". This is usually"  # of huggingface_hub, for its own users
        return OSError(f"{where}: {_public(cause).partition(advice)[0]}")
    return cause
