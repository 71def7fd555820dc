"""Writes small checkpoints of GPTQ's and bitsandbytes' forms, bit by bit, without the code under test. Not a test."""

from pathlib import Path
from typing import Any

import numpy as np
from support.hf_files import TINY, hf_weights, write_hf

CONFIG = TINY | dict(hidden_size=64, ffn_dim=96, word_embed_proj_dim=64, num_hidden_layers=1, dtype="float16")
MATRICES = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")
FC1 = "model.decoder.layers.0.fc1"


def words_of(integers: np.ndarray, bits: int) -> np.ndarray:
    """[S, N] -> int32 [S * bits / 32, N]: the bits of each column one after another, the lowest first."""
    stream = (integers[:, None].astype(np.int64) >> np.arange(bits)[None, :, None]) & 1
    stream = stream.reshape(-1, 32, integers.shape[1])
    return (stream << np.arange(32)[None, :, None]).sum(1).astype(np.uint32).view(np.int32)


def random_matrix(outputs: int, inputs: int, bits: int, group_size: int = 32, desc_act=False, sym=False, seed=0) -> Any:
    """(integers [N, K], zeros [N, G], scales [N, G], groups [K]) of a matrix whose products are of order one."""
    random = np.random.RandomState(seed)
    size = inputs if group_size == -1 else group_size
    groups = (random.permutation(inputs) if desc_act else np.arange(inputs)) // size
    count = groups.max() + 1
    zeros = np.full((outputs, count), 2 ** (bits - 1)) if sym else random.randint(1, 2**bits, (outputs, count))
    scales = random.uniform(0.5, 2, (outputs, count)) / 2**bits / inputs**0.5
    return random.randint(0, 2**bits, (outputs, inputs)), zeros, scales.astype(np.float16), groups


def tensors_of(matrix: Any, bits: int, form: str = "gptq") -> dict[str, np.ndarray]:
    """The tensors of a matrix by the last part of their names."""
    integers, zeros, scales, groups = matrix
    return {
        "qweight": words_of(integers.T, bits),
        "qzeros": words_of((zeros - (form == "gptq")) % 2**bits, bits).T,  # along the outputs
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": groups.astype(np.int32),
    }


def write_gptq(
    directory: Path, bits: int = 4, group_size: int = 32, form: str = "gptq", config: Any = None, **options: Any
) -> tuple[Path, dict[str, Any]]:
    """Write a model. `options`: of `random_matrix`. Returns the directory, and name of a module -> its matrix."""
    config = CONFIG | (config or {})
    matrices: dict[str, Any]
    weights, matrices = hf_weights(config, dtype="float16"), {}
    for i in range(config["num_hidden_layers"]):
        for j, name in enumerate(MATRICES):
            base = f"model.decoder.layers.{i}.{name}"
            outputs, inputs = weights.pop(f"{base}.weight").shape
            matrices[base] = random_matrix(outputs, inputs, bits, group_size, **options, seed=7 * i + j)
            weights |= {f"{base}.{part}": tensor for part, tensor in tensors_of(matrices[base], bits, form).items()}
    settings: dict[str, Any] = dict(quant_method="gptq", bits=bits, group_size=group_size, checkpoint_format=form)
    settings |= dict(desc_act=options.get("desc_act", False), sym=options.get("sym", False), lm_head=False)
    return write_hf(directory, config | {"quantization_config": settings}, weights), matrices


def write_bitsandbytes(directory: Path, **settings: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a model of LLM.int8. Returns the directory, and name of a module -> its float matrix."""
    weights, matrices = hf_weights(CONFIG, dtype="float16"), {}
    random = np.random.RandomState(0)
    for name in [name for name in weights if name.rsplit(".", 2)[-2] in str(MATRICES) and ".layers." in name]:
        if name.endswith(".weight") and "norm" not in name:
            base, shape = name.removesuffix(".weight"), weights[name].shape
            weights[name] = random.randint(-127, 128, shape).astype(np.int8)
            weights[f"{base}.SCB"] = random.uniform(0.1, 0.5, shape[0]).astype(np.float32)
            weights[f"{base}.weight_format"] = np.array(0, np.uint8)
            matrices[base] = weights[name] * (weights[f"{base}.SCB"] / np.float32(127))[:, None]
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False} | settings
    return write_hf(directory, CONFIG | {"quantization_config": quantization}, weights), matrices


def dequantized(matrix: Any) -> np.ndarray:
    """The matrix [N, K] in float32."""
    integers, zeros, scales, groups = matrix
    return (integers - zeros[:, groups]).astype(np.float32) * scales.astype(np.float32)[:, groups]
