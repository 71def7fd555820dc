"""The training state, its first value, its shardings, and the compiled update."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from opt_jax.config import OPTConfig
from opt_jax.model.attention import DropoutKey
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.parallel.collectives import gather_parameters
from opt_jax.parallel.mesh import batch_sharding, per_device, replicated
from opt_jax.parallel.reductions import sum_gradients, sum_over_batch
from opt_jax.parallel.rules import named_leaves, param_sharding
from opt_jax.training.loss import IGNORED, next_token_loss

# Arrays [A, B, T], or [B, T] for one micro-batch: "input_ids", "labels" (the next ids; -100 does not count) and, for
# packed documents, "segment_ids". tasks/common.py describes the batches of fine-tuning tasks.
Batch = dict[str, Int[Array, "..."]]
# (model, micro-batch, dropout key or None) -> (sum of the losses, number of labels that count), inside `per_device`.
Loss = Callable[[Any, Batch, DropoutKey | None], tuple[Array, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step, as one pytree. Checkpoints hold it, and the compiled step donates it.

    Attributes:
      step: int32, the number of updates done so far.
      model: the trained parameters in float32, with stacked layers.
      opt_state: optax's state. Its moments have the shapes of `model`.
      halted: true if a loss or gradient was not finite. This is the state before that update, and later steps do not
        change it.
      frozen: with LoRA, the parameters that are not trained; `model` then has only the others (see `split`). They have
        no moments and are in no checkpoint.
    """

    step: Int[Array, ""]
    model: Any
    opt_state: Any
    halted: Bool[Array, ""]
    frozen: Any = None

    @property
    def full_model(self) -> Any:
        """The model with all of its parameters."""
        return join(self.model, self.frozen)


def split(model: Any, trained: Callable[[str], bool]) -> tuple[Any, Any]:
    """Two models: one with the parameters for whose names `trained` is true, one with the others. The rest are None."""
    names, (leaves, structure) = named_leaves(model), jax.tree.flatten(model)
    one = [leaf if trained(name) else None for name, leaf in zip(names, leaves, strict=True)]
    other = [None if trained(name) else leaf for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, one), jax.tree.unflatten(structure, other)


def join(one: Any, other: Any) -> Any:
    """The model that `split` has split. If `other` is None, `one` is all of it."""
    if other is None:
        return one
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)


def new_model(config: OPTConfig, seed: int, dtype: DTypeLike, cls: type = OPTForCausalLM, **options: Any) -> Any:
    """A model with the paper's initialisation and stacked layers.

    Kernels and embeddings are normal(0, config.init_std); those of the attention's `out_proj` and of `fc2` are scaled
    by 1/sqrt(2L). Biases are zero, and so are the pad's rows in both embeddings. Deviation from HF, which the
    constructor follows: the scale, and the zero row of the positions.

    Args:
      seed: for the weights.
      dtype: the dtype of the computation. Parameters are float32.
      cls: a class of model with a head.
      options: its attn_implementation, remat and grad_dtype.
    """
    model = cls(config, rngs=nnx.Rngs(jax.random.key(seed)), dtype=dtype, scan_layers=True, **options)
    decoder, pad = model.model.decoder, config.pad_token_id
    layers: Any = decoder.layers  # one stacked layer
    for linear in (layers.self_attn.out_proj, layers.fc2):
        linear.kernel.set_value(linear.kernel.get_value() * (2 * config.num_hidden_layers) ** -0.5)
    if pad is not None:  # the constructor has zeroed the pad's row of embed_tokens; pads have row 1 of the positions
        positions = decoder.embed_positions.embedding
        positions.set_value(positions.get_value().at[1].set(0))
    return model


def new_state(
    model: Any, optimizer: optax.GradientTransformation, trained: Callable[[str], bool] | None = None
) -> TrainState:
    """The state before the first update.

    Args:
      trained: true for the names of the parameters to train. Default: all are trained.
    """
    model, frozen = (model, None) if trained is None else split(model, trained)
    zeros = dict(step=jnp.zeros((), jnp.int32), halted=jnp.zeros((), bool))
    return TrainState(model=model, opt_state=optimizer.init(model), frozen=frozen, **zeros)


