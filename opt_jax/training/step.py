"""The training state, how it begins, where it lives on the mesh, and the one compiled update."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from opt_jax.config import OPTConfig
from opt_jax.model import OPTForCausalLM
from opt_jax.outputs import cross_entropy
from opt_jax.sharding import batch_sharding, param_sharding, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step, as one pytree: the checkpoint, and what the step is given and donates.

    step: int32, updates done so far. model: float32, layers stacked. opt_state: of optax, its moments like the model.
    """

    step: Int[Array, ""]
    model: OPTForCausalLM
    opt_state: Any


def new_model(config: OPTConfig, seed: int, dtype: DTypeLike) -> OPTForCausalLM:
    """The paper's initialisation: normal(0, config.init_std), the attention's `out_proj` and `fc2` times 1/sqrt(2L),
    biases zero, the pad's row zero in both embeddings. (The bare constructor initialises as HF does.)
    """
    model = OPTForCausalLM(config, rngs=nnx.Rngs(jax.random.key(seed)), dtype=dtype, scan_layers=True)
    decoder, pad = model.model.decoder, config.pad_token_id
    layers: Any = decoder.layers  # one stacked layer
    for linear in (layers.self_attn.out_proj, layers.fc2):
        linear.kernel.set_value(linear.kernel.get_value() * (2 * config.num_hidden_layers) ** -0.5)
    if pad is not None:  # the constructor has zeroed the pad's row of embed_tokens; a pad's position reads row 1
        positions = decoder.embed_positions.embedding
        positions.set_value(positions.get_value().at[1].set(0))
    return model


def new_state(model: OPTForCausalLM, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=optimizer.init(model))  # type: ignore[reportArgumentType]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Dotted path -> leaf, in flattening order: `model.decoder.layers.fc1.kernel`, `opt_state.1.count`, ..."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves)
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Pytree of NamedSharding like `state` (concrete or abstract): moments live where their parameter does."""

    def sharding(name: str, leaf: Any):
        parameter = re.search(r"(model\.decoder|lm_head)\..*", name)
        return param_sharding(parameter[0], leaf.shape, mesh) if parameter else replicated(mesh)

    shardings = [sharding(name, leaf) for name, leaf in named_leaves(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), shardings)


def batch_loss(model: OPTForCausalLM, batch: Int[Array, "B T+1"], dropout_key: jax.Array | None = None):
    """Mean next-token loss in float32; the last id of a row is a target only, the first an input only."""
    return cross_entropy(model.forward(batch[:, :-1], dropout_key=dropout_key).logits, batch[:, 1:])


def make_train_step(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: OPTConfig,
    seed: int,
    shardings: Any,
    mesh: Mesh,
) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """(state, batch [B, T + 1]) -> (next state, {"loss", "grad_norm", "lr"}), compiled once; the state is donated.

    The dropout key is a function of (seed, step), and its bits do not depend on the mesh.
    """
    uses_dropout = max(config.dropout, config.attention_dropout, config.layerdrop) > 0

    def train_step(state: TrainState, batch: Array) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if uses_dropout else None
        loss, grads = jax.value_and_grad(batch_loss)(state.model, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)  # type: ignore[reportArgumentType]
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "lr": schedule(state.step)}
        model = optax.apply_updates(state.model, updates)  # type: ignore[reportArgumentType]
        return TrainState(step=state.step + 1, model=model, opt_state=opt_state), metrics  # type: ignore[reportArgumentType]

    everywhere = replicated(mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, everywhere),
    )


def place_batch(rows: Callable[[slice], Any], shape: tuple[int, int], mesh: Mesh) -> Array:
    """The global batch on the mesh; each process makes only the rows its own devices hold.

    The one transfer to the devices that a training loop needs, so it passes a `transfer_guard`.
    """
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, batch_sharding(mesh), lambda index: rows(index[0]))  # type: ignore[reportOptionalSubscript]
