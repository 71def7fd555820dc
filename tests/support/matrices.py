"""Matrices with calibration inputs, as a compression sees them."""

import argparse
import functools
import inspect
from typing import Any

import numpy as np
from support.small_models import first_layers

from opt_jax import OPTTokenizer

DEAD = (3, 70, 71)  # inputs that are always 0


def correlated(dtype=np.float32, rows=96, columns=160, tokens=40, seed=0) -> tuple[Any, Any]:
    """(weight [N, K], inputs [8, T, K]): inputs of different sizes; a row of zeros, and DEAD inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns // 4, columns)) / 4
    inputs = rng.normal(size=(8, tokens, columns)) + rng.normal(size=(8, tokens, columns // 4)) @ mixing
    inputs *= np.exp(0.5 * rng.normal(size=columns))
    inputs[..., list(DEAD)] = 0
    weight = rng.normal(size=(rows, columns)) * np.exp(0.2 * rng.normal(size=(rows, 1)))
    weight[5] = 0
    return weight.astype(dtype), inputs.astype(dtype)


@functools.cache
def first_layer() -> dict[str, tuple[Any, Any]]:
    """Name -> (weight [N, K], inputs [B, T, K]) of matrices in the first layer of `tiny`, which reads Python code."""
    model = first_layers(1)
    ids = OPTTokenizer.from_pretrained("tiny")(inspect.getsource(argparse)).input_ids[0]
    ids = np.asarray(ids[: 16 * 128]).reshape(16, 128)
    layer: Any = model.model.decoder.layers
    layer = layer[0]
    matrices = {
        "ln1.hook_normalized": layer.self_attn.q_proj,
        "attn.hook_z": layer.self_attn.out_proj,
        "ln2.hook_normalized": layer.fc1,
        "mlp.hook_post": layer.fc2,
    }
    _, acts = model.run_with_cache(ids, names=[f"blocks.0.{point}" for point in matrices])
    weights = {point: np.asarray(linear.kernel.get_value(), np.float32).T for point, linear in matrices.items()}
    return {
        point: (weight, np.asarray(acts[f"blocks.0.{point}"], np.float32).reshape(16, 128, -1))
        for point, weight in weights.items()
    }
