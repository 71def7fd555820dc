"""Progress of a conversion: a bar on a terminal, lines elsewhere, no output with --quiet."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convert import progress

ROOT = Path(__file__).parents[2]


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress.Report(4_000_000_000) as report:
        report("model.decoder.layers.3.fc1.kernel", 1_000_000_000)
        report("model.decoder.layers.3.fc2.kernel", 3_000_000_000)
    lines = capsys.readouterr().err.splitlines()
    for line, done in zip(lines, ("1.00", "4.00"), strict=True):
        pattern = rf"{done} of 4.00 GB, [0-9.]+ GB/s, [0-9]+:[0-9][0-9] left, model\.decoder\.layers\.3\.fc[12]\.kernel"
        assert re.fullmatch(pattern, line)
    with progress.Report(4, quiet=True) as report:
        report("x", 4)
    assert capsys.readouterr().err == ""


def test_lines_are_few(capsys):
    with progress.Report(1000) as report:
        for _ in range(1000):
            report("x", 1)
    assert capsys.readouterr().err == ""  # the first line comes after ten seconds


def on_terminal(*args: str) -> str:
    """Run the command with a terminal as stderr. Returns what it writes there."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "convert", *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            written += os.read(ours, 1 << 16)
        except OSError:  # Linux: the program has closed its side
            break
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


@pytest.mark.slow
def test_a_bar_on_a_terminal(tmp_path):
    shown = on_terminal("tiny", str(tmp_path / "out"))
    assert re.search(r"[0-9.]+/7\.1 MB +\S+ .B/s", shown), shown
    assert re.search(r"layers\.[0-9]|embed_", shown), shown  # the tensor
    assert re.search(r"-:--:--|[0-9]:[0-9]{2}:[0-9]{2}", shown), shown  # the time left
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()) <= 80
    assert on_terminal("tiny", str(tmp_path / "quiet"), "--quiet") == ""
