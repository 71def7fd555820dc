"""Sparse autoencoders: activations as sums of few features out of many.

Bricken et al. 2023, "Towards Monosemanticity", https://transformer-circuits.pub/2023/monosemantic-features, and
Cunningham et al. 2023, https://arxiv.org/abs/2309.08600.

features = relu((x - b_dec) @ W_enc + b_enc), and x is about features @ W_dec + b_dec. Files are those of SAELens 6
(https://github.com/decoderesearch/SAELens), architecture "standard": `cfg.json` and `sae_weights.safetensors`.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float
from safetensors.numpy import save

from opt_jax.checkpoints.formats.safetensors import read_safetensors
from opt_jax.model.interventions import Hook, Intervention
from opt_jax.system.disk import disk_errors
from opt_jax.system.messages import shown
from opt_jax.system.reading import json_object, read_small
from opt_jax.system.temporary import write_file

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SAMPLE = 8192  # activations whose mean and length initialise the autoencoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SAE:
    """A sparse autoencoder, D -> M features -> D; a pytree. Row m of W_dec is the direction of feature m.

    Attributes:
      W_enc: [D, M].
      b_enc: [M].
      W_dec: [M, D].
      b_dec: [D].
      hook_name: the point whose activations it takes. At `attn.hook_z`, [H, K], all heads together: D is H * K.
      centred: whether b_dec is subtracted from the input (SAELens: apply_b_dec_to_input).
    """

    W_enc: Float[Array, "D M"]
    b_enc: Float[Array, " M"]
    W_dec: Float[Array, "M D"]
    b_dec: Float[Array, " D"]
    hook_name: str | None = dataclasses.field(default=None, metadata=dict(static=True))
    centred: bool = dataclasses.field(default=True, metadata=dict(static=True))

    def encode(self, x: Float[Array, "*N D"]) -> Float[Array, "*N M"]:
        """The features of activations, 0 or more."""
        x = x.astype(self.W_enc.dtype)
        x = x - _row(self.b_dec, x) if self.centred else x
        return jax.nn.relu(jnp.dot(x, self.W_enc, precision=lax.Precision.HIGHEST) + _row(self.b_enc, x))

    def decode(self, features: Float[Array, "*N M"]) -> Float[Array, "*N D"]:
        """The activations of features."""
        return jnp.dot(features, self.W_dec, precision=lax.Precision.HIGHEST) + _row(self.b_dec, features)


def _row(vector: Array, like: Array) -> Array:
    """The vector with as many axes as `like`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reconstruct(Intervention):
    """Puts the reconstruction in the place of the activation: `hooks={sae.hook_name: Reconstruct(sae)}`.

    Attributes:
      sae: the autoencoder.
      factor: [M] or a number, with which features are multiplied before they are decoded; 0 removes one.
      keep_error: add what the autoencoder does not reconstruct, so that with factor 1 nothing changes.
    """

    sae: SAE
    factor: Any = 1.0
    keep_error: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def changed(self, value: Array, hook: Hook) -> Array:
        width = self.sae.b_dec.shape[0]
        x = value if value.shape[-1] == width else value.reshape(*value.shape[:2], -1)
        if x.shape[-1] != width:
            raise ValueError(f"{hook.name} is {value.shape} here, but the autoencoder takes [..., {width}]")
        features = self.sae.encode(x)
        factor = jnp.atleast_1d(jnp.asarray(self.factor, features.dtype))
        new = self.sae.decode(features * _row(factor, features))
        if self.keep_error:
            new = x.astype(new.dtype) + (new - self.sae.decode(features))
        return new.reshape(value.shape).astype(value.dtype)


