"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) by `qwix`: adapters beside the layers' matrices.

A kernel [I, O] gets A [I, rank] and B [rank, O], parameters `kernel_lora_a` and `kernel_lora_b` of the same module, and
counts as kernel + alpha / rank * A B. B is zero at first.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opt_jax.model.stacking import stack_layers, unstack_layers
from opt_jax.parallel.rules import named_leaves

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_HEADS = ("score.", "qa_outputs.")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """rank of the adapters; alpha / rank is their scale; targets: which matrices of every layer, of `TARGETS`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora rank {self.rank}: must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora alpha {self.alpha}: must be above 0")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            what = f"{unknown[0]!r} is unknown" if unknown else "none, or one of them twice"
            raise ValueError(f"lora targets: {what}; choose from {', '.join(TARGETS)}")

    def adapt(self, model: Any) -> Any:
        """An abstract model with stacked layers -> the same with adapters, abstract too.

        Raises:
          ImportError: without qwix.
          RuntimeError: qwix has not put in two for each target, or has elsewhere.
        """
        try:
            import qwix
        except ImportError:
            raise ImportError("LoRA needs the package qwix: pip install 'opt-jax[lora]'") from None
        provider = qwix.LoraProvider(module_path=rf".*\b({'|'.join(self.targets)})", rank=self.rank, alpha=self.alpha)

        def apply(base: Any) -> Any:
            ids = jnp.zeros((1, 8), jnp.int32)
            # `forward`, because behind the jit of `__call__` qwix sees nothing, and says nothing.
            return qwix.apply_lora_to_model(base, provider, ids, methods=("forward",), rngs=nnx.Rngs(0))

        # qwix cannot put parameters in from within a scan, nor from within `jax.checkpoint`.
        model = unstack_layers(jax.tree.map(lambda x: x, model))
        remat, model.model.decoder.remat = model.model.decoder.remat, "none"
        model.model = jax.eval_shape(apply, model.model)
        model.model.decoder.remat = remat
        model = stack_layers(model)
        found = {name for name in named_leaves(model) if is_adapter(name)}
        expected = {
            f"model.decoder.layers.{'' if target.startswith('fc') else 'self_attn.'}{target}.kernel_lora_{part}"
            for target in self.targets
            for part in "ab"
        }
        if found != expected:
            difference = ", ".join(sorted(found ^ expected))
            raise RuntimeError(f"qwix put in {len(found)} adapters, not the {len(expected)} asked for: {difference}")
        return model

    def initial(self, adapted: Any, plain: Any, seed: int) -> Any:
        """The values of `plain`, and new adapters, in the form of `adapted`; for use inside `jax.jit`.

        A is he_uniform (qwix's default, and as good as the paper's choice, for B is zero).
        """
        values, key = dict(named_leaves(plain)), jax.random.key(seed)
        for i, (name, leaf) in enumerate(named_leaves(adapted).items()):
            if name.endswith("_lora_a"):
                draw = jax.nn.initializers.he_uniform(batch_axis=tuple(range(len(leaf.shape) - 2)))
                values[name] = draw(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
            elif name.endswith("_lora_b"):
                values[name] = jnp.zeros(leaf.shape, leaf.dtype)
        return jax.tree.unflatten(jax.tree.structure(adapted), [values[name] for name in named_leaves(adapted)])

    def merge(self, adapted: Any, plain: Any) -> Any:
        """A model with adapters to one without, kernel + alpha / rank * A B, on the mesh as the kernels are.

        plain: a model of the result's form, abstract or not. One kernel at a time is changed.
        """
        values = named_leaves(adapted)
        for name in list(values):
            if not name.endswith("_lora_a"):
                continue
            kernel = name.removesuffix("_lora_a")
            merged = _merged(values[kernel].sharding, self.alpha / self.rank)
            values[kernel] = merged(values[kernel], values[name], values[f"{kernel}_lora_b"])
        return jax.tree.unflatten(jax.tree.structure(plain), [values[name] for name in named_leaves(plain)])


def _merged(sharding: Any, scale: float) -> Any:
    def merged(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        delta = jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
        return (kernel + scale * delta).astype(kernel.dtype)

    return jax.jit(merged, out_shardings=sharding)


def is_adapter(name: str) -> bool:
    return name.endswith(("_lora_a", "_lora_b"))


def is_trained(name: str) -> bool:
    """With LoRA: the adapters, and the head of a task, which is new."""
    return is_adapter(name) or name.startswith(_HEADS)
