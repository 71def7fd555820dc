"""GPTQ's and bitsandbytes' files give the outputs of PyTorch with matrices that PyTorch dequantizes.

The formulas are those of the formats, written in PyTorch: shifts and masks of words, as AutoGPTQ's modules have them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limits import assert_close
from oracle import torch, transformers
from safetensors.torch import load_file
from support.gptq_files import CONFIG, write_bitsandbytes, write_gptq

from convert.__main__ import main
from opt_jax import OPTForCausalLM
from opt_jax.model.inputs import check_inputs

IDS = np.array([[1, 1, 2, 5, 9, 4], [2, 7, 8, 3, 11, 6]], np.int32)
RELATIVE = 1e-5


def unpacked(words: Any, bits: int) -> Any:
    """int32 [W, N] -> [W * 32 / bits, N]. Of 3 bits, three words hold 32 integers, and two of these straddle words."""
    mask = 2**bits - 1
    if bits != 3:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[:, None] >> shifts[None, :, None]) & mask).reshape(-1, words.shape[1])
    first, second, third = (
        word.to(torch.int64) & 0xFFFFFFFF for word in words.reshape(-1, 3, words.shape[1]).unbind(1)
    )
    integers = [first >> 3 * i for i in range(10)]
    integers += [(first >> 30) | (second << 2)]
    integers += [second >> 3 * i + 1 for i in range(10)]
    integers += [(second >> 31) | (third << 1)]
    integers += [third >> 3 * i + 2 for i in range(10)]
    return (torch.stack(integers, 1) & mask).reshape(-1, words.shape[1]).to(torch.int32)


def dequantized(tensors: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A state dict of float32, without the parts of quantized matrices."""
    state = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if part == "qweight":
            bits, groups = settings["bits"], tensors[f"{base}.g_idx"].long()
            zeros = unpacked(tensors[f"{base}.qzeros"].T.contiguous(), bits).T
            zeros = zeros + (settings["checkpoint_format"] == "gptq")
            scales = tensors[f"{base}.scales"].float()
            state[f"{base}.weight"] = ((unpacked(tensor, bits) - zeros[groups]) * scales[groups]).T
        elif part == "SCB":
            state[f"{base}.weight"] = tensors[f"{base}.weight"].float() * tensor[:, None] / 127
        elif part not in ("qzeros", "scales", "g_idx", "weight_format") and tensor.is_floating_point():
            state[name] = tensor.float()
    return state


def oracle_logits(directory: Path) -> np.ndarray:
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    fields = {name: value for name, value in CONFIG.items() if name not in ("architectures", "dtype")}
    config = transformers.OPTConfig(**fields, attn_implementation="eager", dropout=0.0)
    with torch.no_grad():
        model = transformers.OPTForCausalLM(config).eval()
        state = dequantized(load_file(directory / "model.safetensors"), settings)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected
        model.tie_weights()
        return model(torch.from_numpy(IDS).long(), attention_mask=torch.from_numpy(IDS != 1).long()).logits.numpy()


def our_logits(directory: Path, **options: Any) -> np.ndarray:
    model = OPTForCausalLM.from_pretrained(directory, **options)
    inputs = check_inputs(model, dict(input_ids=IDS, attention_mask=IDS != 1))
    return np.asarray(model.forward(**inputs).logits)  # not compiled


def assert_near(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    real = IDS != 1
    assert_close(got[real], expected[real], atol=RELATIVE * np.abs(expected[real]).max(), what=what)


CASES: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": dict(bits=bits) for bits in (2, 3, 4, 8)},
    "one group": dict(group_size=-1, sym=True),
    "act-order": dict(desc_act=True),
    "act-order, 3 bits, second form": dict(bits=3, desc_act=True, form="gptq_v2"),
}


@pytest.mark.parametrize("kind", CASES)
def test_logits_of_gptq_are_those_of_pytorch(tmp_path, kind):
    source, _ = write_gptq(tmp_path / "hf", **CASES[kind])
    expected = oracle_logits(source)
    assert_near(our_logits(source), expected, "packed")
    assert_near(our_logits(source, dequantize=True), expected, "dequantized")
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert main(["to-hf", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert_near(oracle_logits(tmp_path / "back"), expected, "written again")


def test_logits_of_bitsandbytes_are_those_of_pytorch(tmp_path):
    source, _ = write_bitsandbytes(tmp_path / "hf")
    expected = oracle_logits(source)
    assert_near(our_logits(source, dequantize=True), expected, "dequantized")
    # On a CPU the inputs of products are rounded to 15 bits (model/int8.py).
    error = np.linalg.norm(our_logits(source) - expected) / np.linalg.norm(expected)
    assert error < 3e-4
