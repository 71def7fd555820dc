"""The wheel holds the commands of `opt-jax`. They run without a checkout, and beside foreign modules of their names."""

import subprocess
import sys
import zipfile

import pytest
from conftest import REPOSITORY
from support.processes import environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place / "dist")]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = (place / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    for name in ("convert", "train"):
        (place / "site" / f"{name}.py").write_text("raise SystemExit('a foreign module')\n")
    return place / "site"


@pytest.mark.slow
def test_the_wheel_holds_the_package_only(installed):
    names = {path.name for path in installed.iterdir()} - {"convert.py", "train.py"}
    assert {name.partition("-")[0] for name in names} == {"opt_jax"}
    parts = (
        "convert/__main__.py",
        "train.py",
        "tiny/config.json",
        "py.typed",
        "training/tasks/squad.py",
        "model/native_int8.c",
    )
    assert all((installed / "opt_jax" / part).is_file() for part in parts)


COMMANDS = ("generate", "convert", "train", "eval", "tokenize", "plot")
HELP = """
import contextlib, sys
from opt_jax.__main__ import main
for command in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
"""


@pytest.mark.slow
def test_every_command_starts_from_the_wheel(installed, tmp_path):
    env = environment(PYTHONPATH=str(installed), START="fresh", NO_COLOR="1")
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert all(f"usage: opt-jax {command}" in done.stdout for command in COMMANDS), done.stderr


@pytest.mark.slow
def test_a_conversion_and_a_plan_of_training_run_from_the_wheel(installed, tmp_path):
    env = environment(PYTHONPATH=str(installed), START="fresh")
    convert = [sys.executable, "-m", "opt_jax", "convert", "tiny", "out", "--quiet"]
    done = subprocess.run(convert, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "config.json").is_file(), done.stderr
    train = [sys.executable, "-m", "opt_jax", "train", "--output", "run", "--data", "nowhere"]
    done = subprocess.run(train, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "opt-jax train: error: nowhere: no such file or directory\n")
