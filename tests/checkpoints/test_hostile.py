"""Over a thousand damaged and malicious checkpoints through `python -m convert`: each ends in one line of error.

They run in one child process. An audit hook forbids it what a checkpoint could ask for, and its memory is bounded. By
hand:
`PYTHONPATH=.:tests python tests/checkpoints/test_hostile.py DIRECTORY [PART OF A CASE'S NAME [HANDFUL]]`.
Without --exhaustive the test runs a handful of each kind (see `kind`).
"""

import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from support import hostile_files, hostile_flax, hostile_pickles, hostile_weights, metaseq_files
from support.hf_files import hf_weights, write_hf
from support.hostile_files import CONFIG, EITHER, HARMLESS, REFUSED, Case
from support.processes import environment

FORMS = ("safetensors", "safetensors-sharded", "bin", "bin-sharded", "flax", "flax-sharded")
MEMORY = 256 << 20  # the child's peak may grow by this: pieces of arrays and parsed headers
SECONDS = 60  # for one case: far more than it needs
LINE = 2000  # characters
HANDFUL = 3  # cases of each kind, without --exhaustive

# What no checkpoint may make the converter do. Its own imports happen while the valid checkpoints are converted.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.putenv",
    "subprocess.",
    "pty.",
    "pickle.find_class",
    "marshal.",
    "code.",
    "function.",
    "exec",
    "compile",
    "import",
    "ctypes.",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "urllib.",
    "webbrowser.",
    "ftplib.",
    "smtplib.",
    "http.",
    "sys.addaudithook",
    "builtins.input",
    "cpython.run",
)


@pytest.mark.slow
def test_hostile_checkpoints(tmp_path, pytestconfig):
    exhaustive = pytestconfig.getoption("--exhaustive")
    warned = ["-W", "error", "-W", "default::UserWarning"]
    command = [sys.executable, *warned, __file__, str(tmp_path), "", "0" if exhaustive else str(HANDFUL)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=os.pathsep.join(map(str, [REPOSITORY, REPOSITORY / "tests"]))),
        timeout=600,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]  # threads print their tracebacks to stderr
    report = json.loads(done.stdout)
    assert not report["failures"], "\n".join(report["failures"][:20])
    assert sum(report["outcomes"].values()) >= (1000 if exhaustive else 500)
    assert report["outcomes"]["refused"] >= (800 if exhaustive else 400) and report["outcomes"]["converted"] >= 20
    assert min(report["kinds"].values()) >= (20 if exhaustive else 8)
    assert not any((tmp_path / name).exists() for name in ("CANARY", "case")), "left behind"


def all_cases(bases: dict[str, dict[str, bytes]], weights) -> Iterator[Case]:
    """All cases. `bases`: form -> the files of a valid checkpoint of that form, which holds `weights`."""
    state = hostile_pickles.state_dict(weights)
    yield from hostile_weights.safetensors_cases(bases["safetensors"])
    yield from hostile_flax.flax_cases(bases["flax"])
    for form in ("safetensors-sharded", "bin-sharded", "flax-sharded"):
        yield from hostile_files.index_cases(form, bases[form])
    yield from hostile_files.config_cases()
    yield from hostile_weights.zip_cases(bases["bin"])
    yield from hostile_pickles.tensor_cases(state)
    yield from hostile_pickles.bomb_cases(state)
    yield from hostile_pickles.code_cases(state)
    yield from hostile_pickles.metaseq_cases(weights)
    yield from hostile_files.random_damage("metaseq", bases["metaseq"], 25, 6)
    for seed, form in enumerate(FORMS):
        yield from hostile_files.random_damage(form, bases[form], 25, seed)
    unused = ("ocdbt.process_", "commit_success", "_CHECKPOINT_METADATA")
    used = {name: content for name, content in bases["orbax"].items() if not any(part in name for part in unused)}
    yield from hostile_files.random_damage("orbax", used, 40, 5, says_file=False)
    for i, content in enumerate((b"", b"{}", b"null", b"[]", b"[" * 200_000, b'"tree_metadata"', b"\xff", None)):
        yield Case(f"orbax/metadata{i}", "orbax", {"params/_METADATA": content}, EITHER if i == 5 else REFUSED)


def kind(name: str) -> str:
    """The kind of a case: its name without a number, a value, the name of a global, or the file that is damaged."""
    label = re.split(r" |=|\d+$", name)[0]
    return f"{label.partition('/')[0]}/{label.rpartition('/')[2]}"


def handful(names: list[str], count: int) -> set[int]:
    """Indices into `names`: up to `count` of each kind, drawn with a fixed seed."""
    kinds: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        kinds.setdefault(kind(name), []).append(i)
    rng = random.Random(0)
    return {i for places in kinds.values() for i in rng.sample(places, min(count, len(places)))}


# The child ------------------------------------------------------------------------------------------------------------


