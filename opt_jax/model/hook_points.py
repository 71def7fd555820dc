"""The names of hook points, as in TransformerLens: what each is, and what a caller's `names` stands for."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable

from opt_jax.config import OPTConfig
from opt_jax.system.messages import shown

# Point, without `blocks.{i}.` -> (its axes, what it is). Axes: see decoder.py; 1: an axis of that length.
POINTS: dict[str, tuple[str, str]] = {
    "hook_embed": ("BTP", "token embeddings, or the call's `inputs_embeds`"),
    "hook_project_in": ("BTD", "what `project_in` makes of them (350M)"),
    "hook_pos_embed": ("BTD", "position embeddings"),
    "hook_resid_pre": ("BTD", "the residual stream that enters the layer"),
    "ln1.hook_scale": ("BT1", "sqrt(variance + epsilon) in the LayerNorm before attention (post-norm: after it)"),
    "ln1.hook_normalized": ("BTD", "the output of that LayerNorm, with its scale and bias"),
    "attn.hook_q": ("BTHK", "queries, with bias, before they are scaled by K^-0.5"),
    "attn.hook_k": ("BTHK", "keys of this call's tokens; a cache holds what the hook returns"),
    "attn.hook_v": ("BTHK", "values of this call's tokens; a cache holds what the hook returns"),
    "attn.hook_attn_scores": ("BHTS", "float32 scores, scaled and masked; hidden ones stay the least finite number"),
    "attn.hook_pattern": ("BHTS", "softmax of the scores, before dropout"),
    "attn.hook_z": ("BTHK", "the heads' outputs, before `out_proj`"),
    "attn.hook_result": ("BTHD", "what each head adds: `out_proj` of it alone, without the bias"),
    "hook_attn_out": ("BTD", "what attention adds to the residual stream: with bias, before dropout"),
    "hook_resid_mid": ("BTD", "the residual stream after attention (post-norm: the sum, before the LayerNorm)"),
    "ln2.hook_scale": ("BT1", "as in ln1, in the LayerNorm of the feed-forward block"),
    "ln2.hook_normalized": ("BTD", "the output of that LayerNorm, with its scale and bias"),
    "mlp.hook_pre": ("BTF", "neurons before the activation function"),
    "mlp.hook_post": ("BTF", "neurons after the activation function"),
    "hook_mlp_out": ("BTD", "what the feed-forward block adds to the residual stream: with bias, before dropout"),
    "hook_resid_post": ("BTD", "the residual stream after that block (post-norm: the sum, before the LayerNorm)"),
    "ln_final.hook_scale": ("BT1", "sqrt(variance + epsilon) in the final LayerNorm"),
    "ln_final.hook_normalized": ("BTD", "the output of the final LayerNorm, with its scale and bias"),
    "hook_project_out": ("BTP", "what `project_out` makes of the last layer's output (350M)"),
}  # fmt: skip
_OUTSIDE = ("hook_embed", "hook_project_in", "hook_pos_embed", "hook_project_out")
Names = str | Iterable[str] | Callable[[str], bool]


def point_names(config: OPTConfig) -> list[str]:
    """The names of all points of a model, in the order in which the computation meets them."""
    missing = set()
    if config.embed_dim == config.hidden_size:
        missing |= {"hook_project_in", "hook_project_out"}
    if not config.has_final_layer_norm:
        missing |= {"ln_final.hook_scale", "ln_final.hook_normalized"}
    local = [name for name in POINTS if name not in missing]
    inside = [name for name in local if not is_outside(name)]
    first, last = local.index(inside[0]), local.index(inside[-1])
    blocks = [f"blocks.{i}.{name}" for i in range(config.num_hidden_layers) for name in inside]
    return [*local[:first], *blocks, *local[last + 1 :]]


def is_outside(name: str) -> bool:
    return name in _OUTSIDE or name.startswith("ln_final.")


def find_points(config: OPTConfig, names: Names) -> list[str]:
    """The points that `names` stands for: a name, a glob such as `blocks.*.hook_resid_post`, several, or a predicate.

    Raises:
      ValueError: a name or glob that no point has.
    """
    known = point_names(config)
    if callable(names):
        selected = [name for name in known if names(name)]
        if not selected:
            raise ValueError("names: the function is true for no point of this model")
        return selected
    selected = set()
    for name in [names] if isinstance(names, str) else names:
        matches = fnmatch.filter(known, name) if isinstance(name, str) else []
        if not matches:
            near = difflib.get_close_matches(str(name), known, 3, 0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ": opt_jax.point_names(model.config) lists all"
            raise ValueError(f"no hook point is named {shown(name, 80)}{hint}")
        selected.update(matches)
    return [name for name in known if name in selected]


def local_name(point: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", point)


def shape_of(axes: str) -> str:
    return f"[{', '.join(axes)}]"
