"""A run has one start at a time. A second one is told who is running. A dead one does not block others."""

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import pytest
from etils import epath
from test_run_files import Store

import train
from opt_jax.checkpoints.hub import is_remote
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.files import LOCK, Lines, check_run_directory, write_record
from opt_jax.training.run_lock import RunLock
from opt_jax.training.step import TrainState

HOLD = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o666)
fcntl.flock(lock, fcntl.LOCK_EX)
os.write(lock, b"process 7 on elsewhere, since 2026-01-02 03:04:05+00:00 (start 12)\\n")
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A living process that holds the lock of the run in `tmp_path/run`."""
    (tmp_path / "run").mkdir()
    write_record(epath.Path(tmp_path / "run"), {})
    command = [sys.executable, "-I", "-S", "-c", HOLD, str(tmp_path / "run" / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        yield process
        process.kill()


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def test_a_second_start_is_told_who_is_there_and_writes_nothing(tmp_path, holder):
    before = content(tmp_path / "run")
    config = dict(vocab_size=304, hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=1)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=8, word_embed_proj_dim=8)))
    options = train.Options(
        output=str(tmp_path / "run"), model=str(tmp_path / "config.json"), data=("nowhere",), batch_size=8, steps=2
    )
    message = r"run is in use by process 7 on elsewhere, since 2026-01-02 03:04:05\+00:00: wait for it, end it, or"
    for begin in (
        lambda: train.main(options),
        RunLock(epath.Path(tmp_path / "run")).take,
        lambda: RunLock(epath.Path(tmp_path / "run")).take(create=False),
    ):
        with pytest.raises(FileExistsError, match=message) as error:
            begin()
        assert "\n" not in str(error.value)
    assert content(tmp_path / "run") == before and holder.poll() is None


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with RunLock(epath.Path(tmp_path / "run")) as lock:
        lock.take(create=False)
        lock.check()
        assert re.fullmatch(rf"process {os.getpid()} on \S+, since .*\n", (tmp_path / "run" / LOCK).read_text())
        with pytest.raises(FileExistsError, match=f"in use by process {os.getpid()} on "):
            RunLock(epath.Path(tmp_path / "run")).take()
    assert os.listdir(tmp_path / "run") == ["run.json"]


@pytest.mark.parametrize("text", [b"", b"\xff\0", b"\x1b[2J", b"a\nb (start 3)\n" * 10**5])
def test_whatever_the_lock_holds_the_error_is_one_short_line(tmp_path, text):
    with RunLock(epath.Path(tmp_path)) as lock:
        lock.take()
        (tmp_path / LOCK).write_bytes(text)
        with pytest.raises(FileExistsError, match="is in use by") as error:
            RunLock(epath.Path(tmp_path)).take()
        assert str(error.value).isprintable() and len(str(error.value)) < 1000
    assert (tmp_path / LOCK).read_bytes() == text  # it is not removed, because it is no longer ours


def test_without_create_a_new_directory_stays_as_it_is(tmp_path):
    with RunLock(epath.Path(tmp_path / "run")) as lock:
        lock.take(create=False)
        lock.check()
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_vanishes_is_said(tmp_path):
    with RunLock(epath.Path(tmp_path / "run")) as lock:
        lock.take()
        shutil.move(tmp_path / "run", tmp_path / "moved")
        with pytest.raises(FileNotFoundError, match=f"^{tmp_path / 'run'} was removed or moved during the run, so "):
            lock.check()
        assert not (tmp_path / "run").exists()


def test_the_lock_is_no_link(tmp_path):
    (tmp_path / LOCK).symlink_to("elsewhere")
    for begin in (RunLock(epath.Path(tmp_path)).take, lambda: check_run_directory(epath.Path(tmp_path))):
        with pytest.raises(FileExistsError, match="is a symbolic link to elsewhere"):
            begin()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("replace", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_is_refused_and_ends_the_run_that_had_it(tmp_path, replace):
    with RunLock(epath.Path(tmp_path)) as lock:
        lock.take()
        (tmp_path / LOCK).unlink()
        replace(tmp_path / LOCK)
        for use in (lock.check, RunLock(epath.Path(tmp_path)).take):
            with ThreadPoolExecutor(1) as thread, pytest.raises(FileExistsError, match=LOCK):
                thread.submit(use).result(timeout=20)
    assert (tmp_path / LOCK).exists()  # it is not removed


@pytest.fixture(params=["a mount without locks", "a store"])
def unlocked(request, tmp_path, monkeypatch):
    """A run directory on a file system without locks."""
    if request.param == "a store":
        fsspec.register_implementation("s3", Store, clobber=True)
        Store.store.clear()
        Store.pseudo_dirs[:] = [""]
        return epath.Path("s3://bucket/run")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    return epath.Path(tmp_path)


def test_without_locks_the_newest_start_ends_the_older_before_its_next_write(unlocked, tmp_path):
    state = TrainState(jnp.int32(1), {"w": jnp.ones(3)}, {"m": jnp.ones(3)}, jnp.bool(False))  # type: ignore
    with RunLock(unlocked) as newer:
        with RunLock(unlocked) as older:
            older.take()
            lines = Lines(unlocked / "metrics.jsonl", older.check)
            lines.write("1\n")
            lines.flush()
            newer.take()
            gone = f"run|{tmp_path} is no longer this process's: process {os.getpid()} on .* has taken it over"
            with pytest.raises(FileExistsError, match=gone):
                lines.write("2\n")
                lines.flush()
            with suppress(FileExistsError):  # lines in a store are written once more at the end
                lines.close()
            with Checkpoints(tmp_path / "checkpoints", keep=1, before_write=older.check) as checkpoints:
                with pytest.raises(FileExistsError, match=gone), jax.transfer_guard("disallow"):
                    checkpoints.save(1, state)
            assert (unlocked / "metrics.jsonl").read_text() == "1\n" and not any((tmp_path / "checkpoints").iterdir())
        newer.check()  # the older start has not removed the lock
        (unlocked / LOCK).unlink()
        with pytest.raises(FileExistsError, match=rf"no longer this process's: {re.escape(LOCK)} is gone from it"):
            newer.check()
    with RunLock(unlocked) as last:
        last.take()
    assert (unlocked / LOCK).exists() == is_remote(unlocked)  # in a store an older start may still read it
