"""Odd checkpoints that transformers loads have its logits, and files of torch's wrappers those of the plain model."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from limits import assert_close
from oracle import make_hf, torch, transformers
from reference import batch

from opt_jax import OPTForCausalLM
from opt_jax.model.inputs import check_inputs

EMBED = "model.decoder.embed_tokens.weight"
INPUTS = {k: v for k, v in batch("opt-125m", "left").items() if k != "labels"}


@pytest.fixture(scope="module")
def hf():
    return make_hf("opt-125m", num_hidden_layers=2)


@pytest.fixture(scope="module")
def state(hf):
    return {name: tensor.detach().clone() for name, tensor in hf.named_parameters()}


def write(directory: Path, hf, state, file: str = "pytorch_model.bin", architectures=("OPTForCausalLM",)) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    content = hf.config.to_dict() | {"architectures": architectures}
    (directory / "config.json").write_text(json.dumps(content))
    torch.save(state, directory / file)
    return directory


def logits(hf) -> np.ndarray:
    with torch.no_grad():
        return hf(**{k: torch.from_numpy(v).long() for k, v in INPUTS.items()}).logits.numpy()


def assert_ours(source: Path, expected: np.ndarray, noted: bool = False) -> None:
    with warnings.catch_warnings(record=True, action="always") as caught:
        model = OPTForCausalLM.from_pretrained(source)
    assert len(caught) == noted, [str(warning.message) for warning in caught]
    real = INPUTS["attention_mask"] == 1
    logits = np.asarray(model.forward(**check_inputs(model, INPUTS)).logits)
    assert_close(logits[real], expected[real], atol=1e-4 * np.abs(expected).max(), what="logits")


ODD = ("head-only", "head-too", "buffers", "value-head", "architectures", "sub-directory", "index", "twice", "metadata")


@pytest.mark.parametrize("case", ODD)
def test_what_transformers_loads(tmp_path, hf, state, case):
    names, noted = list(state), False
    if case == "head-only":
        state = {"lm_head.weight": state[EMBED]} | {n: t for n, t in state.items() if n != EMBED}
    if case == "head-too":
        state = state | {"lm_head.weight": state[EMBED]}
    if case == "buffers":
        noted, decoder = True, "model.decoder."
        state = state | {
            f"{decoder}embed_positions.position_ids": torch.arange(9),
            f"{decoder}num_updates": torch.ones(()),
        }
    if case == "value-head":
        noted, state = True, state | {"v_head.summary.weight": torch.ones(1, 4), "v_head.summary.bias": torch.ones(1)}
    names_of_class = ["AutoModelForCausalLMWithValueHead" if case == "architectures" else "OPTForCausalLM"]
    source = write(tmp_path, hf, state, architectures=names_of_class)
    if case in ("sub-directory", "index", "twice", "metadata"):
        (source / "pytorch_model.bin").unlink()
    if case in ("sub-directory", "index", "twice"):
        folder = "weights/" if case == "sub-directory" else ""
        (source / "weights").mkdir()
        shards = {f"{folder}a.bin": names[:9], f"{folder}b.bin": names[9:]}
        weight_map = {name: file for file, part in shards.items() for name in part}
        if case == "twice":
            shards[f"{folder}b.bin"] = names[8:]
        if case == "index":
            del weight_map[names[3]]
            weight_map["lm_head.weight"] = "a.bin"
        for file, part in shards.items():
            torch.save({name: state[name] for name in part}, source / file)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if case == "metadata":
        from safetensors.torch import save

        raw = save(state)
        length = int.from_bytes(raw[:8], "little")
        header = json.dumps({"__metadata__": None} | json.loads(raw[8 : 8 + length])).encode()
        (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    theirs = logits(transformers.OPTForCausalLM.from_pretrained(source, attn_implementation="eager").eval())
    np.testing.assert_array_equal(theirs, logits(hf))
    assert_ours(source, theirs, noted)


def test_what_torch_wraps(tmp_path, hf):
    """DataParallel, `torch.compile` and a checkpoint of torch.distributed, as torch itself names and saves them."""
    expected = logits(hf)
    parallel = torch.nn.DataParallel(hf, device_ids=[])
    assert_ours(write(tmp_path / "ddp", hf, parallel.state_dict()), expected, noted=True)
    compiled = torch.compile(parallel, backend="eager")
    content = {"epoch": 3, "state_dict": compiled.state_dict(), "args": {"lr": 0.1}, "dtype": torch.float16}
    assert_ours(write(tmp_path / "compiled", hf, content, "last.ckpt"), expected, noted=True)
    parameters = {"model": dict(hf.named_parameters()), "optimizer": {"state": {}}}  # `Parameter`s, not tensors
    assert_ours(write(tmp_path / "parameters", hf, parameters, "step.pt"), expected)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict_saver import save

    source = tmp_path / "dcp"
    with warnings.catch_warnings(action="ignore"):  # torch's own: no process group
        save({"model": hf.state_dict(), "step": 7}, checkpoint_id=source)
    hf.config.save_pretrained(source)
    with pytest.raises(FileNotFoundError, match="dcp_to_torch"):
        OPTForCausalLM.from_pretrained(source)
    dcp_to_torch_save(source, source / "pytorch_model.bin")
    assert_ours(source, expected)
