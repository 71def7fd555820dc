"""Limits on the answers of a hub or mirror: time, size, and names that `huggingface_hub` turns into paths. No jax.

`huggingface_hub` trusts its server. So requests with a header of ours, which is removed before sending, go through
`_Guard`. It is installed in the one client that all of `huggingface_hub` shares. Other requests of the process are
unaffected.
"""

import contextvars
import importlib
import json
import queue
import re
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from opt_jax.system.reading import SMALL_FILE, name_from_outside

ANSWER_SECONDS = 60.0  # for an answer that is not a file, and for the headers of a file
ANSWERS_SECONDS = 300.0  # for all answers of one call together (a list may have many pages), and for one small file
STALL_SECONDS = 60.0  # without receiving a byte
LONGEST_WAIT = 60  # seconds that a server may ask us to wait
NO_HUB = "the answer is not that of a hub; is HF_ENDPOINT right?"
_HEADER, _EXTENSION = "x-opt-jax-guard", "opt_jax"
_COMMIT, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
_ETAG = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # git's id of a small file, the SHA-256 of a large one
_guards: dict[str, "_Guard"] = {}
_clients: weakref.WeakSet = weakref.WeakSet()
_installing = threading.Lock()


@contextmanager
def guarded(file_bytes: int = SMALL_FILE, file_seconds: float | None = None) -> Iterator[dict[str, str]]:
    """A context with headers for calls of huggingface_hub, which then limit the answers.

    In such a call, an answer that is too large, too slow, or holds malformed ids or names raises OSError.

    Args:
      file_bytes: the most bytes of a file.
      file_seconds: the most seconds of a file; default: ANSWERS_SECONDS. `math.inf` for weights, which have only the
        limit STALL_SECONDS.
    """
    from huggingface_hub import get_session

    name = uuid.uuid4().hex
    _guards[name] = _Guard(file_bytes, ANSWERS_SECONDS if file_seconds is None else file_seconds)
    try:
        _install(get_session())
        yield {_HEADER: name}
    finally:
        del _guards[name]


def _install(client: Any) -> None:
    with _installing:
        if client in _clients:
            return
        _clients.add(client)
    http = importlib.import_module(type(client).__module__.partition(".")[0])  # httpx, or what replaces it
    send = client.send

    class Limited(http.SyncByteStream):
        def __init__(self, stream: Any, answer: _Answer):
            self.stream, self.answer = stream, answer

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self.stream:
                self.answer.count(len(chunk))
                yield chunk

        def close(self) -> None:
            self.stream.close()

    def limit(response: Any) -> None:  # also for redirects
        if (answer := response.request.extensions.get(_EXTENSION)) is not None:
            _check_headers(response)
            if "set-cookie" in response.headers:  # a long or non-ASCII cookie would break all later requests
                client.cookies.clear()
            response.stream = Limited(response.stream, answer)

    def guarded_send(request: Any, *, stream: bool = False, **options: Any) -> Any:
        guard = _guards.get(request.headers.pop(_HEADER, ""))
        if guard is None:
            return send(request, stream=stream, **options)
        try:
            return guard.ask(send, request, stream, options)
        except http.ConnectError as e:  # huggingface_hub would continue with a new client, which has no limits
            raise http.ConnectTimeout(str(e), request=request) from e

    client.event_hooks["response"].append(limit)
    client.send = guarded_send


class _Answer:
    """The size that one answer may still have, and its deadline."""

    def __init__(self, url: str, seconds: float, size: int):
        self.url, self.end, self.limit, self.size = url, time.monotonic() + seconds, size, 0

    def count(self, size: int) -> None:
        self.size += size
        if self.size > self.limit:
            raise OSError(f"the answer for {self.url} has more than the {self.limit:,} bytes that it may have")
        if time.monotonic() > self.end:
            raise self.late()

    def late(self) -> OSError:
        return OSError(f"the answer for {self.url} takes too long; {self.size:,} bytes have come: try again")


