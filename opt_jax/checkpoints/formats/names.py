"""The table of parameter names: ours (`opt_jax.named_parameters`) <-> those of Hugging Face's OPT classes.

The last part differs: Flax says kernel, embedding and scale where PyTorch says weight. A linear layer's kernel is
[in, out], and PyTorch's weight is [out, in]. Hugging Face's old Flax classes have our names, with "/" in msgpack files.
"""

import re


def _linear(name: str) -> dict[str, tuple[str, bool]]:
    return {f"{name}.kernel": (f"{name}.weight", True), f"{name}.bias": (f"{name}.bias", False)}


def _norm(name: str) -> dict[str, tuple[str, bool]]:
    return {f"{name}.scale": (f"{name}.weight", False), f"{name}.bias": (f"{name}.bias", False)}


EMBEDDING = "model.decoder.embed_tokens.embedding"  # ours; every model has it
POSITIONS = "model.decoder.embed_positions.embedding"
_LAYER = "model.decoder.layers.*"
# Our path -> (HF name, whether the matrix is transposed); "*" stands for the number of the layer.
TABLE: dict[str, tuple[str, bool]] = {
    EMBEDDING: ("model.decoder.embed_tokens.weight", False),
    POSITIONS: ("model.decoder.embed_positions.weight", False),
    "model.decoder.project_in.kernel": ("model.decoder.project_in.weight", True),
    "model.decoder.project_out.kernel": ("model.decoder.project_out.weight", True),
    **_linear(f"{_LAYER}.self_attn.q_proj"),
    **_linear(f"{_LAYER}.self_attn.k_proj"),
    **_linear(f"{_LAYER}.self_attn.v_proj"),
    **_linear(f"{_LAYER}.self_attn.out_proj"),
    **_norm(f"{_LAYER}.self_attn_layer_norm"),
    **_linear(f"{_LAYER}.fc1"),
    **_linear(f"{_LAYER}.fc2"),
    **_norm(f"{_LAYER}.final_layer_norm"),
    **_norm("model.decoder.final_layer_norm"),
    "lm_head.kernel": ("lm_head.weight", True),
    "score.kernel": ("score.weight", True),
    **_linear("qa_outputs"),
}
_FROM_HF = {path: (path, False) for path in TABLE}
_FROM_HF |= {name: (path, transposed) for path, (name, transposed) in TABLE.items()}


def to_hf(path: str) -> tuple[str, bool]:
    """Our path -> (HF name, transposed). Raises KeyError for a path that no OPT model has."""
    return _look_up(TABLE, path)


def from_hf(name: str) -> tuple[str, bool]:
    """HF name (PyTorch's or Flax's), with or without `model.` -> (our path, transposed). Raises KeyError as `to_hf`."""
    name = name.replace("/", ".")
    return _look_up(_FROM_HF, f"model.{name}" if name.startswith("decoder.") else name)


def _look_up(table: dict[str, tuple[str, bool]], name: str) -> tuple[str, bool]:
    number = re.search(r"\.layers\.(0|[1-9][0-9]*)\.", name)
    if number is None:
        if "*" in name:
            raise KeyError(name)
        return table[name]
    pattern, transposed = table[name.replace(number[0], ".layers.*.", 1)]
    return pattern.replace(".*.", f".{number[1]}."), transposed
