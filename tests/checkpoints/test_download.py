"""Downloads from a server that speaks the hub's API (tests/support/hub_server.py), and reading the cache offline."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.hf_files import TINY, hf_weights, write_hf
from support.hub_server import COMMIT, TAGGED, HubServer, Repository, Resolver, environment

from convert.__main__ import main
from opt_jax.checkpoints import download

pytestmark = pytest.mark.slow

MB = 1_000_000
TWO = ("model-1.safetensors", "model-2.safetensors")


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def resolve(server, tmp_path_factory):
    with Resolver(server.endpoint, tmp_path_factory.mktemp("home")) as resolve:
        yield resolve


def weights(seed: int, size: int = 3 * MB) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor {name}": name for name in names}}).encode()


def asked(repository: Repository) -> set[str]:
    """The files whose content was sent since the last call."""
    names = {each.file for each in repository.asked}
    repository.asked.clear()
    return names


def ranges(repository: Repository, name: str) -> list[tuple[int, int]]:
    return [(each.start, each.stop) for each in repository.asked if each.file == name]


def wait_until(condition: Callable[[], Any], process: Resolver) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and process.process.poll() is None
        time.sleep(0.01)


def check(answer: dict, repository: Repository, *names: str) -> Path:
    """Check that `answer` names a snapshot with exactly these files. Returns its directory."""
    assert "error" not in answer, answer
    folder = Path(answer["path"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {name: repository.files[name] for name in names}
    return folder


def test_downloads_what_is_needed_and_no_more(server, resolve):
    small = {"config.json": b"{}", "vocab.json": b"v", "generation_config.json": b"g"}
    other = {"README.md": b"r", "flax_model.msgpack": b"f", "tf_model.h5": b"t", "original/model.safetensors": b"o"}
    torch_files = {
        "pytorch_model-00001-of-00001.bin": b"t",
        "pytorch_model.bin.index.json": index("pytorch_model-00001-of-00001.bin"),
    }
    flax_files = {
        "flax_model-00001-of-00001.msgpack": b"m",
        "flax_model.msgpack.index.json": index("flax_model-00001-of-00001.msgpack"),
    }
    sharded = {name: weights(i) for i, name in enumerate(TWO)} | {"model.safetensors.index.json": index(*TWO)}
    server.repositories |= {
        "org/both": (both := Repository(small | other | torch_files | {"model.safetensors": b"s"})),
        "org/torch": (torch := Repository(small | other | torch_files)),
        "org/sharded": (many := Repository(small | sharded | {"model-3.safetensors": b"?", "pytorch_model.bin": b"p"})),
        "canonical": (one := Repository(small | {"pytorch_model.bin": b"p"})),
        "org/flax": (flax := Repository(small | other)),
        "org/flax-sharded": (flax_sharded := Repository(small | flax_files | {"tf_model.h5": b"t"})),
    }
    check(resolve("org/both", weights=False), both, *small)
    assert asked(both) == {*small}
    check(resolve("org/both"), both, *small, "model.safetensors")
    assert asked(both) == {"model.safetensors"}  # the others are there already
    check(resolve("org/torch"), torch, *small, *torch_files)
    assert asked(torch) == {*small, *torch_files}
    check(resolve("org/sharded"), many, *small, *sharded)
    assert asked(many) == {*small, *sharded}
    check(resolve("org/flax"), flax, *small, "flax_model.msgpack")
    assert asked(flax) == {*small, "flax_model.msgpack"}
    check(resolve("org/flax-sharded"), flax_sharded, *small, *flax_files)
    folder = check(resolve("canonical"), one, *small, "pytorch_model.bin")
    assert folder.name == COMMIT
    for repository, name in ((both, "org/both"), (torch, "org/torch"), (many, "org/sharded"), (one, "canonical")):
        asked(repository)
        assert resolve(name) == resolve(name, local_files_only=True)
        assert asked(repository) == set()
    blobs = folder.parents[1] / "blobs"
    assert {path.stat().st_size for path in blobs.iterdir()} == {1, 2}  # no incomplete file is left


def test_shards_in_a_sub_directory(server, resolve):
    shards = {f"weights/v1/{name}": weights(i, 1000) for i, name in enumerate(TWO)}
    files = {"config.json": b"{}", "model.safetensors.index.json": index(*shards)}
    server.repositories["org/below"] = repository = Repository(files | shards | {"weights/other.safetensors": b"o"})
    answer = resolve("org/below")
    assert "error" not in answer, answer
    folder = Path(answer["path"])
    downloaded = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert downloaded == files | shards and asked(repository) == {*downloaded}
    assert resolve("org/below", local_files_only=True) == answer


def test_revisions(server, resolve):
    other = "1234567" + "c" * 33
    revisions = {"main": COMMIT, "v1.0": TAGGED, "refs/pr/1": other, "some/branch": other, COMMIT: COMMIT}
    repository = Repository({"config.json": b"{}", "model.safetensors": b"s"}, revisions | {other: other})
    server.repositories["org/revisions"] = repository
    expected = {None: COMMIT} | repository.revisions | {"1234567": other}
    for revision, commit in expected.items():
        folder = check(resolve("org/revisions", revision=revision), repository, *repository.files)
        assert folder.name == commit
    assert ranges(repository, "model.safetensors") == [(0, 1)]  # the same content under each
    for revision, commit in expected.items():
        assert Path(resolve("org/revisions", revision=revision, local_files_only=True)["path"]).name == commit
    for revision in ("v2.0", "7654321", "b" * 39 + "0", "../main", "a b?c#d"):
        error = resolve("org/revisions", revision=revision)["error"]
        assert f"org/revisions at {server.endpoint} has no revision {revision!r}: give a branch" in error
        error = resolve("org/revisions", revision=revision, local_files_only=True)["error"]
        assert "not in the cache" in error and f"at revision {revision}: run once without --offline" in error


def test_weights_that_were_deleted_in_the_cache_are_not_replaced_by_others(server, resolve, tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"ours"}
    server.repositories["org/deleted"] = repository = Repository(files)
    folder = check(resolve("org/deleted", cache_dir=str(tmp_path)), repository, *files)
    (folder / "pytorch_model.bin").write_bytes(b"others")
    (folder / "model.safetensors").resolve().unlink()  # the link to the blob stays
    error = resolve("org/deleted", cache_dir=str(tmp_path), local_files_only=True)["error"]
    assert "the copy of org/deleted in the cache lacks model.safetensors: run" in error
    assert "error" not in resolve("org/deleted", cache_dir=str(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == b"ours"


def test_what_the_cache_lacks(server, resolve, tmp_path):
    files = {"config.json": b"{}", "merges.txt": b"m", "model.safetensors.index.json": index(*TWO)}
    files |= {name: weights(i, 10) for i, name in enumerate(TWO)}
    server.repositories["org/cache"] = repository = Repository(files)
    offline = {"local_files_only": True, "cache_dir": str(tmp_path)}

    error = resolve("org/cache", **offline)["error"]
    assert error.startswith(
        f"FileNotFoundError: no directory org/cache, and not in the cache {tmp_path}: run once with"
    )
    folder = Path(resolve("org/cache", weights=False, cache_dir=str(tmp_path))["path"])
    assert asked(repository) == {"config.json", "merges.txt"}
    assert resolve("org/cache", weights=False, **offline)["path"] == str(folder)
    error = resolve("org/cache", **offline)["error"]
    assert (
        "org/cache in the cache lacks weights (model.safetensors, " in error and "run once without --offline" in error
    )

    check(resolve("org/cache", cache_dir=str(tmp_path)), repository, *files)
    (folder / TWO[1]).unlink()
    assert "org/cache in the cache lacks model-2.safetensors: run" in resolve("org/cache", **offline)["error"]
    (folder / "config.json").unlink()
    for options in ({}, {"weights": False}):
        error = resolve("org/cache", **options, **offline)["error"]
        assert "config.json" in error and "without --offline" in error and "\n" not in error
    asked(repository)
    check(resolve("org/cache", cache_dir=str(tmp_path)), repository, *files)
    assert asked(repository) == set()  # their content was in the cache

    gone = "no repository org/cache at"
    del server.repositories["org/cache"]
    answer = resolve("org/cache", cache_dir=str(tmp_path))
    assert answer["path"] == str(folder)  # gone from the hub, but in the cache: the copy is used, with a warning
    assert len(answer["log"]) == 1 and gone in answer["log"][0] and "using the copy in the cache" in answer["log"][0]
    (folder / TWO[0]).unlink()
    assert gone in resolve("org/cache", cache_dir=str(tmp_path))["error"]


def test_dropped_connection_continues(server, resolve):
    data = {"config.json": b"{}", "vocab.json": b"v" * 100, "pytorch_model.bin": weights(1)}
    drops = {"pytorch_model.bin": [MB, 2 * MB, 2 * MB], "vocab.json": [10]}
    server.repositories["org/drop"] = repository = Repository(data, drop=drops)
    check(resolve("org/drop"), repository, *data)
    assert ranges(repository, "pytorch_model.bin") == [(0, MB), (MB, 2 * MB), (2 * MB, 2 * MB), (2 * MB, 3 * MB)]
    # A server without ranges sends everything again: only the last answer is kept.
    data = data | {"pytorch_model.bin": weights(2)}
    server.repositories["org/drop2"] = repository = Repository(data, drop={"pytorch_model.bin": [MB]}, ranges=False)
    check(resolve("org/drop2"), repository, *data)
    assert ranges(repository, "pytorch_model.bin") == [(0, MB), (0, 3 * MB)]


def test_next_run_continues_where_the_last_gave_up(server, resolve):
    data = {"config.json": b"{}", "model.safetensors": weights(3)}
    server.repositories["org/worse"] = repository = Repository(data, drop={"model.safetensors": [MB] * 6})
    error = resolve("org/worse")["error"]
    assert error.startswith(f"OSError: org/worse at {server.endpoint}: model.safetensors: ")
    assert "1,000,000 of 3,000,000 bytes are there: run again to continue" in error and "secret" not in error
    assert ranges(repository, "model.safetensors") == [(0, MB)] + [(MB, MB)] * 5
    asked(repository)
    check(resolve("org/worse"), repository, *data)
    assert ranges(repository, "model.safetensors") == [(MB, 3 * MB)]


def test_killed_process_continues(server, resolve, tmp_path):
    first, second = TWO
    data = {
        "config.json": b"{}",
        first: weights(4, 10),
        second: weights(5),
        "model.safetensors.index.json": index(*TWO),
    }
    server.repositories["org/killed"] = repository = Repository(data, stall={second: MB})
    with Resolver(server.endpoint, tmp_path) as other:
        other.send("org/killed", cache_dir=str(tmp_path / "cache"))
        partial = lambda: tmp_path.glob("cache/models*/blobs/*.incomplete")  # noqa: E731
        wait_until(lambda: sum(path.stat().st_size for path in partial()) >= MB - 10_000, other)
        other.process.kill()
    repository.release.set()
    asked(repository)
    folder = check(resolve("org/killed", cache_dir=str(tmp_path / "cache")), repository, *data)
    ((start, stop),) = ranges(repository, second)
    assert MB - 10_000 <= start <= MB and stop == 3 * MB
    assert asked(repository) == {second}
    assert not list((folder.parents[1] / "blobs").glob("*.incomplete"))


def test_two_processes_download_once(server, resolve, tmp_path):
    data = {"config.json": b"{}", "model.safetensors": weights(8)}
    server.repositories["org/twice"] = repository = Repository(data, stall={"model.safetensors": MB})
    with Resolver(server.endpoint, tmp_path) as other:
        other.send("org/twice", cache_dir=str(tmp_path))
        wait_until(lambda: ranges(repository, "model.safetensors"), other)
        resolve.send("org/twice", cache_dir=str(tmp_path))
        wait_until(lambda: repository.heads.count("model.safetensors") == 2, resolve)
        repository.release.set()
        for answer in (other.answer(), resolve.answer()):
            check(answer, repository, *data)
    assert ranges(repository, "model.safetensors") == [(0, MB), (MB, 3 * MB)]


@pytest.mark.parametrize("file", ["model.safetensors", "merges.txt"])
@pytest.mark.parametrize("size", [10, 5_000_000])
def test_wrong_size(server, resolve, file, size):
    data = {"config.json": b"{}", "merges.txt": bytes(1000), "model.safetensors": weights(size, 1000)}
    server.repositories["org/size"] = repository = Repository(data, sent={file: bytes(size)})
    cache_dir = str(Path(resolve.home) / f"{file} {size}")
    error = resolve("org/size", cache_dir=cache_dir)["error"]
    assert error.startswith("OSError: org/size") and file in error and "\n" not in error
    assert (f"{size:,} bytes" in error and "1,000" in error) or f"size 1000 but has size {size}" in error
    assert not list(Path(cache_dir).glob(f"models--*/snapshots/*/{file}"))
    if file == "model.safetensors":
        repository.lengths = False
        assert "bytes, but the hub lists it with 1,000: try" in resolve("org/size", cache_dir=cache_dir)["error"]
    repository.sent.clear()
    check(resolve("org/size", cache_dir=cache_dir), repository, *data)


def test_wrong_content(server, resolve):
    data = {"config.json": b"{}", "model.safetensors": weights(6)}
    server.repositories["org/content"] = repository = Repository(data, sent={"model.safetensors": bytes(3 * MB)})
    error = resolve("org/content")["error"]
    assert "model.safetensors arrived damaged: its size or SHA-256 is not the hub's" in error
    repository.sent.clear()
    check(resolve("org/content"), repository, *data)
    assert ranges(repository, "model.safetensors") == [(0, 3 * MB)] * 2


def test_missing_files(server, resolve):
    config, st = {"config.json": b"{}"}, {"model.safetensors": b"s"}
    many = {"model.safetensors.index.json": index(*TWO), TWO[0]: b"1"}
    bad = {"model.safetensors.index.json": index("../../x.safetensors")}
    cases = {
        "listed": (Repository(config | st, absent=("model.safetensors",)), "lists model.safetensors, but does not"),
        "listed2": (Repository(config | st, absent=("config.json",)), "lists config.json, but does not have it (404)"),
        "config": (Repository(st), "has no config.json"),
        "adapter": (Repository({"adapter_config.json": b"{}"}), "it is a PEFT adapter: give its base as the model"),
        "weights": (Repository(config | {"flax.msgpack": b"f", "x/model.safetensors": b"s"}), "has no weights:"),
        "tf": (Repository(config | {"tf_model.h5": b"t"}), "; tf_model.h5 is a TensorFlow checkpoint (HDF5), which is"),
        "gguf": (Repository({"x.Q8_0.gguf": b"g"}), "; x.Q8_0.gguf is a GGUF file"),
        "shard": (Repository(config | many), "has no model-2.safetensors, but model.safetensors.index.json names it"),
        "index": (Repository(config | bad), "index.json is not an index of weight files"),
        "size": (Repository(config | st, listed={"model.safetensors": 10**15}), "org/size needs 1000000.0 GB, but"),
        "size2": (Repository(config | st, listed={"model.safetensors": 2}), "arrives with 1 bytes, but the hub lists"),
    }
    for name, (repository, message) in cases.items():
        server.repositories[f"org/{name}"] = repository
        error = resolve(f"org/{name}")["error"]
        assert message in error and f"org--{name}" in error.replace("/", "--") and "\n" not in error, error
        assert asked(repository) <= {"config.json", "model.safetensors.index.json"}  # nothing large
    server.repositories["org/proxy"] = Repository({}, html=b"<html>Log in</html>")
    error = resolve("org/proxy")["error"]
    assert error.startswith(
        f"OSError: org/proxy at {server.endpoint}: the answer is not that of a hub; is HF_ENDPOINT "
    )
    error = resolve("a--b")["error"]
    assert error.startswith("FileNotFoundError: no directory a--b, and not a possible name on the hub: ")


def test_overloaded_server(server, resolve):
    data = {"config.json": b"{}", "model.safetensors": b"s"}
    # Requests: info, tree, HEAD and GET of config.json, info with sizes, HEAD and GET of the weights.
    for before in range(7):
        repository = Repository(data | {"model.safetensors": weights(before, 10)})
        server.repositories[f"org/busy{before}"] = repository
        repository.statuses += [0] * before + [503]
        check(resolve(f"org/busy{before}"), repository, *data)
        assert repository.statuses == []
    server.repositories["org/broken"] = Repository(data, statuses=[500] * 100)
    error = resolve("org/broken")["error"]
    assert f"org/broken at {server.endpoint}: the server answers 500" in error and "\n" not in error


def test_environment(server, tmp_path):
    files = {"config.json": b"{}", "vocab.json": b"v", "pytorch_model.bin": weights(7, 1000)}
    server.repositories["org/private"] = repository = Repository(files, token="hf_right")
    server.repositories["org/gated"] = Repository(files, gated=True)
    home: Path = tmp_path / "home"
    with Resolver(server.endpoint + "/", home, HF_TOKEN="hf_right") as resolve:
        folder = check(resolve("org/private"), repository, *files)
        assert folder.parents[2] == home / "hub"
        tokens = {"config.json": "hf_right", "vocab.json": "hf_right", "pytorch_model.bin": None}  # none for the CDN
        assert {each.file: each.token for each in repository.asked} == tokens
        gated = resolve("org/gated")["error"]
        repository.token = "hf_other"
        refused = resolve("org/private", revision="v1.0")["error"]
    assert gated.startswith(f"PermissionError: org/gated at {server.endpoint} is gated: accept its licence at ")
    assert f"at {server.endpoint}/org/gated, and the token in use may not read it" in gated
    assert "no repository org/private (revision v1.0) at" in refused and "the token in use may not read it" in refused
    assert "hf_right" not in gated + refused + resolve.stderr

    with Resolver(server.endpoint, home, HF_HUB_CACHE=str(tmp_path / "hub cache")) as resolve:
        assert "if it is private, set HF_TOKEN" in resolve("org/private")["error"]
        assert "and set HF_TOKEN" in resolve("org/gated")["error"]
        repository.token = None
        folder = check(resolve("org/private"), repository, *files)
        assert folder.parents[2] == tmp_path / "hub cache"

    asked(repository)
    unreachable = "http://somebody:password@127.0.0.1:9"
    with Resolver(unreachable, home) as resolve:
        answer = resolve("org/private")
        assert "path" in answer and "http://127.0.0.1:9 cannot be reached" in answer["log"][0]
        error = resolve("org/elsewhere")["error"]
    assert error.startswith("FileNotFoundError: no directory org/elsewhere, not in the cache ")
    assert "http://127.0.0.1:9 cannot be reached (ConnectError" in error and "\n" not in error
    assert "password" not in error + answer["log"][0]

    with Resolver(server.endpoint, home, HF_HUB_OFFLINE="1") as resolve:
        assert "path" in resolve("org/private")
        assert "and not in the cache" in resolve("org/gated")["error"]
    assert asked(repository) == set()


def test_missing_file(tmp_path):
    repository = download.Repository("a/b")
    assert download.missing_file(repository, tmp_path) == "config.json"
    write_hf(tmp_path, TINY, {"a": np.zeros(2, np.float16), "b": np.zeros(2, np.float16)}, "bin-sharded")
    assert download.missing_file(repository, tmp_path) is None
    (tmp_path / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "pytorch_model.bin")  # it comes before the index
    assert download.missing_file(repository, tmp_path) is None
    (tmp_path / "pytorch_model.bin").unlink()
    assert download.missing_file(repository, tmp_path) == "pytorch_model-00002-of-00002.bin"
    for content in (
        b"{",
        b"[]",
        b"{}",
        index(),
        index("../b"),
        index("a//b"),
        b'{"weight_map": {"a": 1}}',
        b"[" * 100_000,
    ):
        (tmp_path / "pytorch_model.bin.index.json").write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin.index.json is not an index of weight files"):
            download.missing_file(repository, tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    missing = download.missing_file(repository, tmp_path)
    assert missing is not None and missing.startswith("weights (model.safetensors, ")


def test_convert_from_the_hub(server, tmp_path):
    local = write_hf(tmp_path / "local", TINY, hf_weights(TINY, dtype="float16"), "bin-sharded")
    files = {path.name: path.read_bytes() for path in local.iterdir()} | {"vocab.json": b"{}", "README.md": b"r"}
    server.repositories["org/converted"] = repository = Repository(
        files, drop={"pytorch_model-00002-of-00002.bin": [9]}
    )

    def convert(out: str, *options: str, endpoint: str = server.endpoint) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "convert",
            "org/converted",
            str(tmp_path / out),
            "--revision",
            "main",
            *options,
        ]
        command += ["--cache-dir", str(tmp_path / "cache")]
        settings = {"env": environment(endpoint, tmp_path / "home"), "cwd": Path(__file__).parents[2]}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)

    done = convert("out", "--offline")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith("error: no directory org/converted, and not in the cache")
    done = convert("out")
    assert done.returncode == 0, done.stderr
    assert asked(repository) == files.keys() - {"README.md"}
    done = convert("again", "--offline", endpoint="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    for out in ("out", "again"):
        assert main(["verify", str(tmp_path / out), "--against", str(local)]) == 0
        assert (tmp_path / out / "vocab.json").read_bytes() == b"{}"
    assert not list((tmp_path / "home").glob("hub/models*"))