class _Guard:
    def __init__(self, file_bytes: int, file_seconds: float):
        self.file_bytes, self.file_seconds = file_bytes, file_seconds
        self.bytes, self.seconds = SMALL_FILE, ANSWERS_SECONDS  # left for answers that are not files

    def ask(self, send: Callable, request: Any, stream: bool, options: dict[str, Any]) -> Any:
        seconds = min(ANSWER_SECONDS, self.seconds)
        answer = _Answer(
            str(request.url.copy_with(query=None)),
            self.file_seconds if stream else seconds,
            self.file_bytes if stream else self.bytes,
        )
        times = request.extensions.get("timeout") or {}
        limits = dict.fromkeys(("connect", "read", "write", "pool"), STALL_SECONDS)
        limits |= {key: min(value, STALL_SECONDS) for key, value in times.items() if value is not None}
        request.extensions = request.extensions | {"timeout": limits, _EXTENSION: answer}
        request.headers["Accept-Encoding"] = "identity"  # compressed, a small answer could grow to any size
        start = time.monotonic()
        try:
            response = _in_time(lambda: send(request, stream=stream, **options), seconds, answer)
        finally:
            self.seconds -= time.monotonic() - start
        if not stream:
            self.bytes -= answer.size
            if request.method == "GET" and response.is_success:
                _check_content(response)
        return response


def _in_time(call: Callable[[], Any], seconds: float, answer: _Answer) -> Any:
    """The call's result, or OSError after `seconds`: the HTTP library's own time-out starts again with each byte."""
    results: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((call(), None))
        except BaseException as e:
            results.put((None, e))

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), daemon=True).start()
    try:
        result, error = results.get(timeout=max(seconds, 0))
    except queue.Empty:
        answer.end = 0  # the thread ends at the next byte
        raise answer.late() from None
    if error is not None:
        raise error
    return result


def _check_headers(response: Any) -> None:
    headers = response.headers
    _check_id("commit", headers.get("x-repo-commit"), _COMMIT)
    _check_id("xetHash", headers.get("x-xet-hash"), _SHA256)
    if response.request.method == "HEAD" and response.status_code < 400:
        etag = headers.get("x-linked-etag") or headers.get("etag")
        _check_id("ETag", etag and etag.removeprefix("W/").strip('"'), _ETAG)
    if headers.get("content-encoding", "identity") != "identity":
        raise OSError(f"the server sends {headers['content-encoding'][:40]!r} data, though it was asked for plain ones")
    headers.pop("ratelimit", None)  # another form of Retry-After
    wait = headers.get("retry-after", "").strip()
    if wait.isdecimal() and (len(wait) > 9 or int(wait) > LONGEST_WAIT):
        headers["retry-after"] = str(LONGEST_WAIT)


def _check_content(response: Any) -> None:
    """Check the description of a repository (an object), or the list of its files (an array)."""
    try:
        content = json.loads(response.content)
    except ValueError:
        return  # the caller's error
    except RecursionError:
        raise _wrong("content", "JSON with too many levels") from None
    if isinstance(content, dict):
        _check_id("sha", content.get("sha"), _COMMIT)
        files = content.get("siblings") or []
    else:
        files = content
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise _wrong("list of files", files)
    for file in files:
        try:
            for key in file.keys() & {"rfilename", "path"}:
                name_from_outside(file[key], directories=True)
        except ValueError as e:
            raise _wrong("file name", e) from None
        for key in ("blobId", "oid"):
            _check_id(key, file.get(key), _COMMIT)
        _check_id("xetHash", file.get("xetHash"), _SHA256)
        lfs = file.get("lfs")
        if lfs is not None and not isinstance(lfs, dict):
            raise _wrong("lfs", lfs)
        for key in ("sha256", "oid"):
            _check_id(f"lfs.{key}", (lfs or {}).get(key), _SHA256)
        sizes = [part.get("size", 0 if lfs is None else None) for part in (file, lfs or file)]
        if not all(type(size) is int and 0 <= size < 1 << 53 for size in sizes):
            raise _wrong("size", sizes)
    response.links  # noqa: B018  (raises if malformed)


def _check_id(what: str, value: Any, pattern: re.Pattern) -> None:
    if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
        raise _wrong(what, value)


def _wrong(what: str, value: Any) -> OSError:
    return OSError(f"{NO_HUB} (its {what} is {str(value)[:80]!r})")
