"""Names to directories: local ones, the cache, and downloads from a small server that speaks the hub's API."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from opt_jax import hub

COMMIT = "a" * 40


def test_directories(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/model") == Path("org/model")  # a directory comes before the hub
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org") == tmp_path / "org"
    with pytest.raises(ValueError, match="revision='main' is for models on the hub"):
        hub.resolve(tmp_path, revision="main")
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="is a file; give the directory"):
        hub.resolve(tmp_path / "model.safetensors")


def test_run_directory_of_train_stands_for_its_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path / "model"


def make_run(run: Path, *steps: str) -> Path:
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"options": {}, "model": {"model_type": "opt", "vocab_size": 48}}))
    for step in steps:
        (run / "checkpoints" / step / "params").mkdir(parents=True)
        (run / "checkpoints" / step / "params" / "_METADATA").write_text("{}")
    return run


def test_unfinished_run_stands_for_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="run is a training run without a checkpoint yet: none in .*checkpoint"):
        hub.resolve(run)
    make_run(tmp_path / "other", "900", "1000", "2000.orbax-checkpoint-tmp-1", "tmp.3000")
    (tmp_path / "other" / "checkpoints" / "5000").mkdir()  # without parameters
    newest = tmp_path / "other" / "checkpoints" / "1000"
    assert hub.resolve(tmp_path / "other") == newest  # by number, not by name
    assert hub.resolve(newest.parent / "900") == newest.parent / "900"
    (tmp_path / "other" / "model").mkdir()
    (tmp_path / "other" / "model" / "config.json").write_text("{}")
    assert hub.resolve(tmp_path / "other") == tmp_path / "other" / "model"


def test_config_and_companions_of_a_run(tmp_path, monkeypatch):
    step = make_run(tmp_path / "run", "5") / "checkpoints" / "5"
    expected = {"model_type": "opt", "vocab_size": 48, "architectures": ["OPTForCausalLM"]}
    assert hub.read_config(step) == expected
    assert hub.companion_directories(step) == (step, tmp_path / "run" / "tokenizer")
    monkeypatch.chdir(step)
    assert hub.read_config(".") == expected
    assert hub.companion_directories(".") == (Path("."), tmp_path / "run" / "tokenizer")
    for content, message in (("{", "is not valid JSON"), ("{}", "has no object 'model'"), ("[]", "holds a list")):
        (tmp_path / "run" / "run.json").write_text(content)
        with pytest.raises(ValueError, match=f"run.json {message}"):
            hub.read_config(step)
    (step / "config.json").write_text('{"a": 1}')  # its own one counts
    assert hub.read_config(step) == {"a": 1}
    assert hub.companion_directories(step) == (step,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"\xff", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"3", "config.json holds a int, not a JSON object"),
    ],
)
def test_read_config(tmp_path, content, message):
    with pytest.raises(FileNotFoundError, match="no OPT configuration at .*config.json"):
        hub.read_config(tmp_path)
    assert hub.companion_directories(tmp_path) == (tmp_path,)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        hub.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 48, "other": [1]}')
    assert hub.read_config(tmp_path) == {"vocab_size": 48, "other": [1]}


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "../x/y", "a/b/c", "~/nowhere", "", "a b", "a/../b"])
def test_names_that_are_not_on_the_hub_either(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        hub.resolve(name, cache_dir=tmp_path)


def test_is_orbax(tmp_path):
    assert not hub.is_orbax(tmp_path)
    (tmp_path / "params").mkdir()
    assert not hub.is_orbax(tmp_path)
    (tmp_path / "params" / "_METADATA").write_text("{}")
    assert hub.is_orbax(tmp_path)


def test_cache_without_network(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "pytorch_model.bin").write_text("weights")
    assert hub.resolve("org/name", cache_dir=tmp_path, local_files_only=True) == snapshot
    assert hub.resolve("org/name", cache_dir=tmp_path, local_files_only=True, revision=COMMIT) == snapshot
    for name, revision in (("org/other", None), ("org/name", "b" * 40)):
        with pytest.raises(FileNotFoundError, match="not available from the hub") as error:
            hub.resolve(name, cache_dir=tmp_path, local_files_only=True, revision=revision)
        assert "\n" not in str(error.value)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download of small files needs. `files`: repository -> file name -> content."""

    files: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []

    def do_GET(self):
        path = self.path.partition("?")[0]
        for repository, files in self.files.items():
            if path in (f"/api/models/{repository}", f"/api/models/{repository}/revision/main"):
                siblings = [{"rfilename": name} for name in files]
                return self.answer(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
            if path.startswith(f"/api/models/{repository}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return self.answer(json.dumps(entries).encode())
            name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/")
            if name in files:
                if self.command == "GET":
                    self.asked.append(name)
                return self.answer(files[name])
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def endpoint():
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve_elsewhere(endpoint: str, cache: Path, name: str, **options) -> subprocess.CompletedProcess:
    """In another process, because huggingface_hub reads its environment when it is imported."""
    code = f"from opt_jax import hub; print(hub.resolve({name!r}, cache_dir={str(cache)!r}, **{options!r}))"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "HF_HOME": str(cache / "home")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, cwd=Path(__file__).parents[1]
    )


def test_downloads_what_is_needed_and_no_more(tmp_path, endpoint):
    common = {"config.json": b"{}", "vocab.json": b"v", "README.md": b"r", "flax_model.msgpack": b"f"}
    torch_files = {"pytorch_model-00001-of-00001.bin": b"t", "pytorch_model.bin.index.json": b"i"}
    Hub.files = {
        "org/both": common | torch_files | {"model.safetensors": b"s", "rust_model.ot": b"o"},
        "org/torch": common | torch_files,
    }

    def resolve(name: str, **options) -> set[str]:
        Hub.asked.clear()
        done = resolve_elsewhere(endpoint, tmp_path, name, **options)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).name == COMMIT
        assert all((Path(done.stdout.strip()) / file).read_bytes() == Hub.files[name][file] for file in Hub.asked)
        return set(Hub.asked)

    assert resolve("org/both", weights=False) == {"config.json", "vocab.json"}
    assert resolve("org/both") == {"model.safetensors"}  # the others are there already
    assert resolve("org/torch") == {"config.json", "vocab.json", *torch_files}
    assert resolve("org/torch") == set()
    Hub.files = {}
    assert resolve_elsewhere(endpoint, tmp_path, "org/torch").returncode == 0  # gone from the hub, but cached
    assert resolve_elsewhere(endpoint, tmp_path, "org/torch", local_files_only=True).returncode == 0
    missing = resolve_elsewhere(endpoint, tmp_path, "org/nothing")
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith("FileNotFoundError: no directory org/nothing, and not available")
