"""Runs the cases of `test_fuzz.py` in a process of its own, which may crash, and judges the outcomes. Not a test.

The process is started once, and again after a crash. It reads cases from its standard input, and answers with what is
wrong with each outcome: None, or a line.
"""

import os
import pickle
import re
import resource
import select
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.fuzz_checkpoints import Adapter, Flax, Model, Quantized, Training
from support.fuzz_targets import Arrays, Config, Generation, Hub, Target, Tokenizers

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 60  # for one case: far more than it needs
CPU_SECONDS = 10
MEMORY = 256 << 20  # the peak may grow by this, as in test_hostile.py
LINE = 2000  # characters of a message
TARGETS = (
    Config,
    Tokenizers,
    Model,
    Flax,
    Adapter,
    Quantized,
    Training,
    Arrays,
    Generation,
    Hub,
)  # Arrays and Generation read Tokenizers' files
ERRORS = (
    ValueError,
    OSError,
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)


class Worker:
    """A handle of the process, and a context manager.

    Attributes:
      bases: target -> the valid content of each of its files.
      outcomes: target -> outcome -> count.
    """

    def __init__(self, root: Path, env: Mapping[str, str]):
        self._root, self._env, self.outcomes = root, env, {}
        self._running, self._log = False, open(root.with_suffix(".log"), "a+b")
        self._start()

    def _start(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir()
        self._log.seek(0)
        self._log.truncate(0)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "support.fuzz_worker", str(self._root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**self._env, "RUST_BACKTRACE": "0", "PYTHONPATH": os.pathsep.join(map(str, [TESTS.parent, TESTS]))},
        )
        self._running = True
        try:
            self.bases: dict[str, dict[str, bytes]] = self._answer(10 * SECONDS)
        except (EOFError, OSError) as e:
            code, said = self._end(), self._said()
            self._log.close()
            raise RuntimeError(f"the process does not start (exit code {code}): {said}") from e

    def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError(f"no answer in {seconds} s")
        return pickle.load(self._process.stdout)

    def __call__(self, target: str, case: Any) -> str | None:
        """Run a case. Returns what is wrong with its outcome, or None."""
        if not self._running:
            self._start()
        assert self._process.stdin is not None
        try:
            pickle.dump((target, case), self._process.stdin)
            self._process.stdin.flush()
            outcome, wrong = self._answer(SECONDS)
        except (EOFError, OSError, pickle.UnpicklingError) as e:
            code = self._end()
            return f"the process is gone ({type(e).__name__}: {e}; exit code {code}): {self._said()}"
        counts = self.outcomes.setdefault(target, {})
        counts[outcome] = counts.get(outcome, 0) + 1
        return wrong or (f"it prints {said}" if (said := self._said()) else None)

    def _said(self) -> str:
        self._log.seek(0)
        said = self._log.read()[-3000:].decode(errors="replace")
        self._log.truncate(0)
        return re.sub(
            r"\nthread '.*' .*panicked at .*\n.*\nnote: .*\n", "", said
        )  # Rust prints a panic that we turn into an error

    def _end(self) -> int:
        """End the process, which may hang or have crashed. Returns its exit code."""
        process, self._running = self._process, False
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):  # unread input is lost
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
        process.stdout.close()
        return process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._running:
            self._end()
        self._log.close()


# The process ----------------------------------------------------------------------------------------------------------


class Child:
    def __init__(self, root: Path):
        self.root, self.armed, self.writes = root, False, []
        self.targets = {kind.__name__: kind(root) for kind in TARGETS}
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.armed or event not in (
            "open",
            "os.remove",
            "os.rename",
            "os.rmdir",
            "os.mkdir",
            "os.symlink",
            "os.link",
        ):
            return
        path, *more = args
        if event == "open" and (not more[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or path == os.devnull):
            return
        path = more[0] if event in ("os.rename", "os.symlink", "os.link") else path
        if isinstance(path, str | Path) and not os.path.realpath(path).startswith(f"{self.root}/"):
            self.writes.append(f"{event} {path}")

    def run(self, name: str, case: Any) -> tuple[str, str | None]:
        """Returns ("read" or "refused", what is wrong with that or None)."""
        target = self.targets[name]
        target.put(case)
        before, peak, start = self._listing(target), _peak(), time.process_time()
        error, wrong, outcome = None, None, "read"
        self.writes, self.armed = [], True
        try:
            wrong = target.read(case)
        except BaseException as e:
            error, outcome = e, "refused"
        self.armed = False
        seconds, grown = time.process_time() - start, _peak() - peak
        if error is not None:
            wrong = self._judge(target, name, error)
        if wrong is None and self._listing(target) != before:
            wrong = f"it leaves {sorted(self._listing(target) ^ before)[:5]}"
        if wrong is None and self.writes:
            wrong = f"it writes elsewhere: {self.writes[:5]}"
        if wrong is None and seconds > CPU_SECONDS:
            wrong = f"it takes {seconds:.0f} s"
        if wrong is None and grown > MEMORY >> 10:
            wrong = f"it takes {grown >> 10} MB"
        shutil.rmtree(target.directory)
        return outcome, wrong

    def _listing(self, target: Target) -> set[str]:
        paths = {*target.directory.parent.iterdir(), *target.directory.rglob("*")}
        names = {str(path.relative_to(self.root)) for path in paths} - {"home"}
        return {name for name in names if not name.startswith(tuple(f"case/{kept}" for kept in target.writes) or "\0")}

    @staticmethod
    def _judge(target: Target, name: str, error: BaseException) -> str | None:
        says = "org/model" if name == "Hub" else "" if name == "Generation" else str(target.directory)
        text = str(error)
        allowed = (ValueError,) if name == "Generation" else ERRORS
        if type(error) not in allowed:
            return "".join(traceback.format_exception(error))[-2500:]
        if not text.isprintable() or len(text) > LINE or not text:
            return f"not one plain line: {text[:300]!r} ({len(text)} characters)"
        return None if says in text else f"{text[:500]!r} does not name {says}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(root: Path) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints go to stderr, so they do not mix with answers
    os.chdir(root)

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    child = Child(root.resolve())
    bases = {name: target.files() for name, target in child.targets.items()}
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), resource.getrlimit(resource.RLIMIT_AS)[1]))
    answer(bases)
    with suppress(EOFError):
        while True:
            answer(child.run(*pickle.load(sys.stdin.buffer)))
    os._exit(0)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # a library's threads must not keep the process alive
