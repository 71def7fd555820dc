"""The OPT decoder (Zhang et al. 2022, https://arxiv.org/abs/2205.01068) in Flax NNX: attention, layer, stack of layers.

Shapes: B batch, T tokens of this call, S keys, D hidden_size, H heads, K head_dim, P word_embed_proj_dim, L layers,
F ffn_dim, V vocab_size; t: tokens on this device (T or a part of the sequence).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from opt_jax.config import OPTConfig
from opt_jax.model import hooks
from opt_jax.model.attention import AttentionMask, DropoutKey, attend, dropout, flash_attend
from opt_jax.model.cache import KVCache, LayerCache
from opt_jax.model.flash import AttentionImplementation
from opt_jax.model.outputs import BaseModelOutput
from opt_jax.model.remat import Remat, count_parts, rematerialise, run_in_parts
from opt_jax.parallel import collectives
from opt_jax.parallel.rules import constrain, is_per_device

_ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # HF's "gelu" is the exact erf form; JAX defaults to tanh
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
# Position p reads row p + 2 of the table, so a pad (position -1) reads row 1: HF `OPTLearnedPositionalEmbedding`.
POSITION_OFFSET = 2


class Linear(nnx.Linear):
    """`nnx.Linear` that also works under `jax_numpy_dtype_promotion="strict"` if the bias has another dtype."""

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:  # type: ignore[reportIncompatibleMethodOverride]
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


def linear(config: OPTConfig, inputs: int, outputs: int, use_bias: bool, **kwargs: Any) -> Linear:
    """A `Linear` with kernel ~ normal(0, init_std) and bias 0 (HF `OPTPreTrainedModel._init_weights`)."""
    init = nnx.initializers.normal(config.init_std)
    return Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, dot_general=_matmul, **kwargs)


def _matmul(x: jax.Array, kernel: jax.Array, _dimension_numbers: Any, **kwargs: Any) -> jax.Array:
    """x @ kernel, as a product of two matrices.

    XLA on CPU is slow if a gradient contracts two dimensions at once.
    """
    y = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **kwargs)
    return y.reshape(*x.shape[:-1], -1)


class Embed(nnx.Embed):
    """`nnx.Embed` whose `attend` is the tied LM head."""

    def lookup_and_scatter(self, ids: Int[Array, "B T"]) -> Float[Array, "B t P"]:
        """Embeddings of this device's tokens. Each device has the ids of all tokens, and a part of the table."""
        # In float32, so that the gradients of a frequent token are not added up in half precision.
        table = self.embedding.get_value().astype(jnp.float32)
        local_ids = ids - collectives.tensor_offset(table.shape[0])
        is_local = (local_ids >= 0) & (local_ids < table.shape[0])
        rows = jnp.take(table, jnp.where(is_local, local_ids, 0), axis=0)
        return collectives.scatter_sequence(jnp.where(is_local[..., None], rows, 0).astype(self.dtype))

    def attend(self, x: Float[Array, "B T P"]) -> Float[Array, "B T V"]:  # type: ignore[reportIncompatibleMethodOverride]
        """Logits. Deviation from HF: accumulated and returned in float32, not rounded to the compute dtype."""
        table = self.embedding.get_value().astype(x.dtype)
        return jnp.einsum("btp,vp->btv", x, table, preferred_element_type=jnp.float32)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm`, which mixes dtypes, made to work under `jax_numpy_dtype_promotion="strict"` too.

    `name` is that of its hook points.
    """

    def __call__(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B T D"]:  # type: ignore[reportIncompatibleMethodOverride]
        with jax.numpy_dtype_promotion("standard"):
            return hooks.point(f"{name}.hook_normalized", super().__call__(x), self, x)


def _layer_norm(config: OPTConfig, **kwargs: Any) -> LayerNorm:
    """LayerNorm with PyTorch's epsilon and two-pass variance (Flax defaults: 1e-6 and E[x^2] - E[x]^2)."""
    affine = config.layer_norm_elementwise_affine
    return LayerNorm(
        config.hidden_size, epsilon=1e-5, use_bias=affine, use_scale=affine, use_fast_variance=False, **kwargs
    )


class OPTAttention(nnx.Module):
    """Multi-head self-attention: HF `OPTAttention`."""

    def __init__(self, config: OPTConfig, attn_implementation: AttentionImplementation, **kwargs: Any):
        project = partial(linear, config, config.hidden_size, config.hidden_size, config.enable_bias, **kwargs)
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = project(), project(), project(), project()
        self.config = config
        self.implementation: AttentionImplementation = attn_implementation

    def _split_heads(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B H T K"]:
        heads = x.reshape(*x.shape[:2], -1, self.config.head_dim)  # a device may hold a part of the heads
        return constrain(hooks.point(name, heads).transpose(0, 2, 1, 3), "heads")

    def __call__(
        self, x: Float[Array, "B T D"], mask: AttentionMask, cache: LayerCache | None, dropout_key: DropoutKey | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H T S"] | None, LayerCache | None]:
        q = self._split_heads(self.q_proj(x), "attn.hook_q") * self.config.head_dim**-0.5  # after the bias
        k, v = self._split_heads(self.k_proj(x), "attn.hook_k"), self._split_heads(self.v_proj(x), "attn.hook_v")
        q, k, v = checkpoint_name((q, k, v), "qkv")
        weights, rate = None, self.config.attention_dropout
        if cache is None and self.implementation != "xla":
            if dropout_key is not None and rate > 0:
                raise ValueError(
                    f"attn_implementation={self.implementation!r} has no dropout on attention weights: set "
                    f"attention_dropout 0 (it is {rate}), or use 'xla'"
                )
            out = constrain(flash_attend(self.implementation, q, k, v, mask), "heads")  # the kernels name their outputs
        else:
            if cache is not None:
                cache, k, v = cache.update(k, v)
            out, weights = attend(q, k, v, mask, dropout_rate=rate, dropout_key=dropout_key)
            out = checkpoint_name(constrain(out, "heads"), "context")
        out = hooks.point("attn.hook_z", out.transpose(0, 2, 1, 3))
        y = self.out_proj(out.reshape(*x.shape[:2], -1))
        return hooks.point("attn.hook_result", y, self.out_proj, out), weights, cache


class OPTDecoderLayer(nnx.Module):
    """An attention and a feed-forward block, with LayerNorm before each, or after (350M): HF `OPTDecoderLayer`."""

    def __init__(
        self, config: OPTConfig, key: jax.Array, attn_implementation: AttentionImplementation = "xla", **kwargs: Any
    ):
        kwargs |= dict(rngs=nnx.Rngs(key))
        self.self_attn = OPTAttention(config, attn_implementation, **kwargs)
        self.self_attn_layer_norm = _layer_norm(config, **kwargs)
        self.fc1 = linear(config, config.hidden_size, config.ffn_dim, config.enable_bias, **kwargs)
        self.fc2 = linear(config, config.ffn_dim, config.hidden_size, config.enable_bias, **kwargs)
        self.final_layer_norm = _layer_norm(config, **kwargs)
        self.config = config

    def __call__(
        self, x: Float[Array, "B T D"], mask: AttentionMask, cache: LayerCache | None, dropout_key: DropoutKey | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H T S"] | None, LayerCache | None]:
        config = self.config
        pre_norm = config.do_layer_norm_before
        keys: Any = [None] * 4
        if dropout_key is not None:
            keys = [DropoutKey(key, dropout_key.rows) for key in jax.random.split(dropout_key.key, 4)]
        inputs = x = hooks.point("hook_resid_pre", x)

        h = self.self_attn_layer_norm(x, "ln1") if pre_norm else x
        h, weights, cache = self.self_attn(collectives.gather_sequence(h), mask=mask, cache=cache, dropout_key=keys[0])
        h = hooks.point("hook_attn_out", checkpoint_name(collectives.scatter_sequence(h), "attention_out"))
        x = hooks.point("hook_resid_mid", constrain(x + dropout(h, config.dropout, keys[1]), "residual"))
        if not pre_norm:
            x = self.self_attn_layer_norm(x, "ln1")

        h = self.final_layer_norm(x, "ln2") if pre_norm else x
        h = checkpoint_name(constrain(self.fc1(collectives.gather_sequence(h)), "ffn"), "ffn")
        h = _ACTIVATION[config.activation_function](hooks.point("mlp.hook_pre", h))
        h = hooks.point("hook_mlp_out", collectives.scatter_sequence(self.fc2(hooks.point("mlp.hook_post", h))))
        x = hooks.point("hook_resid_post", constrain(x + dropout(h, config.dropout, keys[2]), "residual"))
        if not pre_norm:
            x = self.final_layer_norm(x, "ln2")

        if dropout_key is not None and config.layerdrop > 0:  # LayerDrop (Fan et al. 2019): skip the whole layer
            x = jnp.where(jax.random.bernoulli(keys[3].key, jnp.float32(config.layerdrop)), inputs, x)
        return x, weights, cache


Ids = Int[Array, "B T"] | None  # token ids, or other integers for each token
Mask = Bool[Array, "B T"] | Int[Array, "B T"] | None


@dataclasses.dataclass(frozen=True)
class DecoderInputs:
    """The arguments that `forward` of all models takes; see `OPTPreTrainedModel.__call__`."""

    input_ids: Ids = None
    attention_mask: Mask = None
    position_ids: Ids = None
    segment_ids: Ids = None
    inputs_embeds: Float[Array, "B T P"] | None = None
    cache: KVCache | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    dropout_key: jax.Array | DropoutKey | None = None
    hooks: Any = None  # dict name -> intervention, or `interventions.Hooks`

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return (self.inputs_embeds if self.input_ids is None else self.input_ids).shape[:2]  # type: ignore[reportOptionalMemberAccess]

    @property
    def mask(self) -> Bool[Array, "B T"] | None:
        return None if self.attention_mask is None else self.attention_mask.astype(bool)

    @property
    def new_tokens(self) -> Bool[Array, "B T"]:
        """True at real tokens of this call."""
        return jnp.ones(self.shape, bool) if self.mask is None else self.mask

    def layer_keys(self, depth: int) -> DropoutKey | None:
        """A key for each layer, with the same rows: key [L], rows [L, B]."""
        batch, key = self.shape[0], DropoutKey.of(self.dropout_key, self.shape[0])
        if key is None:
            return None
        return DropoutKey(jax.random.split(key.key, depth), jnp.broadcast_to(key.rows, (depth, batch)))


# The residual stream after the last layer; before each layer and after the last; attention weights; caches.
Outputs = tuple[Array, list[Array], list[Any], list[Any]]


class OPTDecoder(nnx.Module):
    """Embeddings, layers and output projection: HF `OPTDecoder`.

    `layers` has one of two forms. For decoding and in files it is an `nnx.List` of layers. With `scan_layers` it is one
    layer whose parameters have a leading axis L, for `lax.scan`; compile time then does not grow with depth.
    """

    def __init__(
        self,
        config: OPTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        scan_layers: bool,
        attn_implementation: AttentionImplementation,
        remat: Remat,
        grad_dtype: DTypeLike,
    ):
        if attn_implementation not in (known := get_args(AttentionImplementation)):
            raise ValueError(f"attn_implementation {attn_implementation!r}: choose one of {', '.join(known)}")
        if remat not in (known := get_args(Remat)):
            raise ValueError(f"remat {remat!r}: choose one of {', '.join(known)}")
        if jnp.dtype(grad_dtype) != jnp.float32 and not scan_layers:
            raise ValueError(f"grad_dtype={jnp.dtype(grad_dtype)} without effect: pass scan_layers=True as well")
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        width, embed_dim = config.hidden_size, config.embed_dim
        embed = partial(Embed, embedding_init=nnx.initializers.normal(config.init_std), rngs=rngs, **kwargs)
        self.embed_tokens = embed(config.vocab_size, embed_dim)
        if config.pad_token_id is not None:  # torch's padding_idx starts at zero
            table = self.embed_tokens.embedding
            table.set_value(table.get_value().at[config.pad_token_id].set(0))
        self.embed_positions = embed(config.max_position_embeddings + POSITION_OFFSET, width)
        self.project_in = self.project_out = self.final_layer_norm = nnx.data(None)
        if embed_dim != width:
            self.project_in = linear(config, embed_dim, width, False, rngs=rngs, **kwargs)
            self.project_out = linear(config, width, embed_dim, False, rngs=rngs, **kwargs)
        if config.has_final_layer_norm:
            self.final_layer_norm = _layer_norm(config, rngs=rngs, **kwargs)
        layer = partial(OPTDecoderLayer, config, attn_implementation=attn_implementation, **kwargs)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        # Always built stacked: due to the counters of nnx.Rngs, tracing 96 constructor calls takes quadratic time.
        layers = jax.vmap(layer)(keys)
        self.layers = layers if scan_layers else unstack(layers, config.num_hidden_layers)
        self.config, self.implementation = config, attn_implementation
        self.remat: Remat = remat
        self.grad_dtype = jnp.dtype(grad_dtype)

    def __call__(self, inputs: DecoderInputs) -> BaseModelOutput:
        if inputs.output_attentions and self.implementation != "xla":
            raise ValueError(
                f"output_attentions needs attn_implementation='xla': {self.implementation!r} never stores the weights"
            )
        x, cache = self._embed(inputs), inputs.cache
        mask = AttentionMask(inputs.mask, inputs.segment_ids, 0)
        if cache is not None and not cache.fresh:
            mask = AttentionMask(cache.advance(inputs.new_tokens).valid, None, cache.column)
        run = self._run_list if isinstance(self.layers, nnx.List) else self._run_scan
        x, states, attentions, layer_caches = run(x, mask, inputs)
        x = self._output(x)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*states[:-1], x) if inputs.output_hidden_states else None,
            attentions=tuple(attentions) if inputs.output_attentions else None,
            cache=None if cache is None else cache.advance(inputs.new_tokens, layer_caches),
        )

    def _embed(self, inputs: DecoderInputs) -> Float[Array, "B t D"]:
        """The sum of token and position embeddings."""
        x, ids, pad = inputs.inputs_embeds, inputs.input_ids, self.config.pad_token_id
        if x is None:
            assert ids is not None
            x = self.embed_tokens.lookup_and_scatter(ids) if is_per_device() else self.embed_tokens(ids)
            if pad is not None:  # as torch's padding_idx: the embedding of the pad gets no gradient
                x = jnp.where(collectives.local_tokens(ids == pad)[..., None], lax.stop_gradient(x), x)
        x = hooks.point("hook_embed", x.astype(self.embed_tokens.dtype))
        if self.project_in is not None:
            x = hooks.point("hook_project_in", self.project_in(x))
        positions = positions_of(inputs) if inputs.position_ids is None else inputs.position_ids
        embedded = self.embed_positions(collectives.local_tokens(positions) + POSITION_OFFSET)
        return constrain(x + hooks.point("hook_pos_embed", embedded), "residual")

    def _run_list(self, x: Float[Array, "B T D"], mask: AttentionMask, inputs: DecoderInputs) -> Outputs:
        """The outputs of a list of layers, run one by one."""
        keys, depth = inputs.layer_keys(self.config.num_hidden_layers), self.config.num_hidden_layers
        before = [None] * depth if inputs.cache is None else inputs.cache.layers()
        states, attentions, caches = [x], [], []
        # Outside a scan, common subexpression elimination would undo the rematerialisation.
        wrap = partial(rematerialise, remat=self.remat, prevent_cse=True)
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            key = None if keys is None else DropoutKey(keys.key[i], keys.rows[i])
            run = partial(OPTDecoderLayer.__call__, mask=mask, cache=before[i])
            x, weights, cache = hooks.in_layer(run, i, wrap)(layer, x, dropout_key=key)
            states.append(x)
            attentions.append(weights)
            caches.append(cache)
        return x, states, attentions, caches

    def _run_scan(self, x: Float[Array, "B T D"], mask: AttentionMask, inputs: DecoderInputs) -> Outputs:
        """The outputs of stacked layers, run under `lax.scan`."""
        if inputs.cache is not None:
            raise ValueError("a cache needs separate layers: use opt_jax.unstack_layers(model) before decoding")
        if hasattr(self, "__captures__"):
            raise ValueError("nnx.capture sees nothing of stacked layers: use opt_jax.unstack_layers(model)")
        in_parts = self.remat == "full" and not inputs.output_attentions and hooks.active.get() is None
        parts = count_parts(x, inputs.shape[1]) if in_parts else 1

        def body(x: Array, layer_and_key: tuple[OPTDecoderLayer, DropoutKey | None]) -> tuple[Array, tuple[Any, Any]]:
            layer, key = layer_and_key
            layer = collectives.gather_parameters(layer, layer.fc1.dtype, self.grad_dtype, "model.decoder.layers.")
            if parts > 1:
                x, weights = run_in_parts(layer, parts, x, mask, key), None
            else:
                x, weights, _ = layer(x, mask=mask, cache=None, dropout_key=key)
            return x, (x if inputs.output_hidden_states else (), weights if inputs.output_attentions else ())

        stacked = (self.layers, inputs.layer_keys(self.config.num_hidden_layers))
        y, (states, weights) = hooks.scan(body, partial(rematerialise, remat=self.remat), x, stacked)
        return y, [x, *states], list(weights), []

    def _output(self, x: Float[Array, "B t D"]) -> Float[Array, "B t P"]:
        x = x if self.final_layer_norm is None else self.final_layer_norm(x, "ln_final")
        return x if self.project_out is None else hooks.point("hook_project_out", self.project_out(x))


def positions_of(inputs: DecoderInputs) -> Int[Array, "b T"]:
    """The position of each token: the number of real tokens before it in its row or segment; -1 for a pad (as HF)."""
    mask, segment_ids, cache = inputs.mask, inputs.segment_ids, inputs.cache
    if mask is None and segment_ids is None and cache is None:
        return jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
    mask = inputs.new_tokens
    before = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask.astype(jnp.int32)
    if cache is not None:
        before += cache.next_position[:, None]
    if segment_ids is not None:  # restart where a new segment begins
        begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
        before -= lax.cummax(jnp.where(begins, before, 0), axis=1)
    return jnp.where(mask, before, -1)


def unstack(stacked: nnx.Module, depth: int) -> nnx.List[Any]:
    """The `depth` separate layers of a stacked layer. Releases the stacked arrays one by one."""
    structure = jax.tree.structure(stacked)
    leaves: list[list[Any]] = [[] for _ in range(depth)]
    for _, param in parameters(stacked):
        value = param.get_value()
        param.set_value(None)
        for i in range(depth):
            leaves[i].append(_slice(value, i))
        del value
    return nnx.List([jax.tree.unflatten(structure, leaf) for leaf in leaves])


def _slice(stacked: Any, i: int) -> Any:
    if isinstance(stacked, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)
    return stacked[i]


def parameters(module: nnx.Module) -> list[tuple[tuple[Any, ...], nnx.Param[Any]]]:
    """The path and Param of each parameter, in the order in which `jax.tree` flattens the module."""
    return [(path, node) for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Param)]
