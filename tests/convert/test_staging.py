"""`to-hf` by several workers: `--shard-of i/n`, and the processes of a `jax.distributed` job."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hf_files import TINY, hf_weights, write_hf
from support.hf_output import expected, files_of, hidden, read, write
from support.processes import environment, free_address, outcomes, start

from convert import staging, to_hf
from convert.source import open_directory

ROOT = Path(__file__).parents[2]
ENVIRONMENT = environment()


@pytest.mark.slow
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
@pytest.mark.parametrize("size", ["1KB", "5GB"])
def test_workers_in_any_order(tmp_path, order, size):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    (source / "vocab.json").write_text("{}")
    expected_directory = write(source, tmp_path / "expected", max_shard_size=size)
    out = tmp_path / "out"
    for i in order:
        if size == "1KB":
            assert not out.exists()
        if not out.exists():  # of a single file, the worker that writes it completes the directory
            write(source, out, max_shard_size=size, shard_of=(i, 3))
    assert files_of(out) == files_of(expected_directory)
    assert hidden(tmp_path) == [] and to_hf.unfinished(out) == []


def test_workers_at_once(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    expected_directory, out = write(source, tmp_path / "expected", max_shard_size="1KB"), tmp_path / "out"
    errors: list[Exception] = []

    def work(i: int) -> None:
        try:
            write(source, out, max_shard_size="1KB", shard_of=(i, 4))
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and files_of(out) == files_of(expected_directory) and hidden(tmp_path) == []


def test_a_worker_run_again_writes_only_what_is_missing(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    out, place = tmp_path / "out", tmp_path / ".out.shards"
    options = dict(max_shard_size="1KB")
    write(source, out, **options, shard_of=(1, 3))
    n = len(to_hf._Writer(open_directory(source), None, 1000, print).files)
    files = sorted(p.name for p in place.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1, 3)]
    assert set(to_hf.unfinished(out)).isdisjoint(files) and len(to_hf.unfinished(out)) == n - len(files)
    inodes = {p.name: p.stat().st_ino for p in place.glob("*.safetensors")}
    (place / files[0]).write_bytes(b"cut short")
    (place / f"{files[0]}.opt-jax-{0:032x}.part").write_bytes(b"of a worker that was killed")
    reports: list[str] = []
    write(source, out, **options, shard_of=(1, 3), progress=lambda path, nbytes: reports.append(path))
    assert reports == ["model.decoder.embed_tokens.embedding"]
    assert {p.name for p in place.glob("*.safetensors") if p.stat().st_ino == inodes[p.name]} >= set(files[1:])
    assert list(place.glob("*.part")) == []
    write(source, out, **options, shard_of=(1, 1))  # another number of workers
    assert read(out) == expected(hf_weights(TINY)) and hidden(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from convert import to_hf
from convert.source import open_directory
count = int(sys.argv[3])
def progress(path, nbytes):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
source, out = Path(sys.argv[1]), Path(sys.argv[2])
to_hf.convert(open_directory(source), out, max_shard_size="1KB", shard_of=(1, 2), progress=progress)
"""


@pytest.mark.slow
def test_a_killed_worker(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    out, place = tmp_path / "out", tmp_path / ".out.shards"
    command = [sys.executable, "-c", KILLED, str(source), str(out), "9"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    assert len(list(place.glob("*.part"))) == 1 and list(place.glob("*.safetensors")) and not out.exists()
    write(source, out, max_shard_size="1KB", shard_of=(1, 2))
    assert list(place.glob("*.part")) == [] and not out.exists()
    write(source, out, max_shard_size="1KB", shard_of=(2, 2))
    assert read(out) == expected(hf_weights(TINY)) and hidden(tmp_path) == []


def test_a_run_of_its_own_supersedes_killed_workers(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    write(source, tmp_path / "out", max_shard_size="1KB", shard_of=(1, 2))
    assert hidden(tmp_path) == [".out.shards"]
    write(source, tmp_path / "out")
    assert read(tmp_path / "out") == expected(hf_weights(TINY)) and hidden(tmp_path) == []


def test_the_same_file_is_not_written_twice_at_once(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))

    def intrude(path: str, nbytes: int) -> None:
        if path.endswith("embed_tokens.embedding"):
            with pytest.raises(FileExistsError, match="another process is writing this file"):
                write(source, tmp_path / "out", shard_of=(1, 1))

    write(source, tmp_path / "out", shard_of=(1, 1), progress=intrude)
    assert read(tmp_path / "out") == expected(hf_weights(TINY))


def other_weights(source: Path) -> dict:
    """Rewrite the checkpoint with another bias."""
    weights = hf_weights(TINY)
    weights["model.decoder.layers.1.fc1.bias"][3] += 1
    write_hf(source, TINY, weights)
    return {}


def other_config(source: Path) -> dict:
    write_hf(source, TINY | {"dropout": 0.5}, hf_weights(TINY))
    return {}


def other_place(source: Path) -> dict:
    write_hf(source.with_name("copy"), TINY, hf_weights(TINY))
    return {"source": source.with_name("copy")}


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda source: {"max_shard_size": "2KB"}, "max_shard_size (1000, not 2000)"),
        (lambda source: {"dtype": "float16"}, "dtype (None, not float16)"),
        (other_weights, "content"),
        (other_config, "content"),
        (other_place, "source"),
    ],
)
def test_workers_of_different_minds(tmp_path, change: Callable, key):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    write(source, tmp_path / "out", max_shard_size="1KB", shard_of=(1, 2))
    before = files_of(tmp_path / ".out.shards")
    options = {"source": source, "max_shard_size": "1KB"} | change(source)
    with pytest.raises(ValueError, match=r"\.out\.shards was begun with another") as refused:
        write(options.pop("source"), tmp_path / "out", **options, shard_of=(2, 2))
    assert f"begun with another {key}" in str(refused.value)
    assert files_of(tmp_path / ".out.shards") == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard_of", [(0, 3), (4, 3), (-1, 3), (1, 0)])
