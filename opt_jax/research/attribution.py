"""Direct logit attribution (Elhage et al. 2021, https://transformer-circuits.pub/2021/framework; Wang et al. 2022).

The residual stream is a sum of parts: embeddings, and what heads, feed-forward blocks and biases add. With the scale of
the final LayerNorm held, a logit is linear in that sum, so each part has a share of the logit, and the shares add up.

Shapes: L layers, H heads, K head_dim, B batch, T tokens, D hidden_size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from opt_jax.model.heads import OPTForCausalLM, named_parameters
from opt_jax.model.packed_models import refuse_packed
from opt_jax.model.quantization import count_int8
from opt_jax.research.figures import heatmap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attribution:
    """The parts of a logit, or of a difference of two, at each position. They add up to `logits`.

    Attributes:
      embed: [B, T], the token embedding, after `project_in`.
      pos_embed: [B, T], the position embedding.
      heads: [L, H, B, T], each head, without the bias of `out_proj`.
      attention_bias: [L, B, T], the bias of `out_proj`.
      mlp: [L, B, T], the feed-forward block, with its bias.
      norm_bias: [B, T], the bias of the final LayerNorm.
      logits: [B, T], what the model returns.
    """

    embed: Float[Array, "B T"]
    pos_embed: Float[Array, "B T"]
    heads: Float[Array, "L H B T"]
    attention_bias: Float[Array, "L B T"]
    mlp: Float[Array, "L B T"]
    norm_bias: Float[Array, "B T"]
    logits: Float[Array, "B T"]

    @property
    def total(self) -> Float[Array, "B T"]:
        """The sum of all parts."""
        layers = self.heads.sum(axis=(0, 1)) + self.attention_bias.sum(axis=0) + self.mlp.sum(axis=0)
        return self.embed + self.pos_embed + layers + self.norm_bias


def attribute(
    model: OPTForCausalLM, input_ids: Any, attention_mask: Any = None, *, tokens: Any, minus: Any = None
) -> Attribution:
    """The parts of the logit of a token at each position.

    Args:
      model: a pre-norm causal language model, with separate or stacked layers. Shares are as exact as its dtype.
      input_ids, attention_mask: as in a call of the model.
      tokens: ids whose logits are explained; they broadcast to [B, T]: one id, or [B, 1], or one for each position.
      minus: ids likewise. The parts are then those of logit(tokens) - logit(minus).

    Raises:
      ValueError: a post-norm model, int8 or packed weights, adapters at `out_proj`, a model without an LM head, ids
        that do not fit, or as a call of the model.
    """
    config = model.config
    if not isinstance(model, OPTForCausalLM):
        raise ValueError(f"attribution needs the LM head of an OPTForCausalLM; this is an {type(model).__name__}")
    if not config.do_layer_norm_before:
        raise ValueError(
            "a post-norm model (do_layer_norm_before=False) has no attribution: each LayerNorm scales the sum of all "
            "parts before it, so a logit is no sum of parts"
        )
    refuse_packed(model)
    if count_int8(model) or any(name.endswith("out_proj.kernel_lora_a") for name in named_parameters(model)):
        raise ValueError(
            "attribution reads the matrices of a plain model: take the one that was quantized, and merge adapters "
            "(from_pretrained with merge_adapter=True)"
        )
    embed = "hook_embed" if config.embed_dim == config.hidden_size else "hook_project_in"
    names = [embed, "hook_pos_embed", "blocks.*.attn.hook_z", "blocks.*.hook_mlp_out"]
    names += ["ln_final.hook_scale"] if config.has_final_layer_norm else []
    out, kept = model.run_with_cache(input_ids, attention_mask, names=names)
    shape = out.logits.shape[:2]
    wanted = _ids(tokens, shape, config.vocab_size, "tokens")
    other = None if minus is None else _ids(minus, shape, config.vocab_size, "minus")
    parts = {
        "embed": kept[embed],
        "pos_embed": kept["hook_pos_embed"],
        "scale": kept.get("ln_final.hook_scale"),
        "z": jnp.stack([kept[f"blocks.{i}.attn.hook_z"] for i in range(config.num_hidden_layers)]),
        "mlp": jnp.stack([kept[f"blocks.{i}.hook_mlp_out"] for i in range(config.num_hidden_layers)]),
    }
    return _attribute(model, parts, out.logits, wanted, other)


def _ids(values: Any, shape: tuple[int, int], vocab_size: int, what: str) -> np.ndarray:
    ids = np.asarray(values)
    try:
        ids = np.broadcast_to(ids, shape)
    except ValueError:
        raise ValueError(f"{what} of shape {ids.shape} does not broadcast to [B, T], which is {shape}") from None
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{what} must be ids from 0 to {vocab_size - 1}")
    return ids.astype(np.int32)


@jax.jit
def _attribute(
    model: OPTForCausalLM,
    parts: dict[str, Any],
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    minus: Int[Array, "B T"] | None,
) -> Attribution:
    with jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), parts)
        direction = _directions(model, tokens)
        logit = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        if minus is not None:
            direction -= _directions(model, minus)
            logit -= jnp.take_along_axis(logits, minus[..., None], axis=-1)[..., 0]
        norm_bias, norm = jnp.zeros_like(logit), model.model.decoder.final_layer_norm
        if norm is not None:
            if norm.bias is not None:
                norm_bias = direction @ norm.bias.get_value().astype(jnp.float32)
            if norm.scale is not None:
                direction *= norm.scale.get_value().astype(jnp.float32)[None, None]
            # (x - mean(x)) . direction = x . (direction - mean(direction))
            direction = (direction - direction.mean(axis=-1, keepdims=True)) / wide["scale"]
        shares = lambda x: jnp.einsum("...btd,btd->...bt", x, direction)  # noqa: E731
        kernels = _of_layers(model, "self_attn.out_proj.kernel")
        biases = _of_layers(model, "self_attn.out_proj.bias")
        depth, heads = wide["z"].shape[0], wide["z"].shape[3]
        by_head = jnp.einsum("lhkd,btd->lbthk", kernels.reshape(depth, heads, -1, kernels.shape[-1]), direction)
        return Attribution(
            embed=shares(wide["embed"]),
            pos_embed=shares(jnp.broadcast_to(wide["pos_embed"], direction.shape)),
            heads=jnp.einsum("lbthk,lbthk->lhbt", wide["z"], by_head),
            attention_bias=jnp.einsum("ld,btd->lbt", biases, direction),
            mlp=shares(wide["mlp"]),
            norm_bias=norm_bias,
            logits=logit,
        )


def _directions(model: OPTForCausalLM, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The vectors whose products with the output of the final LayerNorm are the logits of these ids."""
    head, project = model.lm_head, model.model.decoder.project_out
    table = model.model.decoder.embed_tokens.embedding.get_value() if head is None else head.kernel.get_value().T
    rows = table[ids].astype(jnp.float32)
    return rows if project is None else rows @ project.kernel.get_value().astype(jnp.float32).T


