"""A small loopback server with the part of Cloud Storage's JSON API that gcsfs and TensorStore use. Not a test itself.

Objects appear when they are complete, each write gives a new generation, and requests can be conditional on it.
TensorStore's commits rely on this. (Google's own storage-testbench is not a package that pip could install.)
"""

import contextlib
import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

PAGE = 20  # names in an answer at most, so that lists have several pages


class Object(NamedTuple):
    generation: int
    content: bytes


class Store:
    """Attributes:
    objects: "bucket/name" -> content, as clients see them.
    wrote: called with the name of an object after it was written, before the client gets the answer.
    environment: variables that send gcsfs and TensorStore here.
    """

    def __init__(self, url: str):
        self.objects: dict[str, Object] = {}
        self.wrote: Callable[[str], object] = lambda name: None
        self.uploads: dict[str, tuple[str, bytes]] = {}  # unfinished: id -> (name, content so far)
        self.lock, self.count = threading.RLock(), itertools.count(1)
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        }

    def names(self, prefix: str) -> list[str]:
        """Sorted names that begin with the prefix, without it."""
        with self.lock:
            return sorted(name.removeprefix(prefix) for name in self.objects if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        return self.objects[name].content


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.store = Store(f"http://127.0.0.1:{server.server_port}")  # type: ignore[reportAttributeAccessIssue]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.store  # type: ignore[reportAttributeAccessIssue]
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # from a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # buffered: otherwise TCP waits for the acknowledgement of the first part

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.store, self.query = self.server.store, dict(parse_qsl(url.query, keep_blank_values=True))  # type: ignore
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind, _, rest = url.path.partition("/storage/v1/b/")
        bucket, _, name = rest.partition("/o")
        name = f"{bucket}/{unquote(name[1:])}"
        with self.store.lock:
            if kind == "/upload":
                self._upload(bucket)
            elif self.command == "GET" and "/o" not in rest:
                self._send(200, {"name": bucket})
            elif self.command == "GET" and name.endswith("/"):
                self._list(bucket)
            elif not self._may(name):
                pass
            elif name not in self.store.objects:
                self._send(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
            elif self.command == "DELETE":
                del self.store.objects[name]
                self._send(204)
            elif kind == "/download" or self.query.get("alt") == "media":
                self._content(name)
            else:
                self._send(200, self._metadata(name))

    def _may(self, name: str) -> bool:
        """Whether the request's conditions on the generation hold. If not, answers it."""
        now = self.store.objects[name].generation if name in self.store.objects else 0
        if int(self.query.get("ifGenerationMatch", now)) != now:
            self._send(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        elif now and self.query.get("ifGenerationNotMatch") == str(now):
            self._send(304)
        else:
            return True
        return False

    def _upload(self, bucket: str) -> None:
        if self.query["uploadType"] == "media":
            name = f"{bucket}/{self.query['name']}"
            if self._may(name):
                self._write(name, self.body)
        elif upload := self.query.get("upload_id"):
            name, before = self.store.uploads[upload]
            content, (_, _, total) = before + self.body, self.headers["Content-Range"].rpartition("/")
            if total in ("*", str(len(content))) and (total != "*" or not self.body):
                del self.store.uploads[upload]
                self._write(name, content)
            else:
                self.store.uploads[upload] = (name, content)
                self._send(308, Range=f"bytes=0-{len(content) - 1}")
        else:
            upload, name = str(next(self.store.count)), self.query.get("name") or json.loads(self.body)["name"]
            self.store.uploads[upload] = (f"{bucket}/{name}", b"")
            self._send(200, {}, Location=f"http://{self.headers['Host']}{self.path}&upload_id={upload}")

    def _write(self, name: str, content: bytes) -> None:
        self.store.objects[name] = Object(next(self.store.count), content)
        self.store.wrote(name)
        self._send(200, self._metadata(name))

    def _metadata(self, name: str) -> dict[str, str]:
        (bucket, _, short), (generation, content) = name.partition("/"), self.store.objects[name]
        link = f"http://{self.headers['Host']}/download/storage/v1/b/{bucket}/o/{short.replace('/', '%2F')}?alt=media"
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": short,
            "size": str(len(content)),
            "mediaLink": link,
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        entries: dict[str, dict | None] = {}  # name -> description, or common prefix -> None
        for rest in self.store.names(f"{bucket}/{prefix}"):
            head, cut, _ = rest.partition(delimiter) if delimiter else (rest, "", "")
            entries[prefix + head + cut] = None if cut else self._metadata(f"{bucket}/{prefix}{rest}")
        names = [name for name in entries if name > self.query.get("pageToken", "")]
        page = names[: min(PAGE, int(self.query.get("maxResults", PAGE)))]
        items = [entries[name] for name in page if entries[name] is not None]
        prefixes = [name for name in page if entries[name] is None]
        answer = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        self._send(200, answer | ({"nextPageToken": page[-1]} if len(page) < len(names) else {}))

    def _content(self, name: str) -> None:
        generation, content = self.store.objects[name]
        headers = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(content))}
        if wanted := self.headers.get("Range"):
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            total = len(content)
            begin = int(start) if start else max(0, total - int(stop))
            end = min(int(stop) + 1, total) if start and stop else total
            if begin >= total:
                self._send(416, **{"Content-Range": f"bytes */{total}"})
            else:
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{total}"
                self._send(206, content[begin:end], **headers)
        else:
            self._send(200, content, **headers)

    def _send(self, status: int, content: dict | bytes = b"", /, **headers: str) -> None:
        if isinstance(content, dict):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
