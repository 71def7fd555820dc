"""A small loopback server that speaks the hub's HTTP API, with faults on demand. Not a test itself.

It answers what `huggingface_hub` asks: `/api/models/<id>[/revision/<rev>][?blobs=true]`, `/api/models/<id>/tree/<rev>`
and `/<id>/resolve/<rev>/<file>`. For large files (LFS) this redirects to a second origin, like the hub to its CDN. The
headers of the redirect have the size and the SHA-256. The token must not be sent to the second origin.

It also takes uploads: `/api/repos/create`, `preupload` (which files are large), the LFS batch with a PUT of each large
file to the second origin, and `commit`.
"""

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT, TAGGED = "a" * 40, "b" * 40
_LOCAL = "127.0.0.1,localhost"
_LARGE = (".safetensors", ".bin", ".msgpack", ".h5")


class Asked(NamedTuple):
    """A GET of a file's content: the range of bytes that was sent, and the token that the last origin got."""

    file: str
    start: int
    stop: int
    token: str | None


@dataclass
class Repository:
    """What the server has under one id.

    Attributes:
      files: name -> content, the same at each revision.
      revisions: name -> commit. A commit is a revision too.
      token: the token that may read it. None: everyone may.
      gated: whether its list is public while its files are not.
      listed: name -> false size in the listing.
      sent: name -> what is sent in place of the content that the listing and the headers describe.
      absent: files that are listed, but answered with 404.
      drop: file -> numbers of bytes after which the next connections are cut, one after the other.
      stall: file -> number of bytes after which the next connection sends no more, without closing.
      statuses: of the first answers to requests that name the repository. 0: an ordinary answer.
      busy: headers of those answers.
      lengths: whether answers with a file's content have its length.
      html: the answer to everything, like that of a proxy that wants a password.
      ranges: whether the CDN honours Range.
      lie: called with "tree" or "info" and the content, returns what is sent as JSON. Bytes are sent as they are.
      headers: false headers of answers about files.
      endless: "tree", "info", "redirect" or a file -> seconds between the pieces of a body that never ends.
        "headers" -> the same for the headers of an answer about a file.
      asked: the GETs of files.
      heads: names of files for which HEAD was asked.
      release: ends answers that stall.
    """

    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    token: str | None = None
    gated: bool = False
    listed: dict[str, int] = field(default_factory=dict)
    sent: dict[str, bytes] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    drop: dict[str, list[int]] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    lengths: bool = True
    html: bytes | None = None
    ranges: bool = True
    busy: dict[str, str] = field(default_factory=dict)
    lie: Callable[[str, Any], Any] | None = None
    headers: dict[str, Any] = field(default_factory=dict)
    endless: dict[str, float] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    private: bool | None = None  # as it was created; None: not said
    uploaded: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> content that is in no commit yet
    commits: list[str] = field(default_factory=list)  # titles
    release: threading.Event = field(default_factory=threading.Event)