def checksum(tree: Any) -> int:
    """A checksum of 32 bits of a pytree of float32 arrays. It is the same on all meshes, because it adds integers."""

    @jax.jit
    def total(leaves: list[jax.Array]) -> jax.Array:
        sums = [jax.lax.bitcast_convert_type(leaf, jnp.uint32).sum(dtype=jnp.uint32) for leaf in leaves]
        return sum(((2 * i + 1) * part for i, part in enumerate(sums)), start=jnp.uint32(0))

    return int(total(jax.tree.leaves(tree)))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A pytree of `NamedSharding`s like `state`, whose leaves may be abstract. Moments have their parameter's sharding.

    Raises:
      ValueError: see `rules.param_sharding`.
    """

    def sharding(name: str, leaf: Any):
        parameter = re.search(r"(model\.decoder|lm_head|score|qa_outputs)\..*", name)
        return param_sharding(parameter[0], leaf.shape, mesh) if parameter else replicated(mesh)

    shardings = [sharding(name, leaf) for name, leaf in named_leaves(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), shardings)


def gathered(model: Any) -> Any:
    """The model with all parameters but those of the layers gathered along `fsdp`, as a loss needs it."""
    return gather_parameters(model, model.dtype, model.model.decoder.grad_dtype)


def batch_loss(model: OPTForCausalLM, batch: Batch, dropout_key: DropoutKey | None = None) -> tuple[Array, Array]:
    """The sum of the next-token losses of one micro-batch [B, T] in float32, and the number of labels that count."""
    model = gathered(model)
    segment_ids = batch.get("segment_ids")
    out = model.model.forward(batch["input_ids"], segment_ids=segment_ids, dropout_key=dropout_key)
    head = model.model.decoder.embed_tokens.embedding if model.lm_head is None else model.lm_head.kernel
    table = head.get_value().astype(model.dtype)
    loss = next_token_loss(out.last_hidden_state, table if model.lm_head is None else table.T, batch["labels"])
    return loss, (batch["labels"] != IGNORED).sum(dtype=jnp.int32)


def check_divides(config: OPTConfig, seq_len: int, mesh: Mesh) -> None:
    """Check that heads and tokens divide over the mesh. For parameters, `state_shardings` checks it.

    Raises:
      ValueError: they do not.
    """
    tensor = mesh.shape["tensor"]
    for what, size in {"attention heads": config.num_attention_heads, "tokens per sequence": seq_len}.items():
        if size % tensor:
            raise ValueError(f"{size} {what} do not divide over mesh axis tensor={tensor}")


def _check(config: OPTConfig, batch: Batch, mesh: Mesh) -> None:
    rows, tokens = batch["input_ids"].shape[1:]
    check_divides(config, tokens, mesh)
    if rows % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(f"{rows} sequences in a micro-batch do not divide over the mesh's data x fsdp = {parts}")


def make_gradients(
    config: OPTConfig, shardings: Any, mesh: Mesh, loss_of: Loss = batch_loss, frozen_shardings: Any = None
) -> Callable[..., tuple[Array, Any]]:
    """A function that returns the mean loss of a batch and its gradients in float32, for use in `jax.jit`.

    Its arguments are the model, a batch of arrays [A, B, T], a dropout key or None, and the frozen parameters (see
    `TrainState`), which get no gradients. It adds up the gradients of the A micro-batches. All labels that count have
    the same weight.

    Args:
      frozen_shardings: of the frozen parameters.

    Raises:
      ValueError: the returned function raises it for sizes that do not divide over the mesh.
    """

    def gradients(model: Any, batch: Batch, key: jax.Array | None, frozen: Any):
        counted = sum_over_batch((batch["labels"] != IGNORED).sum(dtype=jnp.int32))
        total = jnp.maximum(counted, 1).astype(jnp.float32)
        micro_batches, rows = batch["labels"].shape[:2]  # of this device

        def micro_gradients(batch: Batch, i: Array):
            dropout_key = DropoutKey.of(key, rows, i * rows * mesh.shape["data"] * mesh.shape["fsdp"])
            return jax.value_and_grad(lambda model: loss_of(join(model, frozen), batch, dropout_key)[0] / total)(model)

        def accumulate(carry: Any, micro: Any):
            return jax.tree.map(jnp.add, carry, micro_gradients(*micro)), None

        if micro_batches == 1:
            loss, grads = micro_gradients(jax.tree.map(lambda x: x[0], batch), jnp.int32(0))
        else:
            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, model))
            (loss, grads), _ = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(micro_batches, dtype=jnp.int32)))
        return sum_over_batch(loss), sum_gradients(grads)

    specs, frozen_specs = jax.tree.map(lambda sharding: sharding.spec, (shardings, frozen_shardings))
    rows, everywhere = batch_sharding(mesh, leading=1).spec, replicated(mesh).spec
    mapped = per_device(gradients, mesh, (specs, rows, everywhere, frozen_specs), (everywhere, specs))

    def checked(model: Any, batch: Batch, key: jax.Array | None = None, frozen: Any = None):
        _check(config, batch, mesh)
        return mapped(model, batch, key, frozen)

    return checked


def make_eval_step(shardings: Any, mesh: Mesh) -> Callable[[OPTForCausalLM, Batch], tuple[Array, Array]]:
    """A jitted function: (model, batch [1, B, T]) -> (sum of the losses, number of labels that count)."""

    def losses(model: OPTForCausalLM, batch: Batch):
        loss, count = batch_loss(model, jax.tree.map(lambda x: x[0], batch))
        return sum_over_batch(loss), sum_over_batch(count)

    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    rows, everywhere = batch_sharding(mesh, leading=1), replicated(mesh)
    mapped = per_device(losses, mesh, (specs, rows.spec), everywhere.spec)
    return jax.jit(mapped, in_shardings=(shardings, rows), out_shardings=everywhere)


def make_train_step(
    optimizer: optax.GradientTransformationExtraArgs,  # of `make_optimizer`
    schedule: optax.Schedule,
    config: OPTConfig,
    seed: int,
    shardings: Any,
    mesh: Mesh,
    skip_nonfinite: bool = False,
    loss_of: Loss = batch_loss,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A jitted function: (state, batch [A, B, T]) -> (next state, {"loss", "grad_norm", "lr", "skipped"}).

    It donates the state. It skips an update whose loss or gradient is not finite. Unless `skip_nonfinite`, it then
    skips all later updates, too, because the host may have dispatched some before it knows.

    Dropout depends on (seed, step) and on a row's index in the global batch, neither on the mesh nor on the number of
    micro-batches.

    Args:
      seed: for dropout.
      shardings: of the training state.
      skip_nonfinite: go on after an update that is not finite.
    """
    uses_dropout = max(config.dropout, config.attention_dropout, config.layerdrop) > 0
    gradients = make_gradients(config, shardings.model, mesh, loss_of, shardings.frozen)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        frozen, state = state.frozen, dataclasses.replace(state, frozen=None)
        key = jax.random.fold_in(jax.random.key(seed), state.step) if uses_dropout else None
        loss, grads = gradients(state.model, batch, key, frozen)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        skipped = ~finite | state.halted
        keep = partial(jnp.where, skipped)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model, skipped=skipped)  # type: ignore[reportArgumentType]
        # The optimizer itself has kept the moments of a skipped update. The rest of its state are counts.
        opt_state = jax.tree.map(lambda old, new: new if old.ndim else keep(old, new), state.opt_state, opt_state)
        model: Any = jax.tree.map(keep, state.model, optax.apply_updates(state.model, updates))  # type: ignore[reportArgumentType]
        halted = state.halted | (~finite & (not skip_nonfinite))
        new = TrainState(keep(state.step, state.step + 1), model, opt_state, halted, frozen)
        metrics: dict[str, Any] = {"loss": loss, "grad_norm": norm, "lr": schedule(state.step), "skipped": skipped}
        return new, metrics

    everywhere = replicated(mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, leading=1)),
        out_shardings=(shardings, everywhere),
    )


