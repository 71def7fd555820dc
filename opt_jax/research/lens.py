"""The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") and the tuned lens (Belrose et al. 2023,
https://arxiv.org/abs/2303.08112): what a model would predict if it ended before a layer.

Shapes: L layers, B batch, T tokens, D hidden_size, V vocab_size. State i is the residual stream that enters layer i,
`blocks.{i}.hook_resid_pre`: in pre-norm and in post-norm models what `transformers` calls `hidden_states[i]`. State L
leaves the last layer. A state goes through the final LayerNorm and `project_out`, where the model has them, and the LM
head. So the lens of state L is the model itself.
"""  # noqa: D205

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
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
from opt_jax.checkpoints.formats.torch_files import read_torch
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.research.figures import heatmap, printable
from opt_jax.system.messages import shown
from opt_jax.system.reading import json_object, read_small
from opt_jax.system.temporary import write_file

_TYPE = "linear_tuned_lens"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TunedLens:
    """A translator for each state but the last: state + state @ kernel + bias. A pytree.

    Attributes:
      kernel: float32 [L, D, D], from input to output.
      bias: float32 [L, D].
    """

    kernel: Float[Array, "L D D"]
    bias: Float[Array, "L D"]

    @classmethod
    def identity(cls, config: Any) -> "TunedLens":
        """The lens that changes no state: the logit lens."""
        depth, width = config.num_hidden_layers, config.hidden_size
        return cls(jnp.zeros((depth, width, width), jnp.float32), jnp.zeros((depth, width), jnp.float32))


def logit_lens(
    model: OPTForCausalLM,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    lens: TunedLens | None = None,
    reduce: Callable[[Array], Any] | None = None,
) -> Any:
    """The logits of each state, float32 [L + 1, B, T, V]. The last of them are the model's.

    Args:
      model: a causal language model, with separate or stacked layers.
      input_ids, attention_mask: as in a call of the model.
      lens: a tuned lens. None: the logit lens.
      reduce: function(logits [B, T, V]) -> what to keep of a state, such as `lambda x: x.argmax(-1)`. The logits of one
        state at a time are then in memory. JAX compiles it, once for each function object.

    Raises:
      ValueError: a model without an LM head, a lens of another shape, or as a call of the model.
    """
    _check(model, lens)
    return _read(model, lens, _states(model, input_ids, attention_mask), reduce)


def _check(model: Any, lens: TunedLens | None) -> None:
    if not isinstance(model, OPTForCausalLM):
        raise ValueError(f"a lens needs the LM head of an OPTForCausalLM; this is an {type(model).__name__}")
    shape = (model.config.num_hidden_layers, model.config.hidden_size, model.config.hidden_size)
    if lens is not None and (lens.kernel.shape != shape or lens.bias.shape != shape[:2]):
        raise ValueError(
            f"the lens has kernels {lens.kernel.shape}, and the model needs {shape} (layers, width, width)"
        )


def _states(model: OPTForCausalLM, input_ids: Any, attention_mask: Any) -> Float[Array, "states B T D"]:
    last = "hook_resid_post" if model.config.do_layer_norm_before else "ln2.hook_normalized"
    names = [f"blocks.{i}.hook_resid_pre" for i in range(model.config.num_hidden_layers)]
    names.append(f"blocks.{model.config.num_hidden_layers - 1}.{last}")
    _, kept = model.base_model.run_with_cache(input_ids, attention_mask, names=names)
    return jnp.stack([kept[name] for name in names])