def train_sae(
    x: Any,
    features: int,
    *,
    l1: float = 5.0,
    steps: int = 10_000,
    batch_size: int = 4096,
    learning_rate: float = 3e-4,
    seed: int = 0,
    hook_name: str | None = None,
    progress: Callable[[int, Mapping[str, float]], object] | None = None,
) -> tuple[SAE, dict[str, np.ndarray]]:
    """An autoencoder trained with Adam on stored activations, of which each step draws some.

    The loss of an activation is |x - reconstruction|^2 + l1 * sum_m features_m * |W_dec_m|, for activations scaled to a
    mean length of sqrt(D), so that `l1` means about the same in each layer. (Bricken et al. keep |W_dec_m| at 1
    instead. Dead features are not revived.) The scale is folded into the result. The first fifth of the steps raises
    l1 from 0, the last fifth lowers the learning rate to 0. The same arguments give the same autoencoder.

    Args:
      x: [N, D] or [N, H, K], such as a memory-mapped array of `collect`. Only the rows of a step are read.
      features: M.
      l1: the strength of the penalty; more: fewer features at a time, and a worse reconstruction.
      steps, batch_size, learning_rate: of Adam.
      seed: of the initial weights and the order.
      hook_name: the point, kept in the result.
      progress: called with (steps done, the last measures) a hundred times.

    Returns:
      The autoencoder, and the measures of each step: `loss`; `unexplained`, the share of the variance that the
      reconstruction misses; `active`, the features above 0 of an activation.

    Raises:
      ValueError: x is not [N, D], is empty, or the loss is not finite.
    """
    if np.ndim(x) not in (2, 3) or not len(x):
        raise ValueError(f"x must be [N, D] or [N, H, K], with N above 0, not {np.shape(x)}")
    draw = np.random.default_rng(seed)

    def draw_rows(count: int) -> np.ndarray:
        rows = np.sort(draw.integers(len(x), size=count))
        return np.asarray(x[rows], np.float32).reshape(count, -1)

    sample = draw_rows(_SAMPLE)
    scale = float(np.sqrt(sample.shape[1]) / np.linalg.norm(sample, axis=1).mean())
    directions = draw.standard_normal((features, sample.shape[1]), np.float32)
    directions *= 0.1 / np.linalg.norm(directions, axis=1, keepdims=True)
    centre = jnp.asarray(sample.mean(axis=0) * scale)
    sae: Any = SAE(jnp.asarray(directions.T.copy()), jnp.zeros(features, jnp.float32), jnp.asarray(directions), centre)
    decay = optax.linear_schedule(learning_rate, 0.0, max(steps // 5, 1), steps - steps // 5)
    optimizer = optax.adam(decay, b1=0.9, b2=0.999)

    @jax.jit
    def step(sae: Any, state: Any, batch: Array, strength: Array) -> tuple[Any, Any, dict[str, Array]]:
        (_, measures), gradient = jax.value_and_grad(_loss, has_aux=True)(sae, batch * scale, strength)
        with jax.numpy_dtype_promotion("standard"):  # optax's schedule mixes dtypes
            updates, state = optimizer.update(gradient, state, sae)
        return optax.apply_updates(sae, updates), state, measures

    state, history = optimizer.init(sae), []
    for done in range(1, steps + 1):
        strength = jnp.float32(l1 * min(1.0, done / max(steps // 5, 1)))
        sae, state, measures = step(sae, state, jnp.asarray(draw_rows(batch_size)), strength)
        history.append(measures)
        if progress is not None and done % max(steps // 100, 1) == 0:
            progress(done, {name: float(value) for name, value in measures.items()})
    measures = {name: np.array([one[name] for one in jax.device_get(history)]) for name in _MEASURES}
    if not np.isfinite(measures["loss"]).all():
        raise ValueError("the loss is not finite: x holds NaN or infinity, or the learning rate is too high")
    folded = dict(W_enc=sae.W_enc * scale, W_dec=sae.W_dec / scale, b_dec=sae.b_dec / scale, hook_name=hook_name)
    return dataclasses.replace(sae, **folded), measures


_MEASURES = ("loss", "unexplained", "active")


def _loss(sae: SAE, x: Float[Array, "N D"], l1: Float[Array, ""]) -> tuple[Array, dict[str, Array]]:
    features = sae.encode(x)
    errors = jnp.square(sae.decode(features) - x).sum(axis=-1).mean()
    penalty = (features * jnp.linalg.norm(sae.W_dec, axis=-1)[None]).sum(axis=-1).mean()
    variance = jnp.square(x - x.mean(axis=0)[None]).sum(axis=-1).mean()
    loss = errors + l1 * penalty
    active = (features > 0).sum(axis=-1).astype(jnp.float32).mean()
    return loss, dict(loss=loss, unexplained=errors / variance, active=active)


def save_sae(sae: SAE, directory: str | os.PathLike, model_name: str | None = None) -> None:
    """Write an autoencoder as SAELens 6 does: `SAE.load_from_disk(directory)` reads it there."""
    path = Path(directory)
    dtype = str(sae.W_enc.dtype)
    reshape = "hook_z" if (sae.hook_name or "").endswith("hook_z") else "none"
    config = dict(d_in=len(sae.b_dec), d_sae=len(sae.b_enc), dtype=dtype, device="cpu", architecture="standard")
    config |= dict(apply_b_dec_to_input=sae.centred, normalize_activations="none", reshape_activations=reshape)
    about = dict(model_name=model_name, hook_name=sae.hook_name, sae_lens_version=_VERSION)
    arrays = {name: np.ascontiguousarray(getattr(sae, name)) for name in _ARRAYS}
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / WEIGHTS, save(arrays))
        write_file(path / CONFIG, json.dumps(config | dict(metadata=about)).encode())


_VERSION = "6.0.0"  # whose form of cfg.json this is
_ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec")
# Field of cfg.json -> the values with which the autoencoder is the one described above. Absent or null: the first.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "architecture": ("standard",),
    "activation_fn": ("relu",),
    "activation_fn_str": ("relu",),
    "normalize_activations": ("none", False),
    "reshape_activations": ("none", "hook_z"),
    "finetuning_scaling_factor": (False,),
}


def load_sae(directory: str | os.PathLike) -> SAE:
    """The autoencoder in a directory that SAELens or `save_sae` has written.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: another architecture (top-k, gated, JumpReLU, ...), or inputs that are normalised; damaged files.
    """
    path = Path(directory)
    config = json_object(read_small(path / CONFIG), path / CONFIG)
    for name, known in _KNOWN.items():
        if config.get(name) is not None and config[name] not in known:
            raise ValueError(f"{path / CONFIG}: {name}={shown(config[name])}, but only {shown(known[0])} is read")
    tensors = read_safetensors(path / WEIGHTS)
    for name in tensors:
        if name not in _ARRAYS and not (name == "scaling_factor" and np.all(np.asarray(tensors[name]) == 1)):
            raise ValueError(f"{path / WEIGHTS}: {shown(name)} is no part of a standard autoencoder")
    metadata = config.get("metadata") or config  # before SAELens 6, all in one object
    name = metadata.get("hook_name") or metadata.get("hook_point")
    shapes = {name: np.shape(tensors[name]) if name in tensors else () for name in _ARRAYS}
    (inputs, width), expected = (shapes["W_enc"] + (0, 0))[:2], {}
    expected = dict(W_enc=(inputs, width), b_enc=(width,), W_dec=(width, inputs), b_dec=(inputs,))
    if shapes != expected or 0 in (inputs, width):
        raise ValueError(f"{path / WEIGHTS}: shapes {shapes} do not belong together")
    arrays: dict[str, Any] = {name: jnp.asarray(np.array(tensors[name])) for name in _ARRAYS}
    return SAE(**arrays, hook_name=name, centred=config.get("apply_b_dec_to_input", True) is not False)