def _of_layers(model: OPTForCausalLM, name: str) -> Array:
    """A parameter of all layers, float32 [L, ...]. A bias that the model does not have is zero."""
    config, named = model.config, named_parameters(model)
    if not config.enable_bias and name.endswith("bias"):
        return jnp.zeros((config.num_hidden_layers, config.hidden_size), jnp.float32)
    if not isinstance(model.model.decoder.layers, nnx.List):
        return named[f"model.decoder.layers.{name}"].get_value().astype(jnp.float32)
    values = [named[f"model.decoder.layers.{i}.{name}"].get_value() for i in range(config.num_hidden_layers)]
    return jnp.stack(values).astype(jnp.float32)


def plot(attribution: Attribution, *, row: int = 0, position: int = -1, axes: Any = None) -> Any:
    """The axes with the shares of each layer: its heads, and its feed-forward block.

    Args:
      attribution: what `attribute` returns.
      row, position: which logit; a position counts columns, and from the end if negative.
      axes: where to draw. None: a new figure of pyplot.

    Raises:
      ValueError: as `figures.heatmap`.
    """
    heads = np.asarray(attribution.heads)[:, :, row, position]
    values = np.concatenate([heads, np.asarray(attribution.mlp)[:, row, position, None]], axis=1)
    columns = [*map(str, range(heads.shape[1])), "mlp"]
    return heatmap(values, title="share of the logit", xlabel="head", columns=columns, diverging=True, axes=axes)