class HubServer:
    """A context manager. Tests may change `repositories`, id -> Repository, at any time."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.writer = "hf_writer"  # the token that uploads need
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (_Hub, _Cdn)]
        for server in self._servers:
            server.daemon_threads = True
            server.hub = self  # pyright: ignore
        self.endpoint = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.cdn = f"http://localhost:{self._servers[1].server_port}"  # huggingface_hub may ignore ports

    def __enter__(self) -> "HubServer":
        threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in self._servers]
        self._threads = threads
        for thread in threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub: HubServer = self.server.hub  # pyright: ignore
        path = unquote(urlsplit(self.path).path)
        for name, repository in hub.repositories.items():
            if path.startswith((f"/api/models/{name}/", f"/{name}/")) or path == f"/api/models/{name}":
                if repository.statuses and (status := repository.statuses.pop(0)):
                    return self.refuse(status, **repository.busy)
                if repository.html is not None:
                    return self.send(repository.html, Content_Type="text/html")
                return self.answer(hub, name, repository, path.removeprefix("/api/models").removeprefix(f"/{name}"))
        self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        self.refuse(404)

    do_PUT = do_POST

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, hub: HubServer, name: str, repository: Repository, path: str) -> None:
        raise NotImplementedError

    def refuse(self, status: int, code: str = "", **headers: Any) -> None:
        if code:
            headers["X_Error_Code"] = code
        self.send(b"", status, **headers)

    def send(self, content: bytes, status: int = 200, announced: int | None = None, **headers: Any) -> None:
        self.send_response(status)
        if announced != -1 and "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content) if announced is None else announced))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # the client has closed the connection
                self.wfile.write(content)

    def send_endless(self, repository: Repository, what: str, status: int = 200, **headers: Any) -> bool:
        """Send until the client closes or the test ends. False if this answer is not endless."""
        pause = repository.endless.get(what)
        if pause is None:
            return False
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if what != "headers":
            self.end_headers()
        self.flush_headers()
        with contextlib.suppress(ConnectionError):
            while not repository.release.wait(pause):
                self.wfile.write(b"[" if pause else bytes(1 << 16))
        self.close_connection = True
        return True

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def send_file(self, repository: Repository, name: str, **headers: Any) -> None:
        """Send the content, or the range that is asked for, until it ends or the connection is to be cut."""
        if self.command == "HEAD":
            return self.send(b"", announced=len(repository.files[name]), **headers)
        if self.send_endless(repository, name, **headers):
            return None
        content, start = repository.sent.get(name, repository.files[name]), 0
        if repository.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cuts = repository.drop.get(name)
        stop = cuts.pop(0) if cuts else len(content)
        if name in repository.stall:
            stop = start + repository.stall.pop(name)
        repository.asked.append(Asked(name, start, stop, self.token))
        announced = len(content) - start if repository.lengths else -1
        self.send(content[start:stop], 206 if "Content_Range" in headers else 200, announced, **headers)
        if stop < len(content):
            self.wfile.flush()
            if cuts is None:
                repository.release.wait(60)
            self.close_connection = True

    def log_message(self, format, *args):
        pass


class _Hub(_Handler):
    def answer(self, hub: HubServer, name: str, repository: Repository, path: str) -> None:
        if repository.token not in (None, self.token):
            return self.refuse(401, "RepoNotFound")  # as the hub, it does not tell whether the repository exists
        kind, _, rest = path.removeprefix("/").partition("/")
        if kind == "resolve":
            revision, _, file = rest.partition("/")
        else:  # a branch may have slashes in its name
            revision, file = rest if kind in ("revision", "tree") else "main", ""
        commits = set(repository.revisions.values())
        short = [commit for commit in commits if len(revision) >= 7 and commit.startswith(revision)]
        commit = repository.revisions.get(revision) or (short[0] if short else None)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if kind == "resolve":
            return self.resolve(hub, name, repository, commit, file)
        entries = [self.entry(repository, file) for file in repository.files]
        if self.send_endless(repository, "tree" if kind == "tree" else "info"):
            return None
        lie = repository.lie or (lambda what, content: content)
        if kind == "tree":
            more: dict[str, Any] = {"Link": repository.headers["Link"]} if "Link" in repository.headers else {}
            return self.send(_json(lie("tree", entries)), **more)
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        keys = ("rfilename", "size", "blobId", "lfs") if blobs else ("rfilename",)
        siblings = [{key: entry[key] for key in keys if key in entry} for entry in entries]
        self.send(_json(lie("info", {"id": name, "sha": commit, "siblings": siblings})))

    def do_POST(self):
        """A client that may write sends its token."""
        hub: HubServer = self.server.hub  # pyright: ignore
        content, path = self.body(), unquote(urlsplit(self.path).path)
        if self.token != hub.writer:
            return self.refuse(401)
        if path == "/api/validate-yaml":  # of a model card
            return self.send(_json({"errors": [], "warnings": []}))
        if path == "/api/repos/create":
            wanted = json.loads(content)
            name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            known = name in hub.repositories
            if not known:
                hub.repositories[name] = Repository({}, private=wanted.get("visibility") == "private")
            url = f"{hub.endpoint}/{name}"
            return self.send(_json({"url": url, "name": name, "id": name}), 409 if known else 200)
        for name, repository in hub.repositories.items():
            if path == f"/{name}.git/info/lfs/objects/batch":
                return self.batch(hub, name, json.loads(content))
            for action in (self.preupload, self.commit):
                if path == f"/api/models/{name}/{action.__name__}/main":
                    return action(hub, name, repository, content)
        self.refuse(404, "RepoNotFound")

    def preupload(self, hub: HubServer, name: str, repository: Repository, content: bytes) -> None:
        files = [file["path"] for file in json.loads(content)["files"]]
        modes = {file: "lfs" if file.endswith(_LARGE) else "regular" for file in files}
        self.send(_json({"files": [{"path": k, "uploadMode": v, "shouldIgnore": False} for k, v in modes.items()]}))

    def batch(self, hub: HubServer, name: str, wanted: dict) -> None:
        objects = [
            each | {"actions": {"upload": {"href": f"{hub.cdn}/{name}/{each['oid']}"}}} for each in wanted["objects"]
        ]
        self.send(_json({"transfer": "basic", "objects": objects}))

    def commit(self, hub: HubServer, name: str, repository: Repository, content: bytes) -> None:
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append(value["summary"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = repository.uploaded[value["oid"]]
            else:
                assert entry["key"] == "file" and value["encoding"] == "base64"
                repository.files[value["path"]] = base64.b64decode(value["content"])
        url = f"{hub.endpoint}/{name}/commit/{COMMIT}"
        self.send(_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}))

    def entry(self, repository: Repository, file: str) -> dict:
        content = repository.files[file]
        oid, size = hashlib.sha1(content).hexdigest(), repository.listed.get(file, len(content))
        entry = {"type": "file", "path": file, "rfilename": file, "size": size, "oid": oid, "blobId": oid}
        if file.endswith(_LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["xetHash"] = sha256
            entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 100}
        return entry

    def resolve(self, hub: HubServer, name: str, repository: Repository, commit: str, file: str) -> None:
        about: dict[str, Any] = {"X_Repo_Commit": commit}
        if repository.gated:
            return self.refuse(403 if self.token else 401, "GatedRepo")
        if file not in repository.files or file in repository.absent:
            return self.refuse(404, "EntryNotFound", **about)
        content = repository.files[file]
        if self.command == "HEAD":
            repository.heads.append(file)
        if self.send_endless(repository, "headers") or self.send_endless(repository, "redirect", 302, Location="/x"):
            return None
        if not file.endswith(_LARGE):
            about |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'} | repository.headers
            return self.send_file(repository, file, **about)
        about["X_Xet_Hash"] = hashlib.sha256(content).hexdigest()  # as the hub sends to all clients
        about["X_Xet_Refresh_Route"] = f"/api/models/{name}/xet-read-token/{commit}"
        about["X_Linked_Size"] = str(len(content))
        about["X_Linked_ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        about |= {"Location": f"{hub.cdn}/{name}/{file}?signature=secret"} | repository.headers
        self.send(b"", 302, **about)


def _json(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


class _Cdn(_Handler):
    def do_PUT(self):
        hub: HubServer = self.server.hub  # pyright: ignore
        name, _, oid = urlsplit(self.path).path.removeprefix("/").rpartition("/")
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == oid
        hub.repositories[name].uploaded[oid] = content
        self.send(b"")

    def answer(self, hub: HubServer, name: str, repository: Repository, path: str) -> None:
        self.send_file(repository, path.removeprefix("/"))


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that talks to this server only. `home` is its HF_HOME."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "OFFLINE" not in k}
    kept |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": _LOCAL, "no_proxy": _LOCAL}
    return kept | {"HF_HUB_DISABLE_TELEMETRY": "1"} | more


class Resolver:
    """`hub.resolve` in another process, because huggingface_hub reads the environment when it is imported.

    It is called like `hub.resolve`. Returns {"path": ...} or {"error": "Type: message"}, with the "log".
    """

    CODE = """
import json, logging, sys
from opt_jax.checkpoints import answers, download, hub
download._WAITS = (0.1,) * 4
vars(answers).update(json.loads(sys.argv[1]))
log = []
handler = logging.Handler()
handler.emit = lambda record: log.append(record.getMessage())
logging.getLogger("opt_jax").addHandler(handler)
for line in sys.stdin:
    name, options = json.loads(line)
    try:
        answer = {"path": str(hub.resolve(name, **options))}
    except Exception as e:
        answer = {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(answer | {"log": log}), flush=True)
    log.clear()
"""

    def __init__(self, endpoint: str, home: Path, limits: Mapping[str, Any] = MappingProxyType({}), **more: str):
        """`limits`: values for the constants of opt_jax/checkpoints/answers.py."""
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", self.CODE, json.dumps(dict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(endpoint, home, **more),
            cwd=Path(__file__).parents[2],
        )

    def send(self, name: str, **options: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, options]) + "\n")
        self.process.stdin.flush()

    def __call__(self, name: str, **options: Any) -> dict[str, Any]:
        self.send(name, **options)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> "Resolver":
        return self

    def __exit__(self, *error) -> None:
        self.stderr = self.process.communicate(timeout=30)[1]