def test_impossible_parts(tmp_path, shard_of):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    with pytest.raises(ValueError, match="--shard-of .*: i/n needs 1 <= i <= n"):
        write(source, tmp_path / "out", shard_of=shard_of)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', None])
def test_a_damaged_plan(tmp_path, content):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    write(source, tmp_path / "out", max_shard_size="1KB", shard_of=(1, 2))
    plan = tmp_path / ".out.shards" / "plan.json"
    plan.unlink()
    os.mkfifo(plan) if content is None else plan.write_text(content)
    with pytest.raises(ValueError, match="plan.json is damaged"):
        write(source, tmp_path / "out", max_shard_size="1KB", shard_of=(2, 2))


def test_parts_that_were_removed_meanwhile(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    place = staging.directory_of(tmp_path / "out")

    def remove(path: str, nbytes: int) -> None:
        for file in place.iterdir():
            if file.suffix == ".json":
                file.unlink()

    with pytest.raises(OSError, match="was removed while"):
        write(source, tmp_path / "out", shard_of=(1, 1), progress=remove)
    assert hidden(tmp_path) == []


JOB = """
import json, sys
from pathlib import Path
import jax
address, k, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(address, 2, k)
from convert import to_hf
from convert.source import open_directory
def attempt(source, destination, **options):
    try:
        to_hf.convert(open_directory(folder / source), folder / destination, **options)
        return None
    except Exception as e:
        return str(e)
results = [
    attempt("hf", "out", max_shard_size="1KB"),
    attempt("hf", "out"),
    attempt("large", "half", dtype="float16", max_shard_size="1KB"),
    attempt("hf", "begun", max_shard_size="1KB"),
    attempt("hf", "other", shard_of=(1, 2)),
]
(folder / f"results{k}.json").write_text(json.dumps(results))
"""


@pytest.mark.slow
def test_a_distributed_job(tmp_path):
    """Each process writes its part. An error in one ends both. A job goes on from what a killed one has left."""
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    too_large = hf_weights(TINY)
    too_large["model.decoder.final_layer_norm.bias"][:] = 1e30  # in the second file: process 1 finds it
    write_hf(tmp_path / "large", TINY, too_large)
    write(source, tmp_path / "begun", max_shard_size="2KB", shard_of=(1, 2))
    command = [sys.executable, "-c", JOB, free_address()]
    done = outcomes([start([*command, k, str(tmp_path)]) for k in "01"])
    assert [code for code, *_ in done] == [0, 0], done
    for k in (0, 1):
        fine, exists, overflow, begun, shard_of = json.loads((tmp_path / f"results{k}.json").read_text())
        assert fine is None and begun is None
        assert ("--overwrite" if k == 0 else "process 0 failed") in exists
        assert ("final_layer_norm.bias has values" if k == 1 else "process 1 failed") in overflow
        assert "divides the files itself" in shard_of
    expected_files = files_of(write(source, tmp_path / "expected", max_shard_size="1KB"))
    assert files_of(tmp_path / "out") == expected_files == files_of(tmp_path / "begun")
    assert not (tmp_path / "half").exists() and not (tmp_path / "other").exists() and hidden(tmp_path) == []
