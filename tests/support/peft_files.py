"""Writes small adapters of PEFT without torch or peft, for tests. Not a test itself."""

import json

import numpy as np
from safetensors.numpy import save_file
from support.hf_files import TINY, hf_shapes, state_dict_pickle, torch_zip

RANK, ALPHA = 3, 6
SETTINGS = dict(
    peft_type="LORA",
    task_type="CAUSAL_LM",
    base_model_name_or_path="somebody/base",
    r=RANK,
    lora_alpha=ALPHA,
    target_modules=["q_proj", "fc1"],
    # What PEFT writes besides, and what does not matter:
    lora_dropout=0.1,
    bias="none",
    fan_in_fan_out=True,
    inference_mode=True,
    init_lora_weights=True,
    use_dora=False,
    loftq_config={},
    megatron_core="megatron.core",
    layers_pattern=None,
    qalora_group_size=16,
)
PREFIX = "base_model.model."
LAYER = "model.decoder.layers.{}.{}"
TARGETS = [LAYER.format(i, name) for i in (0, 1) for name in ("self_attn.q_proj", "fc1")]


def pairs(modules=TARGETS, rank=RANK, config=TINY):
    shapes, rng = hf_shapes(config), np.random.default_rng(7)
    tensors = {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = rng.standard_normal((rank, columns)).astype(np.float32)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
    return tensors


def write(directory, tensors, form="safetensors", **settings):
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    if form == "safetensors":
        save_file(tensors, directory / "adapter_model.safetensors")
    else:
        contents = {name: array.tobytes() for name, array in tensors.items()}
        torch_zip(directory / "adapter_model.bin", state_dict_pickle(tensors), contents)
    return directory