class Watch:
    """An audit hook that records and forbids what no checkpoint may cause. Files may be opened in `root` only."""

    def __init__(self, root: Path) -> None:
        self.root, self.armed, self.seen = str(root.resolve()), False, []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        if event in ("open", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"):
            bad = isinstance(args[0], (str, Path)) and not os.path.abspath(args[0]).startswith(self.root + "/case")
        else:
            bad = event.startswith(FORBIDDEN) and event != "code.__new__"
        if bad:
            self.seen.append(f"{event}{args!r}"[:200])
            raise RuntimeError(f"forbidden: {event}")

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.seen, self.armed = [], True
        try:
            yield
        finally:
            self.armed = False


class Runner:
    def __init__(self, root: Path) -> None:
        from convert.__main__ import main

        self.main, self.root, self.watch = main, root, Watch(root)
        self.bases = root / "bases"
        self.expected: dict = {}

    def make(self) -> None:
        """Write the valid checkpoints and convert each, so that all modules are imported and all threads run."""
        weights = hf_weights(CONFIG)
        for form in FORMS:
            write_hf(self.bases / form, CONFIG, weights, form)
        metaseq_files.write(self.bases / "metaseq", hostile_pickles.metaseq_contents(weights))
        shutil.copy(self.bases / "safetensors" / "model.safetensors", self.root / "secret.safetensors")
        for form in (*FORMS, "metaseq"):
            done = self.convert(self.bases / form, self.root / "out" / form)
            assert done[0] == 0, done
        self.expected = described(self.root / "out" / "bin")
        shutil.copytree(self.root / "out" / "safetensors", self.bases / "orbax")
        assert self.convert(self.bases / "orbax", self.root / "out" / "orbax")[0] == 0

    def files(self, form: str) -> dict[str, bytes]:
        base = self.bases / form
        return {str(p.relative_to(base)): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()}

    def cases(self) -> Iterator[Case]:
        yield from all_cases({form: self.files(form) for form in (*FORMS, "metaseq", "orbax")}, hf_weights(CONFIG))

    def convert(self, source: Path, destination: Path) -> tuple[int | BaseException, str]:
        """Returns (exit code or exception, stderr)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = self.main([str(source), str(destination)])
            except BaseException as e:
                code = e
        return code, err.getvalue()

    def run(self, case: Case) -> tuple[str, str | None]:
        """Returns ("converted" or "refused", what is wrong with that or None)."""
        directory = self.root / "case"
        shutil.copytree(self.bases / case.form, directory / "src")
        for name, content in case.changes.items():
            (directory / "src" / name).unlink(missing_ok=True)
            if isinstance(content, bytes):
                (directory / "src" / name).write_bytes(content)
            elif content is not None:
                (directory / "src" / name).symlink_to(content)
        signal.alarm(SECONDS)
        with self.watch():
            code, err = self.convert(directory / "src", directory / "dst")
        signal.alarm(0)
        wrong = self.judge(case, code, err, directory)
        shutil.rmtree(directory)
        return "converted" if code == 0 else "refused", wrong

    def judge(self, case: Case, code: int | BaseException, err: str, directory: Path) -> str | None:
        left = sorted(p.name for p in directory.iterdir())
        if self.watch.seen:
            return f"it did {self.watch.seen}"
        if (self.root / "CANARY").exists() or Path("CANARY").exists():
            return "foreign code ran"
        if code == 0:
            if case.outcome == REFUSED:
                return "it was converted"
            noted = re.fullmatch(r"(warning: [^\n]*: (?:without effect|left out): [^\n]*\n)*", err)
            if not noted or left != ["dst", "src"]:
                return f"stderr {err[:500]!r}, files {left}"
            arrays = described(directory / "dst")
            if case.form == "orbax" and values(directory / "dst") != values(self.bases / "orbax"):
                return "converted, but to other values: its chunks have checksums"
            return None if arrays == self.expected else f"converted, but to {arrays}"
        if isinstance(code, BaseException):
            return "".join(traceback.format_exception(code))[-800:]
        if code != 1:
            return f"exit code {code}"
        if left != ["src"]:
            return f"left behind: {left}"
        if not (err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable() and len(err) < LINE):
            return f"not one plain line: {err[:500]!r}"
        missing = [what for what in (str(directory / "src"), *case.says) if what not in err]
        if missing or case.outcome == HARMLESS:
            return f"{err.strip()!r} lacks {missing}"
        return None


def described(directory: Path) -> dict:
    from opt_jax.checkpoints import orbax

    arrays = orbax.open_arrays(directory / "params")
    return {path: (array.shape, array.dtype.name) for path, array in arrays.items()}


def values(directory: Path) -> dict:
    from opt_jax.checkpoints import orbax

    return {path: array.load().tobytes() for path, array in orbax.open_arrays(directory / "params").items()}


def child(root: Path, part: str = "", count: str = "0") -> None:
    os.chdir(root)
    runner = Runner(root)
    runner.make()
    names = [case.name for case in runner.cases()]  # names alone: all cases at once would take too much memory
    chosen = handful(names, int(count) or len(names))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("it hangs")))
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), resource.getrlimit(resource.RLIMIT_AS)[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failures, outcomes, kinds = [], Counter(), Counter()
    for i, case in enumerate(runner.cases()):
        if i in chosen and part in case.name:
            start = time.process_time()
            outcome, wrong = runner.run(case)
            outcomes[outcome] += 1
            kinds[case.name.partition("/")[0]] += 1
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            if grown > MEMORY >> 10:
                wrong, peak = f"{wrong or 'it'} took {grown >> 10} MB", peak + grown
            if wrong:
                failures.append(f"{case.name}: {wrong}")
            if part:
                print(f"{case.name}: {outcome}, {time.process_time() - start:.2f} s", file=sys.stderr)
    print(json.dumps({"failures": failures, "outcomes": outcomes, "kinds": kinds}, indent=2))


if __name__ == "__main__":
    child(Path(sys.argv[1]), *sys.argv[2:])
