"""`opt-jax eval DIRECTORY --all-checkpoints`: what single runs give, with one compilation."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_models import first_layers

from opt_jax import OPTTokenizer, named_parameters
from opt_jax.cli import main
from opt_jax.evaluation import series

TEXT = "def f(x):\n    return x + 1\n\nclass A:\n    pass\n" * 4
STEPS = (5, 20, 100)
SMALL = ["--window", "32", "--protocol", "sliding"]
PNG = b"\x89PNG\r\n\x1a\n"


def model_of(step: int):
    model = first_layers()
    for param in named_parameters(model).values():
        param.set_value(param.get_value() * (1 - 1 / step))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the text and three models whose configs and names differ in what is not architecture."""
    directory = tmp_path_factory.mktemp("saved")
    (directory / "text.txt").write_text(TEXT)
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    for step in STEPS:
        model = model_of(step)
        hf = step == 20
        model.save_pretrained(directory / "models" / f"step{step}", tokenizer=tokenizer, safe_serialization=hf)
        config = directory / "models" / f"step{step}" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout": 1 / step, "note": f"of step {step}"}))
    tokenizer.save_pretrained(directory / "models" / "tokenizer")  # no model
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def run(capsys, directory, *words, code=0) -> tuple[list, str]:
    """Measure a directory, with --json. Returns the list and stderr."""
    given = ["eval", str(directory / "models"), "--all-checkpoints", "--json", *words]
    given += [] if "--tasks" in words else ["--data", str(directory / "text.txt"), *SMALL]
    capsys.readouterr()
    assert main(given) == code
    out, err = capsys.readouterr()
    return json.loads(out) if out else [], err


def numbers(report: dict) -> list:
    """What a report measures, without the time it took."""
    return [{name: value for name, value in result.items() if name != "seconds"} for result in report["results"]]


def test_the_numbers_are_those_of_single_runs_with_one_compilation(directory, capsys, compiled):
    reports, err = run(capsys, directory)
    programs = sum("_score" in name for name in compiled)
    assert err == "" and [(report["checkpoint"], report["step"]) for report in reports] == [
        (f"step{n}", n) for n in STEPS
    ]
    assert len({json.dumps(numbers(report)) for report in reports}) == 3
    for report in reports[1:]:
        compiled.clear()
        assert main(["eval", report["model"], "--json", "--data", str(directory / "text.txt"), *SMALL]) == 0
        single = json.loads(capsys.readouterr().out)
        assert numbers(report) == numbers(single)
        same = single.keys() - {"results"}
        assert {name: report[name] for name in same} == {name: single[name] for name in same}
        assert sum("_score" in name for name in compiled) == programs > 0  # all three needed no more than one does
    assert (directory / "models" / "evaluation.png").read_bytes().startswith(PNG)


def test_damaged_and_diverged_ones_are_a_line_each_and_the_others_are_measured(directory, capsys, tmp_path):
    models, output = directory / "models", tmp_path / "results.json"
    for file in (models / "step20").glob("*.safetensors"):
        file.write_bytes(b"no weights")
    model = model_of(30)
    scale = named_parameters(model)["model.decoder.final_layer_norm.scale"]
    scale.set_value(jnp.full_like(scale.get_value(), jnp.nan))
    model.save_pretrained(models / "step30", tokenizer=OPTTokenizer.from_pretrained("tiny"))
    (models / "step100" / "config.json").unlink()
    for _ in range(2):  # the second time over the first time's file
        reports, err = run(capsys, directory, "--output", str(output), code=1)
        *lines, last = err.splitlines()
        assert last == "opt-jax: error: 3 of 4 checkpoints failed, see above"
        assert ["error" in report for report in reports] == [False, True, True, True] and len(lines) == 3
        for line, report, name in zip(lines, reports[1:], ("step20", "step30", "step100"), strict=True):
            assert line == f"opt-jax: error: {report['error']}" and f"{models}/{name}" in line
        assert re.search(r"/step30: the log-probability of token \d+ is not finite", lines[1])
        assert reports[0]["results"][0]["loss"] > 0 and json.loads(output.read_text()) == reports