def local_rows(batch_size: int, accumulate: int, mesh: Mesh) -> np.ndarray:
    """The sorted indices of the rows of a global batch that this process's devices hold (see `place_batch`)."""
    rows = np.arange(batch_size).reshape(accumulate, batch_size // accumulate)
    indices = batch_sharding(mesh, leading=1).addressable_devices_indices_map(rows.shape)
    return np.unique(np.concatenate([rows[index].reshape(-1) for index in indices.values()]))


def place_batch(
    rows: Callable[[slice], Mapping[str, np.ndarray]], batch_size: int, accumulate: int, mesh: Mesh
) -> Batch:
    """The global batch on the mesh, arrays [accumulate, batch_size / accumulate, T].

    Each process asks only for its own rows. This is the only transfer to the devices in the training loop, so a
    `transfer_guard` allows it.

    Args:
      rows: returns the arrays [n, T] of a slice of the `batch_size` rows. Micro-batch i has the i-th part of the rows.
      accumulate: number of micro-batches.
    """
    size = batch_size // accumulate

    def shard(name: str, index: Any) -> np.ndarray:
        micro, (first, last, _) = range(*index[0].indices(accumulate)), index[1].indices(size)
        return np.stack([rows(slice(i * size + first, i * size + last))[name] for i in micro])

    first_local = int(local_rows(batch_size, accumulate, mesh)[0])
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_callback(
                (accumulate, size, *example.shape[1:]), batch_sharding(mesh, leading=1), partial(shard, name)
            )
            for name, example in rows(slice(first_local, first_local + 1)).items()
        }
