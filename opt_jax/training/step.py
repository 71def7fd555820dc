"""The training state, how it begins, where it lives on the mesh, and the one compiled update."""

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
from opt_jax.parallel.mesh import batch_sharding, replicated
from opt_jax.parallel.reductions import sum_gradients, sum_over_batch
from opt_jax.parallel.rules import named_leaves, param_sharding, per_device
from opt_jax.training.loss import IGNORED, next_token_loss

# "input_ids", "labels" (the next id of each, -100 where none counts) and, for packed documents, "segment_ids"; those of
# fine-tuning tasks are described in tasks/common.py. [A, B, T], or [B, T] of one micro-batch.
Batch = dict[str, Int[Array, "..."]]
# (model, micro-batch, dropout key or None) -> (sum of its losses, how many labels counted), inside `per_device`.
Loss = Callable[[Any, Batch, DropoutKey | None], tuple[Array, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step, as one pytree: the checkpoint, and what the step is given and donates.

    step: int32, updates done so far. model: float32, layers stacked. opt_state: of optax, its moments like the model.
    halted: a loss or gradient was not finite, so this is the state before that update, and no later one changes it.
    frozen: with LoRA, the parameters that are not trained; `model` then has only the others (see `split`). It has no
    moments, and is in no checkpoint.
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
    """(the parameters whose names are `trained`, the others): two models, each with None in place of the other's."""
    names, (leaves, structure) = named_leaves(model), jax.tree.flatten(model)
    one = [leaf if trained(name) else None for name, leaf in zip(names, leaves, strict=True)]
    other = [None if trained(name) else leaf for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, one), jax.tree.unflatten(structure, other)


def join(one: Any, other: Any) -> Any:
    """The inverse of `split`; `other` None: there is nothing to add."""
    if other is None:
        return one
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)


def new_model(config: OPTConfig, seed: int, dtype: DTypeLike, cls: type = OPTForCausalLM, **options: Any) -> Any:
    """A model with the paper's initialisation. The constructor alone initialises as HF does.

    Kernels and embeddings are normal(0, config.init_std), `out_proj` of the attention and `fc2` times 1/sqrt(2L).
    Biases are zero, and so are the rows of the pad in both embeddings.

    Args:
      cls, options: a class of model with a head, and its attn_implementation, remat, grad_dtype.
    """
    model = cls(config, rngs=nnx.Rngs(jax.random.key(seed)), dtype=dtype, scan_layers=True, **options)
    decoder, pad = model.model.decoder, config.pad_token_id
    layers: Any = decoder.layers  # one stacked layer
    for linear in (layers.self_attn.out_proj, layers.fc2):
        linear.kernel.set_value(linear.kernel.get_value() * (2 * config.num_hidden_layers) ** -0.5)
    if pad is not None:  # the constructor has zeroed the pad's row of embed_tokens; a pad's position reads row 1
        positions = decoder.embed_positions.embedding
        positions.set_value(positions.get_value().at[1].set(0))
    return model


def new_state(
    model: Any, optimizer: optax.GradientTransformation, trained: Callable[[str], bool] | None = None
) -> TrainState:
    """trained: by their names, the parameters to train. Default: all."""
    model, frozen = (model, None) if trained is None else split(model, trained)
    zeros = dict(step=jnp.zeros((), jnp.int32), halted=jnp.zeros((), bool))
    return TrainState(model=model, opt_state=optimizer.init(model), frozen=frozen, **zeros)


def checksum(tree: Any) -> int:
    """32 bits that tell float32 arrays apart; the same on any mesh, for sums of integers do not depend on the order."""

    @jax.jit
    def total(leaves: list[jax.Array]) -> jax.Array:
        sums = [jax.lax.bitcast_convert_type(leaf, jnp.uint32).sum(dtype=jnp.uint32) for leaf in leaves]
        return sum(((2 * i + 1) * part for i, part in enumerate(sums)), start=jnp.uint32(0))

    return int(total(jax.tree.leaves(tree)))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Pytree of NamedSharding like `state` (concrete or abstract): moments live where their parameter does."""

    def sharding(name: str, leaf: Any):
        parameter = re.search(r"(model\.decoder|lm_head|score|qa_outputs)\..*", name)
        return param_sharding(parameter[0], leaf.shape, mesh) if parameter else replicated(mesh)

    shardings = [sharding(name, leaf) for name, leaf in named_leaves(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), shardings)


def gathered(model: Any) -> Any:
    """What a loss begins with: all but the layers whole along `fsdp`."""
    return gather_parameters(model, model.dtype, model.model.decoder.grad_dtype)


def batch_loss(model: OPTForCausalLM, batch: Batch, dropout_key: DropoutKey | None = None) -> tuple[Array, Array]:
    """(sum of the next-token losses in float32, how many labels counted) of one micro-batch [B, T]."""
    model = gathered(model)
    segment_ids = batch.get("segment_ids")
    out = model.model.forward(batch["input_ids"], segment_ids=segment_ids, dropout_key=dropout_key)
    head = model.model.decoder.embed_tokens.embedding if model.lm_head is None else model.lm_head.kernel
    table = head.get_value().astype(model.dtype)
    loss = next_token_loss(out.last_hidden_state, table if model.lm_head is None else table.T, batch["labels"])
    return loss, (batch["labels"] != IGNORED).sum(dtype=jnp.int32)


def check_divides(config: OPTConfig, seq_len: int, mesh: Mesh) -> None:
    """ValueError for heads or tokens that do not divide over the mesh; of widths `state_shardings` says so."""
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
    """(model, batch, dropout key or None, frozen) -> (mean loss, its gradients in float32), for use in `jax.jit`.

    batch: arrays [A, B, T]. Gradients of the A micro-batches are accumulated, every counted label weighing the same.
    shardings: of the model. frozen: see `TrainState`; there are no gradients of it.

    Raises ValueError for sizes that do not divide over the mesh.
    """

    def gradients(model: Any, batch: Batch, key: jax.Array | None, frozen: Any):
        counted = sum_over_batch((batch["labels"] != IGNORED).sum(dtype=jnp.int32))
        total = jnp.maximum(counted, 1).astype(jnp.float32)
        parts, rows = batch["labels"].shape[:2]  # of this device

        def micro_gradients(batch: Batch, i: Array):
            dropout_key = DropoutKey.of(key, rows, i * rows * mesh.shape["data"] * mesh.shape["fsdp"])
            return jax.value_and_grad(lambda model: loss_of(join(model, frozen), batch, dropout_key)[0] / total)(model)

        def accumulate(carry: Any, micro: Any):
            return jax.tree.map(jnp.add, carry, micro_gradients(*micro)), None

        if parts == 1:
            loss, grads = micro_gradients(jax.tree.map(lambda x: x[0], batch), jnp.int32(0))
        else:
            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, model))
            (loss, grads), _ = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(parts, dtype=jnp.int32)))
        return sum_over_batch(loss), sum_gradients(grads)

    specs, frozen_specs = jax.tree.map(lambda sharding: sharding.spec, (shardings, frozen_shardings))
    rows, everywhere = batch_sharding(mesh, leading=1).spec, replicated(mesh).spec
    mapped = per_device(gradients, mesh, (specs, rows, everywhere, frozen_specs), (everywhere, specs))

    def checked(model: Any, batch: Batch, key: jax.Array | None = None, frozen: Any = None):
        _check(config, batch, mesh)
        return mapped(model, batch, key, frozen)

    return checked


def make_eval_step(shardings: Any, mesh: Mesh) -> Callable[[OPTForCausalLM, Batch], tuple[Array, Array]]:
    """(model, batch [1, B, T]) -> (sum of the losses, how many labels counted), compiled once."""

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
    """(state, batch) -> (next state, {"loss", "grad_norm", "lr", "skipped"}), compiled once; the state is donated.

    An update with a loss or gradient that is not finite is skipped. The next ones then are, too (by the time the host
    knows, they may be under way), unless `skip_nonfinite`.

    batch: arrays [A, B, T], see `make_gradients`. The dropout key is a function of (seed, step); its bits depend on a
    row's number in the batch of the step, and neither on the mesh nor on the number of micro-batches.
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
        # The optimizer has kept the moments of its own accord; the rest of its state are counts.
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
    """Which rows of a global batch this process's devices hold, and so `place_batch` asks for; sorted."""
    rows = np.arange(batch_size).reshape(accumulate, batch_size // accumulate)
    places = batch_sharding(mesh, leading=1).addressable_devices_indices_map(rows.shape)
    return np.unique(np.concatenate([rows[index].reshape(-1) for index in places.values()]))


def place_batch(
    rows: Callable[[slice], Mapping[str, np.ndarray]], batch_size: int, accumulate: int, mesh: Mesh
) -> Batch:
    """The global batch on the mesh, [accumulate, batch_size / accumulate, T]; each process makes only its own rows.

    rows: gives the arrays [n, T] of a range of the `batch_size` rows; micro-batch i has the i-th share of them.
    The one transfer to the devices that a training loop needs, so it passes a `transfer_guard`.
    """
    size = batch_size // accumulate

    def part(name: str, index: Any) -> np.ndarray:
        micro, (first, last, _) = range(*index[0].indices(accumulate)), index[1].indices(size)
        return np.stack([rows(slice(i * size + first, i * size + last))[name] for i in micro])

    mine = int(local_rows(batch_size, accumulate, mesh)[0])
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_callback(
                (accumulate, size, *example.shape[1:]), batch_sharding(mesh, leading=1), partial(part, name)
            )
            for name, example in rows(slice(mine, mine + 1)).items()
        }
