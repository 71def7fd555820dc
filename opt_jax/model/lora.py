"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) by `qwix`: adapters for the matrices of layers.

A kernel [I, O] gets A [I, rank] and B [rank, O], as parameters `kernel_lora_a` and `kernel_lora_b` of the same module.
The module then computes with kernel + alpha / rank * A B. B starts at zero.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opt_jax.model.packed_models import refuse_packed
from opt_jax.model.stacking import stack_layers, unstack_layers
from opt_jax.parallel.rules import named_leaves

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_HEADS = ("score.", "qa_outputs.")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Options of LoRA.

    Attributes:
      rank: the rank of the adapters.
      alpha: alpha / rank is the scale of the adapters.
      targets: which matrices of every layer get adapters: names in `TARGETS`.
    """

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
        """The model with adapters. `model` and the result are abstract and have stacked layers.

        Raises:
          ImportError: qwix is not installed.
          RuntimeError: qwix did not add exactly A and B for each target.
          ValueError: the model has no head, or packed matrices.
        """
        if model.base_model is model:
            raise ValueError(f"LoRA adapts models with a head, and not {type(model).__name__}")
        refuse_packed(model)
        try:
            import qwix
        except ImportError:
            raise ImportError("LoRA needs the package qwix: pip install qwix") from None
        provider = qwix.LoraProvider(module_path=rf".*\b({'|'.join(self.targets)})", rank=self.rank, alpha=self.alpha)

        def apply(base: Any) -> Any:
            ids = jnp.zeros((1, 8), jnp.int32)
            # `forward`, because qwix does not see modules inside the `jax.jit` of `__call__`, and gives no error.
            return qwix.apply_lora_to_model(base, provider, ids, methods=("forward",), rngs=nnx.Rngs(0))

        # qwix cannot add parameters inside `lax.scan` or `jax.checkpoint`.
        model = unstack_layers(jax.tree.map(lambda x: x, model))
        remat, model.model.decoder.remat = model.model.decoder.remat, "none"
        model.model = jax.eval_shape(apply, model.model)
        model.model.decoder.remat = remat
        model = stack_layers(model)
        adapters = {name for name in named_leaves(model) if is_adapter(name)}
        expected = {
            f"model.decoder.layers.{'' if target.startswith('fc') else 'self_attn.'}{target}.kernel_lora_{part}"
            for target in self.targets
            for part in "ab"
        }
        if adapters != expected:
            difference = ", ".join(sorted(adapters ^ expected))
            raise RuntimeError(f"qwix added {len(adapters)} adapters instead of {len(expected)}: {difference}")
        return model

    def initial(self, adapted: Any, plain: Any, seed: int) -> Any:
        """A model of the structure of `adapted`, with the values of `plain` and new adapters. For use inside `jax.jit`.

        A is he_uniform, the default of qwix. It is as good as the paper's choice, because B is zero.
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
        """The model without adapters: kernel + alpha / rank * A B, with the sharding of the kernels.

        Args:
          adapted: a model with adapters. Kernels are merged one at a time.
          plain: a model with the structure of the result, abstract or not.
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
    """Whether LoRA trains the parameter: the adapters, and the head of a task, which is new."""
    return is_adapter(name) or name.startswith(_HEADS)
