"""Small models with reproducible weights, for the oracle and the goldens. Needs no PyTorch.

A weight depends only on its path, shape and a seed, through `np.random.RandomState`, whose streams NumPy has frozen.
LayerNorms and biases are random too, because swapped ones would go unnoticed at their initial values, 1 and 0.
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import opt_jax
from opt_jax import OPTConfig, named_parameters

_SMALL: dict[str, Any] = dict(
    vocab_size=99, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, ffn_dim=40, max_position_embeddings=64
)
CONFIGS = {
    "opt-125m": OPTConfig(**_SMALL),
    "opt-350m": OPTConfig(**_SMALL, do_layer_norm_before=False, word_embed_proj_dim=16),
    "galactica": OPTConfig(
        **_SMALL, activation_function="gelu", enable_bias=False, layer_norm_elementwise_affine=False
    ),
    # Projections and a final LayerNorm together, which no published size has: only here their order matters.
    "untied": OPTConfig(**_SMALL, tie_word_embeddings=False, word_embed_proj_dim=16),
    "real-125m": OPTConfig.preset("125m"),
}
SMALL = tuple(name for name in CONFIGS if name != "real-125m")
CLASSES = ("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering")
PADDINGS = ("none", "left", "right")


def i32(values) -> np.ndarray:
    return np.asarray(values, np.int32)


def f32(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def draw(path: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The float32 weight at a path, scaled so that activations and logits are of order one."""
    random = np.random.RandomState((zlib.crc32(path.encode()) + seed) % 2**32)
    values = random.standard_normal(shape).astype(np.float32)
    kind = path.rpartition(".")[2]
    if kind == "scale":
        return 1 + 0.3 * values
    if kind == "bias":
        return 0.3 * values
    return values * np.float32(shape[0 if kind == "kernel" else -1] ** -0.5)


def our_model(
    name: str, cls: str = "OPTForCausalLM", dtype=jnp.float32, param_dtype=jnp.float32, seed=0, **config: Any
):
    """Our model of `CONFIGS[name]` with the drawn weights. `config` replaces fields."""
    model = unset_model(dataclasses.replace(CONFIGS[name], **config), cls, dtype, param_dtype)
    for path, param in named_parameters(model).items():
        param.set_value(jnp.asarray(draw(path, param.get_value().shape, seed), param_dtype))
    return model


def unset_model(config: OPTConfig, cls: str, dtype=jnp.float32, param_dtype=jnp.float32):
    """A model whose parameters are shapes, without initial values."""
    model = _traced(config, repr(config.extra), cls, dtype, param_dtype, jax.config.jax_enable_x64)  # type: ignore[reportAttributeAccessIssue]
    return jax.tree.map(lambda shape: shape, model)  # a copy, which may be changed


@functools.cache  # tracing a constructor takes 0.15 s, and the tests need a thousand models
def _traced(config: OPTConfig, _extra: str, cls: str, dtype, param_dtype, _x64: bool):  # `==` ignores `extra`
    build = getattr(opt_jax, cls)
    return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype))


def batch(name: str, padding: str = "none", rows: int = 3, length: int = 10, seed: int = 0) -> dict[str, np.ndarray]:
    """Ids, mask and causal labels. Rows have different numbers of real tokens. A pad has id 1 and label -100.

    With left padding the first real token has label -100 too, because a pad would predict it.
    """
    config = CONFIGS[name]
    random = np.random.RandomState(seed)
    ids = random.randint(3, config.vocab_size, (rows, length)).astype(np.int32)
    mask = np.ones((rows, length), np.int32)
    labels = ids.copy()
    for row in range(rows if padding != "none" else 0):
        pads = (3 * row) % (length - 1)  # none in row 0
        where = slice(0, pads) if padding == "left" else slice(length - pads, length)
        ids[row, where], mask[row, where], labels[row, where] = 1, 0, -100
        if padding == "left" and pads:
            labels[row, pads] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


# What tests/goldens stores: (class, changes to the config, inputs besides ids and mask).
CASES: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray]]] = {
    "causal": ("OPTForCausalLM", {}, {}),
    "regression": (
        "OPTForSequenceClassification",
        dict(problem_type="regression", num_labels=3),
        dict(labels=f32([[0.5, -1, 2], [1, 2, 3], [0, 0, 1]])),
    ),
    "single_label": (
        "OPTForSequenceClassification",
        dict(problem_type="single_label_classification", num_labels=4),
        dict(labels=i32([3, 0, 1])),
    ),
    "multi_label": (
        "OPTForSequenceClassification",
        dict(problem_type="multi_label_classification", num_labels=4),
        dict(labels=f32([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])),
    ),
    "answers": (
        "OPTForQuestionAnswering",
        {},
        dict(start_positions=i32([-4, 10, 7]), end_positions=i32([3, 9, 99])),
    ),
}


def case_inputs(name: str, case: str, padding: str) -> dict[str, np.ndarray]:
    inputs = batch(name, padding)
    if case != "causal":
        del inputs["labels"]
    return inputs | CASES[case][2]


def values(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(param.get_value()) for path, param in named_parameters(model).items()}
