"""Hubs and mirrors that lie or stall: a download ends in one line of error (tests/support/hub_server.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import COMMIT, HubServer, Repository, Resolver

pytestmark = pytest.mark.slow
DATA = {"config.json": b"{}", "model.safetensors": b"weights"}
SHORT = {"ANSWER_SECONDS": 0.5, "ANSWERS_SECONDS": 1.5, "STALL_SECONDS": 0.3, "LONGEST_WAIT": 0, "SMALL_FILE": 300_000}


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def impatient(server, tmp_path_factory):
    with Resolver(server.endpoint, tmp_path_factory.mktemp("home"), SHORT) as resolve:
        yield resolve


def lie(answer: str, **changes: Any) -> Callable[[str, Any], Any]:
    """What `Repository.lie` takes: in an answer of this kind it replaces fields of each file, or of the repository.

    Args:
      answer: "tree" or "info".
      changes: field -> its value. `sha` is a field of the repository.
    """

    def lie(kind: str, content: Any) -> Any:
        if kind == answer:
            for part in [content] if "sha" in changes else content if kind == "tree" else content.get("siblings"):
                part |= changes
        return content

    return lie


OUTSIDE = ("../../../../outside", "/{tmp}/outside", "a" * 39, "A" * 40, "a" * 64 + "/../../../x", "", 1, {}, ["a"])


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ("info", "sha"),
        ("info", "blobId"),
        ("info", "rfilename"),
        ("info", "lfs"),
        ("info", "size"),
        ("tree", "oid"),
        ("tree", "path"),
        ("tree", "xetHash"),
        ("tree", "lfs"),
        ("tree", "size"),
        ("headers", "X-Repo-Commit"),
        ("headers", "X-Linked-ETag"),
        ("headers", "ETag"),
        ("headers", "X-Xet-Hash"),
    ],
)
def test_a_hub_cannot_name_files_outside_the_cache(server, impatient, tmp_path, answer, key):
    cache_dir = tmp_path / "x" / "y" / "z"
    cache_dir.mkdir(parents=True)
    for i, value in enumerate(OUTSIDE):
        if key in ("rfilename", "path") and i not in (0, 1, 5, 6, 7, 8) or answer == "headers" and i > 4:
            continue
        if key == "size" and value == 1:
            continue
        value = value.format(tmp=tmp_path) if isinstance(value, str) else value
        repository = Repository(DATA)
        if answer == "headers":
            repository.headers[key.replace("-", "_")] = value
            # Without ids of the content, huggingface_hub must ask for the headers of each file.
            repository.lie = lie("tree", oid=None, blobId=None)
        else:
            lied = {"size": 10, "sha256": value, "oid": value, "pointerSize": 1} if key == "lfs" else value
            repository.lie = lie(answer, **{key: lied})
        server.repositories["org/outside"] = repository
        error = impatient("org/outside", cache_dir=str(cache_dir)).get("error", "")
        assert error.startswith("OSError: org/outside at ") and "\n" not in error, (value, error)
        assert "the answer is not that of a hub" in error
        written = {path for path in tmp_path.rglob("*") if not path.is_dir()}
        assert not any(path.name == "model.safetensors" for path in written)
        for path in written:
            assert path.is_relative_to(cache_dir), path


@pytest.mark.parametrize(
    "content",
    [
        None,
        1,
        "x",
        [],
        [1],
        {},
        [[]],
        {"sha": None},
        {"siblings": {}},
        {"siblings": [1]},
        {"id": 1, "sha": COMMIT},
        {"siblings": [{"rfilename": "config.json", "lfs": {}}]},
        [{"path": "config.json"}],
        {"id": "x", "sha": COMMIT, "siblings": 1, "createdAt": "never"},
        {"id": "x", "sha": COMMIT, "createdAt": "never"},
    ],
)
def test_answers_of_a_wrong_shape_are_one_error(server, impatient, tmp_path, content):
    for answer in ("info", "tree"):
        repository = Repository(DATA)
        repository.lie = lambda kind, true, answer=answer: content if kind == answer else true
        server.repositories["org/shape"] = repository
        error = impatient("org/shape", cache_dir=str(tmp_path / answer)).get("error", "")
        assert error.startswith(("OSError: org/shape", "FileNotFoundError: org/shape")) and "\n" not in error, error


@pytest.mark.parametrize("pause", [0, 0.05])
@pytest.mark.parametrize("what", ["info", "tree", "headers", "redirect", "config.json", "model.safetensors"])
def test_answers_that_never_end(server, impatient, tmp_path, what, pause):
    server.repositories["org/endless"] = repository = Repository(DATA, endless={what: pause})
    try:
        error = impatient("org/endless", cache_dir=str(tmp_path)).get("error", "")
    finally:
        repository.release.set()
    assert "org/endless" in error and "\n" not in error, error
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_a_list_of_files_without_an_end(server, impatient, tmp_path):
    repository = Repository(DATA)
    repository.headers["Link"] = f'<{server.endpoint}/api/models/org/pages/tree/{COMMIT}>; rel="next"'
    server.repositories["org/pages"] = repository
    error = impatient("org/pages", cache_dir=str(tmp_path)).get("error", "")
    assert error.startswith("OSError: org/pages at ") and "the answer for " in error and "\n" not in error


def test_a_server_cannot_let_us_wait_for_long(server, impatient, tmp_path):
    repository = Repository(
        DATA, statuses=[0, 429, 0, 429], busy={"Retry-After": "9999", "RateLimit": '"a";r=0;t=9999'}
    )
    server.repositories["org/busy"] = repository
    folder = Path(impatient("org/busy", cache_dir=str(tmp_path))["path"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == DATA
    assert repository.statuses == []


def test_what_a_server_says_of_an_error_is_a_line_of_a_bounded_length(server, impatient, tmp_path):
    busy = {"X-Error-Message": "\x1b[2J" + "x" * 20_000}
    server.repositories["org/talks"] = Repository(DATA, statuses=[400] * 9, busy=busy)
    error = impatient("org/talks", cache_dir=str(tmp_path)).get("error", "")
    assert "the server answers 400" in error and "xxx" in error
    assert len(error) < 3000 and "\x1b" not in error and "\n" not in error