def test_another_architecture_is_one_error_before_anything_runs(directory, capsys, monkeypatch):
    monkeypatch.setattr("opt_jax.evaluation.command.load", lambda *args: pytest.fail("a model was loaded"))
    first_layers(2).save_pretrained(directory / "models" / "step7", tokenizer=OPTTokenizer.from_pretrained("tiny"))
    reports, err = run(capsys, directory, code=1)
    assert reports == [] and err.count("\n") == 1
    assert re.search(r"num_hidden_layers is 1 in \S*/step5, but 2 in \S*/step7: a series has one architecture", err)
    assert not (directory / "models" / "evaluation.png").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["tiny", "--all-checkpoints"], "no directory 'tiny': --all-checkpoints is for a run"),
        (["MODELS/step5", "--all-checkpoints"], "step5 is a single model: leave out --all-checkpoints"),
        (["MODELS/tokenizer", "--all-checkpoints"], "tokenizer holds no checkpoints"),
        (["MODELS/step5", "--plot", "x.png"], "--plot without effect: it goes with --all-checkpoints"),
        (["MODELS", "--all-checkpoints", "--plot", "MODELS/step5/config.json"], "is there already, and is not a PNG"),
        (["MODELS", "--all-checkpoints", "--window", "99999"], "window 99999: it must be at least 2 and at most"),
        (["MODELS", "--all-checkpoints", "--data", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_errors_are_one_line(saved, capsys, words, message):
    given = [word.replace("MODELS", str(saved / "models")) for word in words]
    data = [] if "--data" in words else ["--data", str(saved / "text.txt")]
    assert main(["eval", *given, *data]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


def test_table_and_picture(directory, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn, save = {}, figure.Figure.savefig

    def look(self, *args, **kwargs):
        drawn.update({axes.get_title(): axes.lines[0].get_xydata().tolist() for axes in self.axes})
        save(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", look)
    (directory / "models" / "step20" / "model.safetensors").unlink()
    picture = directory / "curve.png"
    words = ["--data", str(directory / "text.txt"), *SMALL, "--plot", str(picture)]
    assert main(["eval", str(directory / "models"), "--all-checkpoints", *words]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.match(rf"{directory}/models: 3 checkpoints of [\d,]+ parameters, float32, cpu", lines[0])
    assert lines[1].startswith(f"{directory}/text.txt: 1 document, ") and lines[-1] == str(picture)
    table = [re.split(r"\s{2,}", line.strip()) for line in lines[3:-2]]
    assert table[0] == ["checkpoint", "sliding loss", "sliding perplexity"]
    assert [row[0] for row in table[1:]] == [f"step{n}" for n in STEPS] and table[2][1:] == ["-", "-"]
    assert picture.read_bytes().startswith(PNG) and not (directory / "models" / "evaluation.png").exists()
    assert drawn.keys() == {"loss", "perplexity"} and [x for x, _ in drawn["loss"]] == [5, 100]
    for row, (_, loss), (_, perplexity) in zip(table[1::2], drawn["loss"], drawn["perplexity"], strict=True):
        assert row[1].startswith(f"{loss:.4f} ± ") and row[2].startswith(f"{perplexity:.3f} ± ")


def test_steps_of_a_run_and_of_names(tmp_path):
    run_directory = tmp_path / "run"
    for step in ("100", "20", "3"):
        (run_directory / "checkpoints" / step / "params").mkdir(parents=True)
    (run_directory / "checkpoints" / "40").mkdir()  # a process was killed while it removed this
    (run_directory / "run.json").touch()
    for place in (run_directory, run_directory / "checkpoints"):
        checkpoints = series.find(str(place))
        assert [checkpoint.step for checkpoint in checkpoints] == [3, 20, 100]
        assert [checkpoint.path.name for checkpoint in checkpoints] == ["3", "20", "100"]
    for names, steps in (
        (("checkpoint_1_900", "checkpoint_1_1000", "checkpoint_2_2000"), [900, 1000, 2000]),
        (("checkpoint_1_1000", "checkpoint_2_500"), [None, None]),  # the last numbers are no steps
        (("best", "step10"), [None, None]),
    ):
        for name in names:
            (tmp_path / names[0] / name / "params").mkdir(parents=True)
        checkpoints = series.find(str(tmp_path / names[0]))
        assert [checkpoint.path.name for checkpoint in checkpoints] == list(names)
        assert [checkpoint.step for checkpoint in checkpoints] == steps


def test_models_of_another_dtype_keep_it():
    """On accelerators a checkpoint is measured in its own dtype, as alone."""
    program = series.OneProgram()
    models = [first_layers() for _ in range(3)]
    models[1].dtype = jnp.dtype("bfloat16")
    models[2].config = dataclasses.replace(models[2].config, dropout=0.5)
    merged = [program.of(model) for model in models]
    assert [model.dtype for model in merged] == [jnp.float32, jnp.bfloat16, jnp.float32]
    structures = [jax.tree.structure(model) for model in merged]
    assert structures[0] == structures[2] != structures[1]
    np.testing.assert_array_equal(*(jax.tree.leaves(x)[0] for x in (models[2], merged[2])))


@pytest.mark.parametrize(
    ("perplexities", "labels"), [((3.5, 230), ["5", "20", "50", "200"]), ((61, 92), ["60", "70", "80", "90"])]
)
def test_labels_of_perplexities_do_not_overlap(perplexities, labels, tmp_path, monkeypatch):
    figure, seen = pytest.importorskip("matplotlib.figure"), []

    def savefig(self, *arguments, **options):
        _, axes = self.axes
        low, high = axes.get_ylim()
        ticks = axes.yaxis.get_minorticklocs()
        texts = axes.yaxis.get_minor_formatter().format_ticks(ticks)
        seen.extend(text for tick, text in zip(ticks, texts, strict=True) if text and low <= tick <= high)

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    result = dict(protocol="sliding", loss=1.0, loss_stderr=0.1, perplexity_stderr=0.1)
    reports = [
        dict(checkpoint=str(i), step=i, results=[result | dict(perplexity=perplexity)])
        for i, perplexity in enumerate(perplexities)
    ]
    series.draw(reports, "run", tmp_path / "curve.png")
    assert seen == labels
