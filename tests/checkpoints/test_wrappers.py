"""What training code puts around a checkpoint, and odd forms that are valid: read as the plain model is."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.conversions import assert_same, load_hf_names, refused
from support.hf_files import TINY, hf_weights, torch_zip, write_hf
from support.metaseq_files import Foreign, contents, namespace, settings, write

from convert.__main__ import main
from convert.source import open_source
from opt_jax import OPTForCausalLM, OPTForSequenceClassification, named_parameters
from opt_jax.checkpoints.formats.hf import open_parameters
from opt_jax.config import OPTConfig

WEIGHTS = hf_weights(TINY)
EMBED, FC1 = "model.decoder.embed_tokens.weight", "model.decoder.layers.1.fc1.weight"
HEAD = {"lm_head.weight": WEIGHTS[EMBED]}


def renamed(old: str, new: str, weights=WEIGHTS) -> dict[str, np.ndarray]:
    return {re.sub(old, new, name): array for name, array in weights.items()}


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in WEIGHTS.items() if name not in names}


def arrives(source: Path, out: Path, notes: list[str], capsys, weights=WEIGHTS) -> None:
    """`from_pretrained` and the converter read `weights`, and say once what they leave out."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        model = OPTForCausalLM.from_pretrained(source)
    said = [str(warning.message) for warning in caught]
    assert len(said) == len(notes) and all(re.search(note, text) for note, text in zip(notes, said, strict=True)), said
    params = {path: np.asarray(param.get_value()) for path, param in named_parameters(model).items()}
    assert params.keys() == open_parameters(source, OPTConfig.from_hf(source))[0].keys()
    np.testing.assert_array_equal(params["model.decoder.layers.1.fc1.kernel"], weights[FC1].T)
    np.testing.assert_array_equal(params["model.decoder.embed_tokens.embedding"], weights[EMBED])
    capsys.readouterr()
    with warnings.catch_warnings(action="always"):
        assert main([str(source), str(out), "--quiet"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == len(notes) and all(line.startswith("warning: ") for line in lines), lines
    assert_same(load_hf_names(out), weights)


# Names ----------------------------------------------------------------------------------------------------------------

PREFIXES: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "ddp": (renamed("^", "module."), "'module.' in the names"),
    "compile": (renamed("^", "_orig_mod.", WEIGHTS | HEAD), "'_orig_mod.' in"),
    "both": (renamed("^", "_orig_mod.module."), "'module.', '_orig_mod.' in"),
    "fsdp": (renamed(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module."), "'_fsdp_wrapped_module.' in"),
    "fsdp-and-compile": (
        renamed(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._orig_mod.", renamed("^", "_fsdp_wrapped_module.")),
        "'_orig_mod.', '_fsdp_wrapped_module.' in",
    ),
    "base_model": (renamed("^", "base_model.", WEIGHTS | HEAD), "'base_model.' in"),
    "peft": (renamed("^", "base_model.model.", WEIGHTS | HEAD), "'base_model.model.' in"),
    "peft-cast-head": (
        renamed("lm_head", "lm_head.0", renamed("^", "base_model.model.", WEIGHTS | HEAD)),
        "base_model",
    ),
    "transformer": (renamed("^model.", "transformer.", WEIGHTS | HEAD), "'transformer.' in"),
    "of-my-own": (renamed("^", "net.opt_model.", WEIGHTS | HEAD), "'net.opt_model.' in"),
    "lightning": (renamed("^", "model.", WEIGHTS | HEAD), "'model.' in"),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_of_names_are_left_out(tmp_path, capsys, case):
    weights, note = PREFIXES[case]
    source = write_hf(tmp_path / "hf", TINY, weights, "bin-sharded" if case == "both" else "safetensors")
    arrives(source, tmp_path / "out", [f"^{source}: (without effect|left out): .*{note}"], capsys)


def test_a_cast_head_is_the_head(tmp_path, capsys):
    """peft's CastOutputToFloat holds it in float32, beside an embedding in float16."""
    weights = hf_weights(TINY, dtype="float16")
    source = write_hf(tmp_path / "hf", TINY, weights | {"lm_head.0.weight": weights[EMBED].astype(np.float32)})
    arrives(source, tmp_path / "out", [], capsys, weights)
    other = weights[EMBED].astype(np.float32)
    other[3, 4] += 0.001
    source = write_hf(tmp_path / "other", TINY, weights | {"lm_head.0.weight": other})
    assert "lm_head.weight differs from" in refused(capsys, source, tmp_path / "out2")


def test_several_models_in_one_file(tmp_path, capsys):
    two = renamed("^", "student.") | renamed("^", "teacher.")
    source = write_hf(tmp_path / "hf", TINY, two)
    assert "several models, under student.model., teacher.model.:" in refused(capsys, source, tmp_path / "out")
    source = write_hf(tmp_path / "plain", TINY, WEIGHTS | renamed("^", "teacher."))
    arrives(source, tmp_path / "out", [r"teacher\.\S+, .* and \d+ more, which are no weights"], capsys)


# Files of training code -----------------------------------------------------------------------------------------------

LIGHTNING: dict[str, Any] = {
    "epoch": 3,
    "global_step": 70,
    "pytorch-lightning_version": "2.5.0",
    "state_dict": renamed("^", "model."),
    "loops": {"fit_loop": {"state_dict": {}}},
    "callbacks": {"ModelCheckpoint": {"best_model_score": np.ones((), np.float32), "dirpath": "/x"}},
    "optimizer_states": [{"state": {0: {"step": np.ones((), np.float32)}}}],
    "hyper_parameters": Foreign("lightning.fabric.utilities.data AttributeDict", state={"lr": 1e-4}),
}
DEEPSPEED: dict[str, Any] = {
    "module": WEIGHTS,
    "buffer_names": [],
    "optimizer": None,
    "param_shapes": [{"x": (8, 8)}],
    "dtype": Foreign("torch float16"),
    "ds_config": Foreign("deepspeed.runtime.config DeepSpeedConfig", state={"zero": 1}),
    "ds_version": "0.16.0",
    "global_steps": 70,
}
FILES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lightning": ("epoch=3-step=70.ckpt", LIGHTNING, ["'model.' in"]),
    "deepspeed": ("mp_rank_00_model_states.pt", DEEPSPEED, []),
    "accelerate": ("pytorch_model_fsdp.bin", WEIGHTS, []),
    "script": (
        "model.pt",
        {"model_state_dict": WEIGHTS, "loss": np.ones((), np.float32), "best": 1.5, "args": namespace({"lr": 0.1})},
        [],
    ),
    "with-a-cfg": ("model.pt", {"model": renamed("^", "module."), "cfg": namespace({"lr": 0.1})}, ["'module.' in"]),
    "plain": ("last.pth", WEIGHTS, []),
    "numbers": ("pytorch_model.bin", WEIGHTS | {"epoch": 3, "best": 1.5, "name": "x", "done": True, "none": None}, []),
    "nested": ("pytorch_model.bin", {"state_dict": {"model": WEIGHTS}, "step": 7}, []),
}


def training_file(directory: Path, name: str, content: dict[str, Any]) -> Path:
    write(directory, {name: content})
    (directory / "config.json").write_text(json.dumps(TINY))
    return directory


@pytest.mark.parametrize("case", FILES)
def test_files_of_training_code(tmp_path, capsys, case):
    name, content, notes = FILES[case]
    source = training_file(tmp_path / "run", name, content)
    write(source, {"optimizer.pt": {"state": {}}, "scheduler.pt": {"last_epoch": 3}})
    arrives(source, tmp_path / "out", notes, capsys)
    opened = open_source([str(source)])
    with (source / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=f"{re.escape(name)} has changed"):
        opened.files.check()


def test_the_newest_checkpoint_of_deepspeed(tmp_path, capsys):
    source = training_file(tmp_path / "run", "x/mp_rank_00_model_states.pt".rpartition("/")[2], DEEPSPEED)
    for step in (10, 70):
        (source / f"global_step{step}").mkdir()
    (source / "mp_rank_00_model_states.pt").rename(source / "global_step70" / "mp_rank_00_model_states.pt")
    assert "has no weights" in refused(capsys, source, tmp_path / "out")
    (source / "latest").write_text("global_step70\n")
    (source / "zero_to_fp32.py").write_text("")
    arrives(source, tmp_path / "out", [], capsys)
    (source / "latest").write_text("../run/global_step70")
    assert "has no weights" in refused(capsys, source, tmp_path / "out2")


@pytest.mark.parametrize(
    "files, says",
    [
        ({"a.ckpt": LIGHTNING, "b.ckpt": LIGHTNING}, "several files of weights (a.ckpt, b.ckpt): name one of them"),
        ({"zero_pp_rank_0_mp_rank_00_model_states.pt": {"module": {}}}, "python zero_to_fp32.py . DIRECTORY"),
        (
            {"mp_rank_00_model_states.pt": {"module": WEIGHTS | {FC1: np.zeros(0, np.float32)}}},
            "has empty tensors: DeepSpeed ZeRO-3 has .*python zero_to_fp32.py . DIRECTORY",
        ),
        ({"mp_rank_00_model_states.pt": DEEPSPEED, "mp_rank_01_model_states.pt": DEEPSPEED}, "model-parallel parts"),
        ({"__0_0.distcp": {}, ".metadata": {}}, "format_utils dcp_to_torch {0} {0}/pytorch_model.bin`"),
        ({"m/__0_0.distcp": {}, "m/.metadata": {}}, "format_utils dcp_to_torch {0}/m {0}/pytorch_model.bin`"),
    ],
)
def test_directories_that_need_a_command(tmp_path, capsys, files, says):
    source = tmp_path / "run"
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write((source / name).parent, {Path(name).name: content})
    says = says if ".*" in says else re.escape(says.replace("{0}", str(source)))
    for config in (False, True):
        if config:
            (source / "config.json").write_text(json.dumps(TINY))
        elif any("ckpt" in name or "mp_rank_00" in name[:10] for name in files):
            continue  # without a config.json that is what is missing
        assert re.search(says, refused(capsys, source, tmp_path / "out"))
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            OPTForCausalLM.from_pretrained(source)


def test_metaseq_is_metaseq_with_a_config_beside_it(tmp_path, capsys):
    """Also where a wrapper has a config.json; and where its file is named alone."""
    for i, entries in enumerate[dict[str, Any]](
        ({"cfg": namespace({"model": settings(TINY)})}, {"args": namespace(settings(TINY))})
    ):
        for parts in (None, 2):
            source = tmp_path / f"meta{i}{parts}"
            first = write(source, contents(WEIGHTS, parts=parts, **entries))[0]
            (source / "config.json").write_text(json.dumps(TINY))
            for name in (str(source), *([str(first)] if parts is None else [])):
                assert open_source([name]).format.startswith("metaseq")
            with pytest.raises(FileNotFoundError, match="has no weights.*python -m convert metaseq"):
                OPTForCausalLM.from_pretrained(source)
    script = training_file(tmp_path / "run", "model.pt", {"model": WEIGHTS, "args": namespace({"lr": 0.1})})
    assert open_source([str(script)]).format == "Hugging Face torch .pt, 1 file"
    assert "give the directory it is in" in refused(capsys, script / "model.pt", tmp_path / "out")


def test_code_beside_a_state_dict_never_runs(tmp_path, capsys):
    content = {"state_dict": WEIGHTS, "hyper_parameters": Foreign("os system", args=("touch pwned",))}
    source = training_file(tmp_path / "run", "last.ckpt", content)
    assert "asks for os.system;" in refused(capsys, source, tmp_path / "out")
    content = {"model.decoder.x": Foreign("transformers.models.opt X"), **WEIGHTS}
    source = training_file(tmp_path / "stub", "last.ckpt", content)
    assert "asks for transformers.models.opt.X;" in refused(capsys, source, tmp_path / "out")


# Odd but valid --------------------------------------------------------------------------------------------------------


def test_only_the_head_of_a_tied_model_is_stored(tmp_path, capsys):
    arrives(write_hf(tmp_path / "hf", TINY, without(EMBED) | HEAD), tmp_path / "out", [], capsys)
    untied = write_hf(tmp_path / "untied", TINY | {"tie_word_embeddings": False}, without(EMBED) | HEAD)
    assert f"{EMBED} is missing" in refused(capsys, untied, tmp_path / "out2")


BUFFERS = {
    "model.decoder.embed_positions.position_ids": np.arange(18)[None],
    "model.decoder.num_updates": np.array([7.0], np.float32),
    "model.decoder.layers.0.self_attn.mask": np.ones((4, 4), bool),
    "model.decoder.steps": np.array(7),
    "model.decoder.version": np.array([3.0], np.float32),  # which transformers passes over without a word
    "v_head.summary.weight": np.ones((1, 8), np.float32),
}


def test_buffers_and_other_modules_are_left_out(tmp_path, capsys):
    kept = [name for name in BUFFERS if "version" not in name]
    note = f"left out: {', '.join(sorted(map(re.escape, kept)))}, which are no weights of an OPT model$"
    arrives(write_hf(tmp_path / "hf", TINY, WEIGHTS | BUFFERS), tmp_path / "out", [note], capsys)
    for name in ("model.decoder.layers.0.fc3.weight", "model.norm.weight", "lm_head.bias"):
        source = write_hf(tmp_path / "bad", TINY, WEIGHTS | {name: np.ones(8, np.float32)})
        assert f"tensor {name} is left over" in refused(capsys, source, tmp_path / "out2")


def sharded(directory: Path, form: str = "safetensors") -> tuple[Path, Path, dict[str, str]]:
    """(directory, index, weight_map) of a checkpoint in two shards."""
    source = write_hf(directory, TINY, WEIGHTS, f"{form}-sharded")
    index = next(source.glob("*.index.json"))
    return source, index, json.loads(index.read_text())["weight_map"]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_indexes_that_say_too_little_or_too_much(tmp_path, capsys, form):
    source, index, weight_map = sharded(tmp_path / "hf", form)
    shard = weight_map[FC1]
    fewer = {name: file for name, file in weight_map.items() if name != FC1}
    index.write_text(json.dumps({"weight_map": fewer | {"lm_head.weight": shard}}))
    arrives(source, tmp_path / "out", [], capsys)
    index.write_text(json.dumps({"weight_map": weight_map | {"model.decoder.x": shard}}))
    assert "tensor model.decoder.x is missing" in refused(capsys, source, tmp_path / "out2")


def test_tensors_that_two_shards_hold(tmp_path, capsys):
    source, index, weight_map = sharded(tmp_path / "hf")
    one = [name for name, file in weight_map.items() if file == weight_map[FC1]]
    other = [name for name in weight_map if name not in one]
    for name, equal in ((FC1, True), (FC1, False)):
        twice = WEIGHTS[name] if equal else WEIGHTS[name] + np.float32(0.001) * np.eye(16, 8, dtype=np.float32)
        (tmp_path / "x").mkdir(exist_ok=True)
        write_hf(tmp_path / "x", TINY, {n: WEIGHTS[n] for n in other} | {name: twice})
        (tmp_path / "x" / "model.safetensors").replace(source / weight_map[other[0]])
        if equal:
            arrives(source, tmp_path / "out", [], capsys)
    said = refused(capsys, source, tmp_path / "out2")
    assert f"tensor {FC1} is in another shard, too, with other numbers" in said
    with pytest.raises(ValueError, match="in another shard, too, with other numbers"):
        OPTForCausalLM.from_pretrained(source)


def test_shards_in_a_sub_directory(tmp_path, capsys):
    source, index, weight_map = sharded(tmp_path / "hf")
    (source / "weights" / "v1").mkdir(parents=True)
    for file in set(weight_map.values()):
        (source / file).rename(source / "weights" / "v1" / file)
    index.write_text(json.dumps({"weight_map": {n: f"weights/v1/{file}" for n, file in weight_map.items()}}))
    arrives(source, tmp_path / "out", [], capsys)
    for bad in ("weights/../../hf/weights/v1/x", "/etc/passwd", "weights//x", "weights/.", "weights/v1/"):
        index.write_text(json.dumps({"weight_map": weight_map | {FC1: bad}}))
        assert "is not the name of a file in this directory" in refused(capsys, source, tmp_path / "out2")


def test_a_file_without_metadata(tmp_path, capsys):
    source = write_hf(tmp_path / "hf", TINY, WEIGHTS)
    raw = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(raw[8 : 8 + length])}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    arrives(source, tmp_path / "out", [], capsys)


def test_architectures_of_other_names(tmp_path, capsys):
    def converted(architectures, weights=WEIGHTS) -> tuple[str, str]:
        """(the class in the result, what was said)"""
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        source = write_hf(place / "hf", TINY | {"architectures": architectures}, weights)
        capsys.readouterr()
        with warnings.catch_warnings(action="always"):
            assert main([str(source), str(place / "out"), "--quiet"]) == 0
        config = json.loads((place / "out" / "config.json").read_text())
        return config["architectures"][0], capsys.readouterr().err

    cls, said = converted(["AutoModelForCausalLMWithValueHead"])
    assert cls == "OPTForCausalLM" and said.count("\n") == 1
    assert "without effect: architectures=['AutoModelForCausalLMWithValueHead'] (none of OPT" in said
    assert "read as OPTForCausalLM)" in said
    assert converted(None) == ("OPTForCausalLM", "")
    assert converted(["MyOPT", "OPTModel"], renamed("^model.", "")) == ("OPTModel", "")
    score = renamed("^", "", WEIGHTS | {"score.weight": np.ones((2, 8), np.float32)})
    assert converted(["RewardModel"], score)[0] == "OPTForSequenceClassification"
    assert converted("OPTModel", renamed("^model.", "")) == ("OPTModel", "")
    for bad in ({"x": 1}, [["x"]], [5]):
        source = write_hf(tmp_path / "bad", TINY | {"architectures": bad}, WEIGHTS)
        assert "architectures=" in refused(capsys, source, tmp_path / "out")
        OPTForSequenceClassification.from_pretrained(source)  # reads no architectures


def test_dictionaries_without_end(tmp_path, capsys):
    """A state dict that is said to be in itself, or under a thousand others."""
    key = b"X\5\0\0\0model"
    for name, opcodes in {"itself": b"}q\1" + key + b"h\1s", "deep": (b"}" + key) * 1000 + b"}" + b"s" * 1000}.items():
        source = write_hf(tmp_path / name, TINY, {}, "bin")
        torch_zip(source / "pytorch_model.bin", b"\x80\x02" + opcodes + b".", {})
        assert "entry model is a dict" in refused(capsys, source, tmp_path / "out")
