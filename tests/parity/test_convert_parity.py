"""Checkpoints that torch and transformers have written give PyTorch's outputs, loaded directly and converted.

`python tests/parity/test_convert_parity.py` writes tests/fixtures/torch, for the tests without torch.
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from limits import assert_close
from oracle import canonical_path, make_hf, torch, transformers
from reference import CLASSES, SMALL, batch

import opt_jax
from convert.__main__ import main
from opt_jax import named_parameters
from opt_jax.checkpoints.formats.hf import open_checkpoint
from opt_jax.checkpoints.formats.torch_files import read_torch
from opt_jax.model.inputs import check_inputs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "torch"


def save(hf, directory: Path, form: str) -> Path:
    """Save the model. `save_pretrained` of transformers 5 writes safetensors only, so others are written by torch."""
    if "safetensors" in form:
        hf.save_pretrained(directory, max_shard_size="8KB" if form.endswith("sharded") else "1GB")
        assert bool(list(directory.glob("*.index.json"))) == form.endswith("sharded")
        return directory
    hf.config.architectures = [type(hf).__name__]
    hf.config.save_pretrained(directory)
    state = hf.state_dict()
    if not form.endswith("sharded"):
        torch.save(state, directory / "pytorch_model.bin")
        return directory
    names = list(state)
    weight_map = {name: f"pytorch_model-0000{1 + (i > 9)}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def main_output(out) -> np.ndarray:
    for name in ("logits", "start_logits", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            value = getattr(out, name)
            return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    raise AssertionError(out)


CASES = [(name, "OPTForCausalLM", "bin") for name in SMALL]
CASES += [("opt-350m", "OPTForCausalLM", form) for form in ("safetensors", "safetensors-sharded", "bin-sharded")]
CASES += [("galactica", cls, "bin") for cls in CLASSES if cls != "OPTForCausalLM"]


@pytest.mark.parametrize("name, cls, form", CASES)
def test_outputs_are_those_of_pytorch(tmp_path, name, cls, form):
    hf = make_hf(name, cls, num_hidden_layers=2)
    source = save(hf, tmp_path / "hf", form)
    assert main([str(source), str(tmp_path / "out")]) == 0
    inputs = {k: v for k, v in batch(name, "left").items() if k != "labels"}
    with torch.no_grad():
        expected = main_output(hf(**{k: torch.from_numpy(v).long() for k, v in inputs.items()}))
    model = getattr(opt_jax, cls).from_pretrained(tmp_path / "out")
    direct = named_parameters(getattr(opt_jax, cls).from_pretrained(source))
    for path, param in named_parameters(model).items():
        np.testing.assert_array_equal(param.get_value(), direct[path].get_value())
    got = main_output(model.forward(**check_inputs(model, inputs)))  # not compiled
    if got.shape[1:2] == inputs["input_ids"].shape[1:]:  # one output per position: compare the real ones
        real = inputs["attention_mask"] == 1
        got, expected = got[real], expected[real]
    assert_close(got, expected, atol=1e-4 * np.abs(expected).max(), what="output")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_half_precision_bits(tmp_path, dtype, form):
    hf = make_hf("opt-125m", dtype=dtype)
    arrays = open_checkpoint(save(hf, tmp_path, form))
    for name, tensor in hf.named_parameters():
        assert arrays[name].dtype == dtype
        assert arrays[name].load().tobytes() == tensor.detach().view(torch.int16).numpy().tobytes(), name


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("named", [None, "bfloat16"])
def test_float8_is_cast_as_transformers_does(tmp_path, form, named):
    hf = make_hf("opt-125m", dtype=jnp.float16, num_hidden_layers=1)
    hf.config.save_pretrained(tmp_path)
    small = {"fc1.weight": torch.float8_e4m3fn, "fc2.weight": torch.float8_e5m2, "q_proj.weight": torch.float8_e4m3fn}
    state = {name: t for name, t in hf.state_dict().items() if name != "lm_head.weight"}
    state = {name: t.to(small.get(".".join(name.split(".")[-2:]), t.dtype)) for name, t in state.items()}
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        hf.save_pretrained(tmp_path, state_dict=dict(state))
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": named}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.OPTForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="and 2 more tensors are float8_e.*, read as (b?)float16"):
        ours = named_parameters(opt_jax.OPTForCausalLM.from_pretrained(tmp_path, param_dtype="auto"))
    for name, tensor in theirs.named_parameters():
        if state[name].dtype in small.values():  # each other tensor keeps its own dtype here
            path, transposed = canonical_path(name)
            kernel = np.asarray(ours[path].get_value())
            assert kernel.dtype == str(tensor.dtype).removeprefix("torch.") == (named or "float16")
            expected = tensor.detach().view(torch.int16).numpy().tobytes()
            assert (kernel.T if transposed else kernel).tobytes() == expected, name


def test_what_torch_negates_when_it_reads_is_refused(tmp_path):
    negated = torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag
    assert negated.is_neg()
    torch.save({"fine": negated.resolve_neg()}, tmp_path / "fine.bin")
    np.testing.assert_array_equal(read_torch(tmp_path / "fine.bin")["fine"], negated.numpy(force=True))
    torch.save({"fine": torch.ones(3), "view": negated}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="x.bin: tensor view: torch's neg or conj bit is set"):
        read_torch(tmp_path / "x.bin")


def write_fixtures() -> None:
    base = torch.arange(24, dtype=torch.float32)
    matrix = base.reshape(4, 6)
    views = {
        "float32": matrix,
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "transposed": matrix.T,
        "shared_row": matrix[2],
        "steps": base[1::5],
        "expanded": base[3:6, None].expand(3, 4),
        "parameter": torch.nn.Parameter(base[:3].clone()),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 5),
    }
    (FIXTURES / "tiny-opt").mkdir(parents=True, exist_ok=True)
    torch.save(views, FIXTURES / "views.bin")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=8,
        word_embed_proj_dim=4,
        do_layer_norm_before=False,
        architectures=["OPTForCausalLM"],
        dtype="float16",
    )
    model = transformers.OPTForCausalLM(config).half()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    config.save_pretrained(FIXTURES / "tiny-opt")
    torch.save(model.state_dict(), FIXTURES / "tiny-opt" / "pytorch_model.bin")  # lm_head.weight is in it, tied
    sums = {name: parameter.detach().double().abs().sum().item() for name, parameter in model.named_parameters()}
    (FIXTURES / "tiny-opt" / "sums.json").write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write_fixtures())
