"""`opt-jax compress` as its users run it: progress, errors, and SIGKILL."""

import dataclasses
import json
import re
import signal
import sys
from typing import Any

import jax
import numpy as np
import pytest
from reference import our_model
from support.processes import outcomes, start
from test_options_have_effect import names

from opt_jax import OPTForCausalLM, OPTTokenizer, named_parameters
from opt_jax.checkpoints.orbax import open_stored
from opt_jax.cli import main
from opt_jax.compression import compress
from opt_jax.compression.calibration import read_calibration
from opt_jax.compression.command import CompressOptions
from opt_jax.compression.recipe import OPTIONS

TEXT = (
    "import os\n\n\ndef rows(path):\n    with open(path) as file:\n        return [line.split() for line in file]\n"
    * 20
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directory of a small model, with the embedded tokenizer."""
    path = tmp_path_factory.mktemp("command") / "model"
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    our_model("opt-125m", vocab_size=4096, num_hidden_layers=2).save_pretrained(path, tokenizer=tokenizer)
    return str(path)


def arrays(directory):
    return {path: array.load().tobytes() for path, array in open_stored(directory / "params").items()}


def test_every_option_is_passed_on(model, text, tmp_path, capsys, monkeypatch):
    assert {field.name for field in dataclasses.fields(CompressOptions)} == {*names(compress)} - {"progress"}
    words = ["--samples", "3", "--window", "20", "--seed", "5", "--rows", "spaces", "--bits", "3", "--act-order"]
    words += ["--group-size", "8", "--symmetric", "--true-sequential", "--damping", "0.1", "--mesh", "data=1"]
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    output = tmp_path / "out"
    assert main(["compress", model, "--method", "gptq", "--calibration", text, "--output", str(output), *words]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 3 and lines[-1] == str(output)
    number = r"\d\.\d\de-\d\d"
    matrices = "  ".join(f"{name} {number}" for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"))
    for i, line in enumerate(lines[:2]):
        assert re.fullmatch(rf"layer {i + 1}/2  {matrices}  \d+\.\d s", line)
    assert re.fullmatch(rf"mean squared change of the outputs on .* samples, relative to their square: {number}\n", err)
    report = json.loads((output / "compression.json").read_text())
    samples = read_calibration([text], OPTTokenizer.from_pretrained(model), samples=3, window=20, seed=5, rows="spaces")
    assert report["calibration"] == samples.about and report["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    given: dict[str, Any] = dict(
        bits=3, group_size=8, symmetric=True, act_order=True, true_sequential=True, damping=0.1
    )
    assert {name: report[name] for name in given} == given and report["versions"].keys() == {"opt-jax", "jax", "jaxlib"}
    assert OPTTokenizer.from_pretrained(output).encode("x") == OPTTokenizer.from_pretrained("tiny").encode("x")
    compress(model, tmp_path / "b", "gptq", **given, calibration=samples.ids)
    assert arrays(output) == arrays(tmp_path / "b")


def test_pruning(model, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["compress", model, "--method", "magnitude", "--sparsity", "2:4", "--output", str(output)]) == 0
    assert "mean squared change of the weights, relative" in capsys.readouterr().err
    parameters = named_parameters(OPTForCausalLM.from_pretrained(output))
    kernel = np.asarray(parameters["model.decoder.layers.1.fc1.kernel"].get_value()).T
    assert ((kernel == 0).reshape(-1, 4).sum(axis=1) == 2).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "rtn", "--sparsity", "0.5"],
            "sparsity without effect: rtn has no such option; it has bits,",
        ),
        (["--method", "gptq"], "gptq needs calibration: name a text, as in --calibration FILE"),
        (["--method", "gptq", "--calibration", "nowhere.txt"], "nowhere.txt: no such file"),
        (
            ["--method", "gptq", "--calibration", "TEXT", "--rows", "c4", "--window", "64"],
            "none of 1 rows has more",
        ),
        (["--method", "rtn", "--group-size", "7"], "group_size 7 does not divide"),
    ],
)
def test_errors_are_one_line(model, text, tmp_path, capsys, words, message):
    short = tmp_path / "short.txt"
    short.write_text("import os")
    words = [str(short) if word == "TEXT" else word for word in words]
    assert main(["compress", model, "--output", str(tmp_path / "out"), *words]) == 1
    err = capsys.readouterr().err
    assert err.startswith("opt-jax: error: ") and message in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt", "text.txt"]


def test_the_methods_of_the_command():
    annotation = next(field.type for field in dataclasses.fields(CompressOptions) if field.name == "method")
    assert annotation.__args__ == tuple(OPTIONS)  # type: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
def test_killed_and_started_again(text, tmp_path):
    words = ["--method", "gptq", "--bits", "3", "--calibration", text, "--samples", "3", "--window", "128"]
    command = [sys.executable, "-m", "opt_jax", "compress", "tiny", *words, "--output"]
    killed, complete = (start([*command, str(tmp_path / name)]) for name in ("part", "complete"))
    assert killed.stdout is not None
    while not killed.stdout.readline().startswith("layer 2/6"):
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    assert [code for code, _, _ in outcomes([killed, complete])] == [-signal.SIGKILL, 0]
    assert not (tmp_path / "part").exists() and (tmp_path / ".part.compressing").is_dir()
    [(code, out, _)] = outcomes([start([*command, str(tmp_path / "part")])])
    assert code == 0 and "layer 1/6" not in out and "layer 2/6" not in out and "layer 6/6" in out
    assert arrays(tmp_path / "part") == arrays(tmp_path / "complete")
    texts = [(tmp_path / name / "compression.json").read_text() for name in ("part", "complete")]
    assert texts[0] == texts[1]
