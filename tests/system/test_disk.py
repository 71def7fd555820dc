"""An error of the operating system is one line, and an earlier checkpoint stays usable."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from support.processes import largest_file

from opt_jax import cli
from opt_jax.system.disk import disk_errors, error_line, warning_lines, without_tracebacks
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.files import Lines
from opt_jax.training.step import TrainState

FULL = "No space left on device"


def as_said(path, error: BaseException, nbytes: int | None = None) -> str:
    with pytest.raises(OSError) as failed, disk_errors(path, nbytes):
        raise error
    assert error_line(failed.value).count("\n") == 0
    return error_line(failed.value)


def system(number: int, filename: object = None) -> OSError:
    return OSError(number, os.strerror(number), *([] if filename is None else [str(filename)]))


def test_each_form_of_a_refusal_names_path_bytes_and_advice(tmp_path):
    path = tmp_path / "run" / "8"
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = system(errno.ENOSPC)
    tensorstore = ValueError(
        f"RESOURCE_EXHAUSTED: Error writing \"x\": {FULL} [os_error_code='28'] [source_locations=1]"
    )
    older = ValueError(f"UNKNOWN: Error writing: [OS error 28: ENOSPC {FULL}]")
    temporary = system(errno.ENOSPC, f"{path}.orbax-checkpoint-tmp/_METADATA")
    profiler = RuntimeError(f"RESOURCE_EXHAUSTED: {path}/plugins/profile/vm.xplane.pb; {FULL}")
    for error in (system(errno.ENOSPC), wrapped, tensorstore, older, temporary, profiler):
        said = as_said(path, error, 1_234_567)
        assert said.startswith(f"{path}: {FULL} (1,234,567 bytes are needed, "), said
        assert said.endswith(" are free): make room there, then start the same command again"), said
    assert as_said(path, system(errno.EMFILE, "/other")).startswith("/other: Too many open files: raise the limit with")
    for number, words in (
        (errno.EDQUOT, "(5 bytes are needed): make"),
        (errno.EFBIG, "`ulimit -f`"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "permissions"),
        (errno.ENOENT, "was removed"),
        (errno.ENOTDIR, "was removed"),
        (errno.EIO, "failing disk"),
        (errno.ENAMETOOLONG, "shorter name"),
    ):
        said = as_said(path, system(number), 5)
        assert said.startswith(f"{path}: {os.strerror(number)}") and words in said, said


def test_other_errors_pass_and_the_innermost_explanation_stays(tmp_path):
    for error in (ValueError("a bad value"), FileExistsError("ours")):
        with pytest.raises(type(error), match=str(error)), disk_errors(tmp_path):
            raise error
    with pytest.raises(OSError) as failed, disk_errors(tmp_path), disk_errors(tmp_path / "file", 7):
        raise system(errno.ENOSPC)
    assert error_line(failed.value).startswith(f"{tmp_path / 'file'}: {FULL} (7 bytes are needed, ")


def test_an_error_without_a_path_is_one_line_too(tmp_path, monkeypatch):
    assert error_line(system(errno.EMFILE)).startswith("Too many open files: raise the limit with `ulimit -n`")
    assert error_line(system(errno.EROFS, tmp_path)).startswith(f"{tmp_path}: Read-only file system: make it writable")
    assert error_line(system(errno.ENOENT, "mistyped")) == "mistyped: No such file or directory"
    assert error_line(system(errno.ENOENT)) == os.strerror(errno.ENOENT)
    (gone := tmp_path / "gone").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(gone)
        gone.rmdir()
        with pytest.raises(FileNotFoundError) as error:
            os.getcwd()
        assert error_line(error.value) == "the current directory: No such file or directory"
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:  # closing it would fail if the unwritten text were not dropped
        monkeypatch.setattr("sys.stdout", full)
        full.write("text")
        with pytest.raises(OSError) as failed:
            full.flush()
        assert error_line(failed.value).startswith(f"standard output: {FULL}: make room")
    with pytest.raises(OSError) as failed, contextlib.closing(Lines("/dev/full")) as lines:  # type: ignore[arg-type]
        lines.write('{"step": 1}\n')
    assert error_line(failed.value).startswith(f"/dev/full: {FULL} (")


def state_of(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jnp.arange(20_000.0) + step}, {"m": jnp.ones(5)}, jnp.bool(False))


def open_checkpoints(directory) -> Checkpoints:
    return Checkpoints(directory, keep=5, data_state=lambda step: {"step": step})


def newest(checkpoints: Checkpoints) -> tuple[int, TrainState]:
    state = state_of(0)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return checkpoints.restore_newest(jax.eval_shape(lambda: state), shardings, pytest.fail)[:2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_warning_that_cannot_be_written_ends_nothing(monkeypatch, capsys):
    with warning_lines("x: "):
        warnings.simplefilter("always")
        warnings.warn("first\nsecond", stacklevel=1)
    assert capsys.readouterr().err == "x: warning: first second\n"
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", full)
    with warning_lines():
        warnings.simplefilter("always")
        warnings.warn("lost", stacklevel=1)
    with pytest.raises(OSError, match=FULL):  # what is still in its buffer
        full.close()


def test_a_checkpoint_that_does_not_fit_is_an_error_and_leaves_the_one_before(tmp_path, caplog, capfd):
    directory = tmp_path / "checkpoints"
    checkpoints = open_checkpoints(directory)
    checkpoints.save(3, state_of(3))
    checkpoints._wait()
    with without_tracebacks(), largest_file(30_000), pytest.raises(OSError) as failed:
        checkpoints.save(4, state_of(4))
        checkpoints.close()
    said = error_line(failed.value)
    assert said.startswith(f"{directory / '4'}: File too large (80,025 bytes are needed): the file system or"), said
    assert "Traceback" not in caplog.text and "Event loop" not in capfd.readouterr().err
    with open_checkpoints(directory) as checkpoints:
        assert newest(checkpoints)[0] == 3
        checkpoints.save(4, state_of(4))
    with open_checkpoints(directory) as checkpoints:
        step, state = newest(checkpoints)
        assert step == 4
        jax.tree.map(np.testing.assert_array_equal, state, state_of(4))

    checkpoints = open_checkpoints(directory)
    shutil.rmtree(directory)
    directory.write_bytes(b"")  # a file, because root could write to a read-only directory
    with without_tracebacks(), pytest.raises(OSError) as failed:
        checkpoints.save(5, state_of(5))
        checkpoints.close()
    assert error_line(failed.value).startswith(f"{directory}: Not a directory: it, or a directory above it, was")


def test_of_a_checkpoint_whose_parts_all_fail_each_error_is_one_line(tmp_path):
    directory, said = tmp_path / "checkpoints", []
    checkpoints = open_checkpoints(directory)
    with without_tracebacks(), largest_file(100):  # too small even for the metadata of an array
        for call in (lambda: checkpoints.save(3, state_of(3)), checkpoints._wait, checkpoints.close):
            try:
                call()
            except OSError as error:  # of one part; others may fail too, in any order
                said.append(error_line(error))
    expected = f"{directory / '3'}: File too large (80,025 bytes are needed): the file system or"
    assert said and all(line.startswith(expected) for line in said), said


def test_a_file_that_is_missing_in_a_checkpoint_is_said_or_not_needed(tmp_path):
    directory = tmp_path / "checkpoints"
    with open_checkpoints(directory) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, state_of(step))
    refused = set()
    for path in sorted(path for path in (directory / "4").rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        with open_checkpoints(directory) as checkpoints:
            try:
                step, state = newest(checkpoints)
                jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
            except ValueError as error:
                refused.add(path.name)
                assert str(error).startswith(f"checkpoint {directory / '4'} is damaged: ") and "\n" not in str(error)
        path.write_bytes(content)
    assert {"_METADATA", "manifest.ocdbt", "metadata"} <= refused


def test_a_closed_stdout_is_no_other_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert error_line(system(errno.EMFILE)).startswith("Too many open files")
    cli._print("a text")


# Both write into a file which number it has: this program, and one that it starts.
TWO_PROGRAMS = """
import os, sys
from opt_jax.system.disk import keep_standard_descriptors
keep_standard_descriptors()
write = "import sys; file = open(sys.argv[1], 'a'); print(file.fileno(), file=file, flush=True)"
exec(write)
os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", write, sys.argv[1]])
"""


def test_a_closed_descriptor_is_no_file_of_ours(tmp_path):
    command = f'exec {sys.executable} -c "$0" "$1" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", command, TWO_PROGRAMS, str(tmp_path / "file")], cwd=REPOSITORY, check=True)
    assert [int(line) > 2 for line in (tmp_path / "file").read_text().splitlines()] == [True, True]
