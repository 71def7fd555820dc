"""`python -m convert metaseq --series`: several metaseq checkpoints in one call."""

import re
import sys

import numpy as np
import pytest
from support.hf_files import TINY, hf_weights
from support.metaseq_files import contents, namespace, settings, write
from support.processes import outcomes, start

from convert import series
from convert.__main__ import main
from opt_jax import OPTForCausalLM, named_parameters

CFG = {"model": namespace(settings(TINY))}
STEPS = ("checkpoint_1_2", "checkpoint_1_10", "checkpoint_2_100")


def weights_of(number: int) -> dict[str, np.ndarray]:
    return {name: array + np.float32(number) for name, array in hf_weights(TINY, dtype="float32").items()}


def files_of(name: str, number: int, parts: int | None = 2) -> dict:
    files = contents(weights_of(number), parts=parts, flat=parts is not None, cfg=CFG)
    return {file.replace("reshard", name): content for file, content in files.items()}


@pytest.fixture
def source(tmp_path):
    """A directory with the files of three checkpoints, in two parts each."""
    for number, name in enumerate(STEPS):
        write(tmp_path / "ckpt", files_of(name, number))
    return tmp_path / "ckpt"


def run(capsys, *words: object) -> tuple[int, list[str], list[str]]:
    capsys.readouterr()
    code = main(["metaseq", *map(str, words), "--series", "--quiet"])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def states(directory) -> dict:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


def test_each_checkpoint_gets_a_directory_with_what_one_conversion_writes(source, tmp_path, capsys):
    code, out, err = run(capsys, source, tmp_path / "out")
    assert code == 0 and err == []
    assert [re.split(r": \d", line)[0] for line in out] == [f"{tmp_path}/out/{name}" for name in STEPS]  # by number
    for name in STEPS:
        alone = tmp_path / "alone" / name
        assert main(["metaseq", f"{source}/{name}-model_part-*.pt", str(alone)]) == 0
        ours, theirs = (
            named_parameters(OPTForCausalLM.from_pretrained(place)) for place in (tmp_path / "out" / name, alone)
        )
        assert ours.keys() == theirs.keys()
        for path, param in ours.items():
            np.testing.assert_array_equal(param.get_value(), theirs[path].get_value(), path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(STEPS)


@pytest.mark.parametrize("dtype", [(), ("--dtype", "bfloat16")])
def test_those_that_are_there_are_verified_and_passed_over(source, tmp_path, capsys, dtype):
    out = tmp_path / "out"
    assert run(capsys, f"{source}/{STEPS[1]}*.pt", out, *dtype)[0] == 0
    before = states(out)
    code, lines, err = run(capsys, source, out, *dtype)
    assert code == 0 and err == []
    assert ["is there already, the same" in line for line in lines] == [False, True, False]
    assert before.items() <= states(out).items()
    code, lines, err = run(capsys, source, out, *dtype, "--overwrite")
    assert code == 0 and not any("already" in line for line in lines)
    assert not before.items() & states(out).items()


def test_one_that_differs_or_is_damaged_is_a_line_and_the_others_are_converted(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, f"{source}/{STEPS[0]}*.pt", out)[0] == 0
    write(source, files_of(STEPS[0], 7))  # the source is another one now
    (source / f"{STEPS[1]}-model_part-1.pt").write_bytes(b"PK\3\4")
    before = states(out)
    code, lines, err = run(capsys, source, out)
    assert code == 1 and len(err) == 3
    assert re.match(f"error: {out}/{STEPS[0]} is there already, and differs .*: remove it, or pass --overwrite", err[0])
    assert err[1].startswith("error: ") and f"{STEPS[1]}-model_part-1.pt" in err[1]
    assert err[2] == f"error: 2 of 3 checkpoints failed, see above; the others are in {out}"
    assert len(lines) == 1 and lines[0].startswith(f"{out}/{STEPS[2]}: ")
    assert sorted(path.name for path in out.iterdir()) == sorted({STEPS[0], STEPS[2]})
    assert before.items() <= states(out).items()


def test_names_come_from_files_or_else_from_directories(tmp_path):
    for folder in ("step20", "step3"):
        for file in ("reshard-model_part-0.pt", "reshard-model_part-1.pt"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / file).touch()
    checkpoints = series.find([str(tmp_path)])
    assert list(checkpoints) == ["step3", "step20"] and all(len(files) == 2 for files in checkpoints.values())
    (tmp_path / "more" / "step3").mkdir(parents=True)
    (tmp_path / "more" / "step3" / "reshard.pt").touch()
    with pytest.raises(ValueError, match=r"would both be written to step3"):
        series.find([str(tmp_path), str(tmp_path / "more" / "step3")])


def test_a_destination_that_is_a_model_is_refused(source, tmp_path, capsys):
    assert main(["metaseq", f"{source}/{STEPS[0]}*.pt", str(tmp_path / "out")]) == 0
    before = states(tmp_path)
    code, out, err = run(capsys, source, tmp_path / "out")
    assert code == 1 and out == [] and len(err) == 1 and "out is a model: name a directory in which" in err[0]
    assert states(tmp_path) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path):
    wide = TINY | dict(vocab_size=4000, hidden_size=512, word_embed_proj_dim=512, ffn_dim=2048)
    files = contents(hf_weights(wide, dtype="float32"), cfg={"model": namespace(settings(wide))})
    for number in range(6):  # 33 MB each
        write(tmp_path / "ckpt", {f"step{number}.pt": files["reshard.pt"]})
    words = [sys.executable, "-m", "convert", "metaseq", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--series"]
    ((code, out, err),) = outcomes([start([*words, "--quiet"], devices=1)])
    assert code == 0, err
    peaks = [int(number.replace(",", "")) for number in re.findall(r"peak RSS ([\d,]+) MB", out)]
    assert len(peaks) == 6 and peaks[-1] < peaks[0] + 50, peaks  # otherwise 100 more
