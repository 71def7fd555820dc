"""`opt-jax eval --data` as its users run it, alone, on a mesh and in a job of two processes."""

import json
import os
import re
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from support.processes import free_address, outcomes, start

from opt_jax import OPTForCausalLM, OPTTokenizer
from opt_jax.cli import main
from opt_jax.evaluation._perplexity import perplexity

TEXT = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")[:1600]
SMALL = ["--window", "64", "--stride", "48"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def expected():
    """Results of both protocols, from `perplexity`."""
    ids = OPTTokenizer.from_pretrained("tiny").encode(TEXT)
    model = OPTForCausalLM.from_pretrained("tiny")
    return [perplexity(model, ids, window=64), perplexity(model, ids, "sliding", window=64, stride=48)]


def check_results(report, expected, rel=1e-5):
    names = ("protocol", "window", "stride", "windows", "tokens", "left_out")
    for result, value in zip(report["results"], expected, strict=True):
        assert [result[name] for name in names] == [getattr(value, name) for name in names]
        for name in ("loss", "loss_stderr", "perplexity", "perplexity_stderr"):
            assert result[name] == pytest.approx(getattr(value, name), rel=rel), name
        assert result["seconds"] > 0


@pytest.mark.slow
def test_table(file, expected, capsys):
    assert main(["eval", "tiny", "--data", file, *SMALL]) == 0
    out, err = capsys.readouterr()
    head, data, _, names, *rows = out.splitlines()
    assert head.startswith("tiny: 3,554,688 parameters, float32") and err == ""
    assert data == f"{file}: 1 document, {expected[0].tokens + expected[0].left_out:,} tokens"
    assert re.split(r"\s{2,}", names)[:6] == ["protocol", "window", "stride", "windows", "tokens", "left out"]
    assert len({len(row) for row in (names, *rows)}) == 1
    for row, value in zip(rows, expected, strict=True):
        cells = re.split(r"\s{2,}", row)
        assert cells[:4] == [value.protocol, "64", str(value.stride), str(value.windows)]
        assert cells[7] == f"{value.perplexity:.3f} ± {value.perplexity_stderr:.3f}"


@pytest.mark.slow
def test_json_and_output(file, expected, capsys, tmp_path):
    output = tmp_path / "results.json"
    words = ["--protocol", "sliding", "--json", "--output", str(output), "--batch-size", "3", "--dtype", "bfloat16"]
    assert main(["eval", "tiny", "--data", file, *SMALL, *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == report
    assert report["dtype"] == "bfloat16" and report["model"] == "tiny" and report["documents"] == 1
    check_results(report, expected[1:], rel=2e-2)
    assert sorted(os.listdir(tmp_path)) == ["results.json", "text.txt"]


def test_documents_stand_behind_an_end_of_text_each(tmp_path, capsys):
    rows = [{"text": "import os\n"}, {"text": "def f(x):\n    return x\n"}]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "z.txt").write_text("class A: pass")
    np.save(tmp_path / "tokens.npy", np.arange(9))  # ids, as from `opt-jax tokenize`, and not a text
    assert main(["eval", "tiny", "--data", str(tmp_path), "--json", "--protocol", "sliding"]) == 0
    report = json.loads(capsys.readouterr().out)
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    ids = [i for text in (rows[0]["text"], rows[1]["text"], "class A: pass") for i in tokenizer.encode(text)]
    assert ids.count(2) == 3 and report["tokens"] == len(ids) and report["documents"] == 3
    scores = OPTForCausalLM.from_pretrained("tiny").score([ids])[0, 1:]
    assert report["results"][0]["loss"] == pytest.approx(-float(np.mean(scores)), rel=1e-5)
    assert report["results"][0]["loss_stderr"] is None


def test_tokens_are_no_text(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.arange(9))
    assert main(["eval", "tiny", "--data", str(tmp_path / "a.npy")]) == 1
    assert "a.npy: holds token ids: name the texts" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_on_a_mesh(file, expected, capsys):
    words = ["eval", "tiny", "--data", file, *SMALL, "--json", "--mesh", "data=2,fsdp=4"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mesh"] == dict(data=2, fsdp=4, tensor=1)
    check_results(report, expected)
    assert main([*words, "--batch-size", "4"]) == 1
    assert capsys.readouterr().err == ("opt-jax: error: batch size 4 must be a multiple of 8, the mesh's data x fsdp\n")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give one of --data .* and --tasks"),
        (["--data", "FILE", "--tasks", "sst2"], "give one of --data .* and --tasks"),
        (["--data", "FILE", "--limit", "3"], "--limit without effect: it goes with --tasks"),
        (["--data", "FILE", "--num-fewshot", "0"], "--num-fewshot without effect: it goes with --tasks"),
        (["--data", "FILE", "--include-path", "."], "--include-path without effect: it goes with --tasks"),
        (["--tasks", "sst2", "--window", "64"], "--window without effect: it goes with --data"),
        (["--tasks", "sst2", "--text-key", "body"], "--text-key without effect: it goes with --data"),
        (["--tasks", "sst2", "--log-samples"], "--log-samples without effect: say where"),
        (["--tasks", "sst2", "--limit", "0"], "--limit 0.0: must be above 0"),
        (["--tasks", "sst2", "--limit", "inf"], "--limit inf: must be above 0, and below"),
        (["--tasks", "sst2", "--limit", "1.5"], "--limit 1.5: must be a number of documents, or a share"),
        (["--tasks", "sst2", "--num-fewshot", "-1"], "--num-fewshot -1: must not be negative"),
        (["--data", ""], "--data '': the value is empty"),
        (["--data", "FILE", "--mesh", ""], "--mesh '': the value is empty"),
        (["--data", "FILE", "--protocol", "non-overlapping", "--stride", "4"], "--stride without effect"),
        (
            ["--data", "FILE", "--window", "513"],
            "window 513: it must be at least 2 and at most 512, the model's context",
        ),
        (["--data", "FILE", "--batch-size", "0"], "batch size 0 must be"),
        (["--data", "FILE", "--mesh", "rows=2"], "mesh: unknown axis 'rows'"),
        (["--data", "FILE", "--attention", "splash"], "attention splash needs a TPU"),
        (["--data", "FILE", "--output", "/no/such/place/x.json"], "--output .*: must be a file in an existing"),
        (["--data", "FILE", "--output", "FILE"], "text.txt is there already, and is not a report of opt-jax eval"),
        (["--data", "FILE", "--output", "x" * 230], "xxx: File name too long: choose a shorter name"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file or directory"),
        (["--data", "hf:nowhere"], "hf:nowhere: cannot be loaded|hf:nowhere needs the package datasets"),
    ],
)
def test_errors_are_one_line(file, capsys, words, message):
    assert main(["eval", "tiny", *(file if word == "FILE" else word for word in words)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("opt-jax: error: ") and err.count("\n") == 1 and out == ""
    assert re.search(message, err), err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(file, expected, tmp_path):
    words = [sys.executable, "-m", "opt_jax.cli", "eval", "tiny", *SMALL, "--output", str(tmp_path / "out.json")]
    words += ["--coordinator-address", free_address(), "--num-processes", "2"]
    for data, code in ((file, 0), (None, 1)):  # the second time the texts of the two processes differ
        running = []
        for i in range(2):
            other = tmp_path / f"{i}.txt"
            other.write_text(TEXT + str(i))
            more = ["--data", data or str(other), "--process-id", str(i)]
            running.append(start(words + more, devices=2))
        done = outcomes(running)
        assert [ended for ended, *_ in done] == [code] * 2, done
        if code == 0:
            report = json.loads((tmp_path / "out.json").read_text())
            assert report["mesh"] == dict(data=1, fsdp=4, tensor=1)
            check_results(report, expected)
            assert "non-overlapping" in done[0][1] and "non-overlapping" not in done[1][1]
        else:
            assert "the processes differ: --data is" in done[0][2], done