def unembed(model: OPTForCausalLM, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """The logits of a state: final LayerNorm, `project_out` and LM head, for use inside `jax.jit`."""
    decoder = model.model.decoder
    x = x if decoder.final_layer_norm is None else decoder.final_layer_norm(x, "ln_final")
    return model.logits(x if decoder.project_out is None else decoder.project_out(x))


def _translated(x: Float[Array, "B T D"], kernel: Float[Array, "D D"], bias: Float[Array, " D"]) -> Array:
    wide = x.astype(jnp.float32)
    return (wide + wide @ kernel + bias[None, None]).astype(x.dtype)


@partial(jax.jit, static_argnums=3)
def _read(model: OPTForCausalLM, lens: TunedLens | None, states: Array, reduce: Callable[[Array], Any] | None) -> Any:
    if lens is not None:
        translated = lax.map(lambda each: _translated(*each), (states[:-1], lens.kernel, lens.bias))
        states = jnp.concatenate([translated, states[-1:]])
    return lax.map(lambda x: unembed(model, x) if reduce is None else reduce(unembed(model, x)), states)


def train_tuned_lens(
    model: OPTForCausalLM,
    batches: Iterable[Any],
    *,
    optimizer: optax.GradientTransformation | None = None,
    lens: TunedLens | None = None,
) -> tuple[TunedLens, np.ndarray]:
    """A tuned lens, and the loss of each step and layer, [steps, L], in nats.

    The loss of a layer is the mean over real tokens of KL(model's prediction || lens's prediction). The model does not
    change, and no layer's translator depends on another's.

    Args:
      model: a causal language model.
      batches: one for each step: ids [B, T], or a mapping with `input_ids` and `attention_mask`, as tokenizers return.
      optimizer: of the sum of the layers' losses. The default is `optax.adam(1e-3)`.
      lens: where to start. The default is the identity.

    Raises:
      ValueError: no batch; or as `logit_lens`.
    """
    _check(model, lens)
    trained = TunedLens.identity(model.config) if lens is None else lens
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    step, state, losses = jax.jit(partial(_step, optimizer)), optimizer.init(trained), []  # type: ignore[reportArgumentType]
    for batch in batches:
        ids, mask = (batch["input_ids"], batch.get("attention_mask")) if isinstance(batch, Mapping) else (batch, None)
        states = _states(model, ids, mask)
        real = jnp.ones(states.shape[1:3], bool) if mask is None else jnp.asarray(mask) > 0
        trained, state, loss = step(model, trained, state, states, real)
        losses.append(loss)
    if not losses:
        raise ValueError("batches is empty: a lens needs at least one batch to learn from")
    return trained, np.asarray(jnp.stack(losses))


def _step(optimizer: Any, model: OPTForCausalLM, lens: TunedLens, state: Any, states: Array, real: Array) -> Any:
    target = jax.nn.log_softmax(unembed(model, states[-1]))

    def loss(lens: TunedLens, x: Array) -> Array:
        guess = jax.nn.log_softmax(unembed(model, _translated(x, lens.kernel, lens.bias)))
        divergence = (jnp.exp(target) * (target - guess)).sum(axis=-1)
        return jnp.where(real, divergence, 0).sum() / real.sum(dtype=jnp.float32)

    # Layer by layer, so that the logits of one layer at a time are in memory.
    losses, gradients = lax.map(lambda each: jax.value_and_grad(loss)(*each), (lens, states[:-1]))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        updates, state = optimizer.update(gradients, state, lens)
        return optax.apply_updates(lens, updates), state, losses  # type: ignore[reportArgumentType]


def save_tuned_lens(lens: TunedLens, directory: Any, model: OPTForCausalLM) -> None:
    """Write a lens in the layout of the package `tuned-lens`, with `params.safetensors` in place of `params.pt`.

    No torch file is written. With torch: `torch.save(safetensors.torch.load_file("params.safetensors"), "params.pt")`.

    Args:
      lens: the lens.
      directory: a local one, made if missing. Files in it are replaced.
      model: its model, whose name goes into `config.json`.
    """
    _check(model, lens)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for i, (kernel, bias) in enumerate(zip(np.asarray(lens.kernel), np.asarray(lens.bias), strict=True)):
        tensors |= {f"{i}.weight": np.ascontiguousarray(kernel.T), f"{i}.bias": bias}
    config = dict(base_model_name_or_path=model.name_or_path or "", d_model=model.config.hidden_size)
    config |= dict(num_hidden_layers=model.config.num_hidden_layers, bias=True, base_model_revision=None)
    config |= dict(unembed_hash=None, lens_type=_TYPE)
    write_file(path / "params.safetensors", save(tensors))
    write_file(path / "config.json", json.dumps(config, indent=2).encode())


def load_tuned_lens(directory: Any, model: OPTForCausalLM) -> TunedLens:
    """A lens as the package `tuned-lens` publishes it: `config.json`, and `params.pt` or `params.safetensors`.

    No code in the torch file is run. The `unembed_hash` of the config is not compared.

    Args:
      directory: a local directory.
      model: the model that the lens is for.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a damaged file, another kind of lens, or one whose shape does not fit the model.
    """
    path, depth, width = Path(directory), model.config.num_hidden_layers, model.config.hidden_size
    config = json_object(read_small(path / "config.json"), path / "config.json")
    if config.get("lens_type", _TYPE) != _TYPE:
        raise ValueError(f"{path}: lens_type is {shown(config['lens_type'])}; only {_TYPE} is read")
    for name, needed in (("num_hidden_layers", depth), ("d_model", width)):
        if config.get(name) != needed:
            raise ValueError(f"{path}: a lens with {name} {shown(config.get(name))}; this model has {needed}")
    safe = path / "params.safetensors"
    tensors = read_safetensors(safe) if safe.exists() else read_torch(path / "params.pt")
    kinds = {"weight": (width, width)} | ({"bias": (width,)} if config.get("bias", True) else {})
    shapes = {f"{i}.{kind}": shape for i in range(depth) for kind, shape in kinds.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise ValueError(
            f"{path}: the parameters must be {', '.join(kinds)} for each of {depth} layers of width {width}"
        )
    kernel = np.stack([np.asarray(tensors[f"{i}.weight"], np.float32).T for i in range(depth)])
    bias = [np.asarray(tensors[f"{i}.bias"], np.float32) if "bias" in kinds else np.zeros(width) for i in range(depth)]
    return TunedLens(jnp.asarray(kernel), jnp.asarray(np.stack(bias), jnp.float32))


def plot(logits: Any, *, decode: Callable[[int], str] | None = None, tokens: Any = None, axes: Any = None) -> Any:
    """The axes with the probability of each state's most likely token, and its text.

    Args:
      logits: [L + 1, T, V]: one row of what `logit_lens` returns.
      decode: id -> its text, such as `lambda i: tokenizer.decode([i])`. None: the ids are shown.
      tokens: ids [T] of the row, as labels of the columns.
      axes: where to draw. None: a new figure of pyplot.

    Raises:
      ValueError: as `figures.heatmap`.
    """
    logits = np.asarray(logits, np.float32)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    best, decode = logits.argmax(axis=-1), decode or str
    columns = None if tokens is None else [decode(int(i)) for i in np.asarray(tokens)]
    title, highest = "probability of the most likely token", 1 / np.exp(shifted).sum(axis=-1)
    axes = heatmap(highest, title=title, xlabel="token", ylabel="state", columns=columns, axes=axes)
    for (row, column), token in np.ndenumerate(best):
        color = "black" if highest[row, column] > 0.5 else "white"  # on yellow, on blue
        text = printable(decode(int(token)))
        axes.text(column, row, text, ha="center", va="center", fontsize="x-small", clip_on=True, color=color)
    return axes
