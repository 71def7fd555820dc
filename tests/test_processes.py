"""A forked program behaves like one that Python starts: output, exit code and signals."""

import signal
import subprocess
import sys

import pytest
from support import processes
from support.processes import environment

pytestmark = pytest.mark.slow
PROGRAMS = {
    "code": ["-c", "import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(3)", "a", "b c"],
    "message": ["-c", "import sys; print('printed'); sys.exit('one line')"],
    "uncaught": ["-c", "raise KeyError('lost')"],
    "warning": ["-W", "error", "-c", "import warnings; warnings.warn('a warning')"],
    "one ignored": [
        *("-W", "error", "-W", "ignore::DeprecationWarning"),
        *("-c", "import warnings; warnings.warn('old', DeprecationWarning); print(__name__)"),
    ],
    "at exit": ["-c", "import atexit, os; atexit.register(print, 'at exit'); print(os.getcwd(), os.environ['NEW'])"],
    "module": ["-m", "program", "word"],
    "script": ["program.py", "word"],
    "killed": ["-c", "import os, signal; print('lost'); os.kill(os.getpid(), signal.SIGKILL)"],
    "interrupted": ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_as_python_has_it(tmp_path, monkeypatch, name):
    (tmp_path / "program.py").write_text("import sys; print(__name__, sys.argv, sys.path[0], __file__)")
    words = [sys.executable, *PROGRAMS[name]]
    ends = []
    for kind in (processes.START, processes.Popen):
        monkeypatch.setattr(subprocess, "Popen", kind)
        done = subprocess.run(
            words, input="typed", capture_output=True, text=True, cwd=tmp_path, env=environment(NEW="set"), timeout=60
        )
        ends.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    assert ends[0] == ends[1]


def test_a_forked_program_is_stopped_and_waited_for():
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(100)"]
    with processes.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("changes", [{"JAX_ENABLE_X64": "1"}, {"START": "fresh"}, {"PYTHONWARNINGS": "error"}])
def test_what_the_import_reads_starts_a_new_process(changes):
    words = [sys.executable, "-c", "import sys; print('jax' in sys.modules)"]
    for kind, imported in ((changes, b"False"), ({}, b"True")):
        with processes.Popen(words, stdout=subprocess.PIPE, env=environment(**kind)) as process:
            assert process.communicate()[0].strip() == imported
