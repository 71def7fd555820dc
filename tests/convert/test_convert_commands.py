"""The other commands of `python -m convert`, and checkpoints of train.py as a source."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.hf_files import TINY, VARIANTS, hf_weights, write_hf
from support.metaseq_files import contents, write
from support.processes import largest_file

from convert.__main__ import main
from opt_jax import OPTConfig, OPTForCausalLM, named_parameters, unstack_layers
from opt_jax.checkpoints import arrays
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.optimizer import make_optimizer
from opt_jax.training.step import new_model, new_state

FC1 = "model.decoder.layers.1.fc1.weight"


def run(capsys, *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = main([*map(str, args)])
    except SystemExit as e:  # argument parsing
        code = e.code
    out, err = capsys.readouterr()
    assert isinstance(code, int)
    return code, out, err


def failed(capsys, code: int, *args: object) -> str:
    """Run a command that exits with `code`. Returns its one line of error."""
    exit_code, out, err = run(capsys, *args)
    assert (exit_code, out) == (code, ""), (exit_code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


# inspect --------------------------------------------------------------------------------------------------------------


def sources(directory: Path) -> dict[str, Path | str]:
    """Write one checkpoint in several forms. Returns form -> what to open."""
    weights = hf_weights(TINY, dtype="float16")
    paths: dict[str, Path | str] = {
        form: write_hf(directory / form, TINY, weights, form) for form in ("safetensors", "safetensors-sharded", "bin")
    }
    assert main([str(paths["bin"]), str(directory / "orbax")]) == 0
    write(directory / "metaseq", contents(weights, 2, 2, flat=True, cfg=None))
    return paths | {"orbax": directory / "orbax", "metaseq": f"{directory}/metaseq/*.pt"}


def test_inspect_shows_every_form_without_loading_it(tmp_path, capsys, monkeypatch):
    paths = sources(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    weights = hf_weights(TINY, dtype="float16")
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    paths["with-head"] = write_hf(tmp_path / "with-head", TINY, weights)
    monkeypatch.setattr(arrays.LazyArray, "load", lambda *args: pytest.fail("tensor data were read"))
    count = sum(a.size for a in hf_weights(TINY).values())
    for form, source in paths.items():
        given = ["--config", tmp_path / "config.json"] if form == "metaseq" else []
        code, out, err = run(capsys, "inspect", source, *given)
        assert (code, err) == (0, "")
        first, cls, config, total, *tensors = out.splitlines()
        kind = {
            "safetensors": "Hugging Face safetensors, 1 file",
            "with-head": "Hugging Face safetensors, 1 file",
            "bin": "Hugging Face torch .bin, 1 file",
            "safetensors-sharded": "Hugging Face safetensors, 2 files",
            "orbax": "Orbax model directory",
            "metaseq": "metaseq, 2 model parts in 2 files each, flat parameters, with metadata",
        }[form]
        assert first.endswith(f": {kind}")
        assert cls == "class: OPTForCausalLM" and "hidden_size=8, num_attention_heads=2," in config
        assert total == f"{len(hf_weights(TINY))} tensors (36 float16), {count:,} parameters, {2 * count:,} bytes"
        lines = {line.split()[0]: line.split()[1:] for line in tensors}
        assert lines.keys() == {name.replace("layers.1.", "layers.0-1.") for name in hf_weights(TINY)} - {
            name for name in hf_weights(TINY) if "layers.0." in name
        }
        assert lines[FC1.replace("layers.1.", "layers.0-1.")] == ["float16", "16x8", "512"]  # of both layers


def test_inspect_shows_what_is_wrong_with_it(tmp_path, capsys):
    weights = hf_weights(TINY)
    weights[FC1] = weights[FC1].astype(np.float64)
    del weights["model.decoder.layers.0.fc2.bias"]
    code, out, err = run(capsys, "inspect", write_hf(tmp_path / "hf", TINY, weights))
    assert code == 1 and len(out.splitlines()) == 4 + len(weights) and f"{FC1:<55} float64" in out
    assert err.startswith("error: ") and "tensor model.decoder.layers.0.fc2.bias is missing" in err
    assert "--dtype float32" in failed(
        capsys, 1, write_hf(tmp_path / "64", TINY, hf_weights(TINY) | {FC1: weights[FC1]}), tmp_path / "out"
    )
    assert run(capsys, tmp_path / "64", tmp_path / "out", "--dtype", "float32")[0] == 0


def test_a_directory_named_like_a_command(tmp_path, capsys, monkeypatch):
    write_hf(tmp_path / "inspect", TINY, hf_weights(TINY))
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "./inspect", "out")[0] == 0
    assert run(capsys, "inspect", "inspect")[1].startswith("inspect: Hugging Face safetensors")


# verify ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verify_finds_the_first_difference(tmp_path, capsys):
    weights = hf_weights(TINY)
    paths = sources(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for form, source in paths.items():
        given = ["--config", tmp_path / "config.json"] if form == "metaseq" else []
        code, out, err = run(capsys, "verify", tmp_path / "orbax", "--against", source, *given)
        assert (code, err) == (0, "") and "the same 36 tensors" in out

    def difference(config: dict, weights: dict) -> str:
        other = write_hf(tmp_path / "other", config, weights)
        return failed(capsys, 1, "verify", other, "--against", tmp_path / "one")

    write_hf(tmp_path / "one", TINY, weights)
    other = {name: array.copy() for name, array in weights.items()}
    other[FC1][3, 5] = -0.0
    weights[FC1][3, 5] = 0.0
    write_hf(tmp_path / "one", TINY, weights)
    assert f"tensor {FC1} at [3, 5] is -0.0 in {tmp_path / 'other'}, but 0.0 in" in difference(TINY, other)
    other[FC1] = weights[FC1].astype(np.float16)
    assert f"tensor {FC1} is float16 (16, 8) in" in difference(TINY, other)
    other = {name: array.copy() for name, array in weights.items()}
    other[FC1][3, 5], weights[FC1][3, 5] = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    write_hf(tmp_path / "one", TINY, weights)
    assert "is nan (0x7fc00000) in" in difference(TINY, other)
    assert "pad_token_id is 7 in" in difference(TINY | {"pad_token_id": 7}, weights)
    base = {name.removeprefix("model."): array for name, array in weights.items()}
    assert "class: OPTModel in" in difference(TINY | {"architectures": ["OPTModel"]}, base)
    assert "num_attention_heads is 4 in" in difference(TINY | {"num_attention_heads": 4}, weights)
    assert "tie_word_embeddings" in difference(VARIANTS["untied"], hf_weights(VARIANTS["untied"]))
    headed = TINY | {"architectures": ["OPTForSequenceClassification"]}
    assert "class: OPTForSequenceClassification in" in difference(headed, hf_weights(headed, "score"))


# Usage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        (["to-hf", "tiny", "DST", "--shard-of", "4/3"], "--shard-of 4/3: give i/n"),
        (["to-hf", "tiny", "DST", "--shard-of", "0/3"], "--shard-of 0/3: give i/n"),
        (["to-hf", "tiny", "DST", "--shard-of", "one"], "--shard-of one: give i/n"),
        (["to-hf", "tiny", "DST", "--max-shard-size", "5XB"], "--max-shard-size '5XB'"),
        (["to-hf", "tiny", "DST", "--max-shard-size", "9" * 400], "--max-shard-size '999"),
        (["tiny", "DST", "--num-processes", "2"], "--num-processes and --process-id go together"),
        (["tiny", "DST", "--distributed", "off", "--process-id", "0"], "--distributed off: leave out"),
        (["tiny", "DST", "--hang-minutes", "5"], "--hang-minutes 5 without effect"),
        (["tiny", "DST", "--hang-minutes", "0"], "--hang-minutes 0: must be at least 1"),
        (["metaseq", "DST"], "SRC... DST"),
        (["to-hf", "DST"], "SRC... DST"),
        (["to-hf", "tiny", "DST", "--shard-of", "1/2", "--distributed", "on"], "--shard-of is for separate commands"),
        (["to-hf", "tiny", "DST", "--shard-of", "1/2", "--process-id", "0"], "--shard-of is for separate commands"),
        (["metaseq", "nowhere", "DST", "--model", "125m", "--config", "c"], "give one of them"),
    ],
)
def test_bad_usage_is_exit_code_2(tmp_path, capsys, args, message):
    args = [str(tmp_path / "out") if arg == "DST" else arg for arg in args]
    assert message in failed(capsys, 2, *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args, message",
    [
        (["tiny", "DST", "--revision", "main"], "revision='main' is for models on the hub"),
        (["inspect", "tiny", "--offline"], "--cache-dir and --offline are for hub ids, but tiny is none"),
        (["to-hf", "tiny", "DST", "--cache-dir", "DST"], "--cache-dir and --offline are for hub ids, but tiny is none"),
        (["verify", "tiny", "--against", "tiny", "--offline"], "--cache-dir and --offline are for hub ids, but tiny"),
        (["HF", "DST", "--no-verify"], "--no-verify is for Orbax directories: HF has no checksums"),
        (["inspect", "HF", "--no-verify"], "--no-verify is for Orbax directories: HF has no checksums"),
        (["verify", "HF", "--against", "HF", "--no-verify"], "--no-verify is for Orbax directories: HF has no"),
        (["to-hf", "tiny", "DST", "--model", "125m"], "--model and --config are for metaseq checkpoints"),
        (["to-hf", "nowhere.pt", "DST", "--revision", "main"], "are for hub ids, not for metaseq files"),
        (["metaseq", "nowhere.pt", "DST", "--model", "125m"], "nowhere.pt is not there"),
    ],
)
def test_options_that_do_not_fit_the_source(tmp_path, capsys, args, message):
    source = str(tmp_path / "hf")
    if "HF" in args:
        write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    args = [{"DST": str(tmp_path / "out"), "HF": source}.get(arg, arg) for arg in args]
    assert message.replace("HF", source) in failed(capsys, 1, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] * (source in args)


def test_a_part_is_written_alone_in_a_cluster(tmp_path, monkeypatch):
    for name, value in {"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    assert main(["to-hf", str(source), str(tmp_path / "out"), "--shard-of", "1/1"]) == 0
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("command", [[], ["metaseq"], ["to-hf"], ["verify"], ["inspect"]])
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0 and f"usage: {' '.join(['python -m convert', *command])} " in out


# Checkpoints of train.py ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_of_a_training_run(tmp_path, capsys, tied):
    config = OPTConfig.from_hf(TINY | {"tie_word_embeddings": tied, "torch_dtype": "float16"})
    optimizer = make_optimizer(lambda step: 1e-3)
    states = {step: new_state(new_model(config, step, jnp.float32), optimizer) for step in (9, 10)}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.close()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"model": config.to_hf()}))
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "vocab.json").write_text("{}")

    for source, step in ((tmp_path / "run", 10), (tmp_path / "run" / "checkpoints" / "9", 9)):
        params = named_parameters(unstack_layers(states[step].model))
        out = tmp_path / f"out{step}"
        assert run(capsys, source, out)[0] == 0
        assert ": checkpoint of train.py\n" in run(capsys, "inspect", source)[1]
        assert run(capsys, "verify", out, "--against", source)[0] == 0
        for name in (out, source):  # the converted one, and the checkpoint of train.py
            loaded = named_parameters(OPTForCausalLM.from_pretrained(name))
            assert loaded.keys() == params.keys()
            for path, param in loaded.items():
                np.testing.assert_array_equal(param.get_value(), params[path].get_value())
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"  # as trained
        assert (out / "vocab.json").read_text() == "{}"


@pytest.mark.parametrize("command", ["", "to-hf"])
def test_a_full_disk_behind_the_weights_names_file_and_bytes(tmp_path, capsys, command):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    (source / "vocab.json").write_text("x" * 300_000)
    with largest_file(200_000):
        assert main([*command.split(), str(source), str(tmp_path / "out"), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .*vocab.json: File too large \(300,000 bytes are needed\): .*\n", said), said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
