"""OPT (Zhang et al. 2022, https://arxiv.org/abs/2205.01068): the base model and three models with a head.

Modules hold parameters and no other arrays, so a model is a pytree for `jax.jit`, `jax.grad` and `jax.tree.map`.
`model.forward(...)` is the plain function. `model(...)` checks its inputs and runs `forward` under `jax.jit`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from opt_jax.config import OPTConfig
from opt_jax.interface import GenerationMethods, ModelMethods
from opt_jax.model import cache as kv
from opt_jax.model import outputs
from opt_jax.model.decoder import DecoderInputs, Ids, Mask, OPTDecoder, linear, parameters
from opt_jax.model.flash import AttentionImplementation
from opt_jax.model.inputs import check_inputs
from opt_jax.model.remat import Remat
from opt_jax.parallel.rules import constrain

Labels = Int[Array, "..."] | Float[Array, "..."] | None


class OPTPreTrainedModel(ModelMethods, nnx.Module):  # type: ignore[reportIncompatibleMethodOverride]
    """The base class of the four models: constructor, checked and compiled call. `ModelMethods` has loading and saving.

    Args:
      config: the architecture.
      rngs: keys for initialisation, normal(0, init_std) as in HF. Without them: ValueError.
      dtype: the compute dtype. Logits and losses are always float32.
      param_dtype: the dtype of the parameters.
      scan_layers: whether the layers are one stacked layer (see `OPTDecoder`). `stack_layers` converts later.
      attn_implementation: "xla", "cudnn" (flash attention on NVIDIA GPUs) or "splash" (on TPUs); see `flash`. Calls
        with a cache always use "xla".
      remat: what the backward pass computes again. "none"; "dots": all but matrix products; "names": all but the
        outputs of attention; "full": all but the inputs of layers.
      grad_dtype: the dtype in which a training step adds up gradients over `fsdp`. Needs `scan_layers`.
    """

    config: OPTConfig
    dtype: Any
    param_dtype: Any
    # The name or directory that `from_pretrained` loaded; `save_pretrained` copies its tokenizer files.
    name_or_path: str | None = None
    # The text of its generation_config.json, with defaults of `generate`.
    generation_config_json: str | None = None

    def __init__(
        self,
        config: OPTConfig,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        scan_layers: bool = False,
        attn_implementation: AttentionImplementation = "xla",
        remat: Remat = "none",
        grad_dtype: DTypeLike = jnp.float32,
    ):
        keys = self._keys(config, rngs)
        self.config, self.dtype, self.param_dtype = config, jnp.dtype(dtype), jnp.dtype(param_dtype)
        how = dict(attn_implementation=attn_implementation, remat=remat, grad_dtype=grad_dtype)
        self._build(keys, dtype=self.dtype, param_dtype=self.param_dtype, scan_layers=scan_layers, **how)

    def _build(self, rngs: nnx.Rngs, **options: Any) -> None:
        self.model = OPTModel(self.config, rngs=rngs, **options)

    def _head(self, outputs: int, use_bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=self.dtype, param_dtype=self.param_dtype)
        return linear(
            self.config, self.config.embed_dim, outputs, use_bias, preferred_element_type=jnp.float32, **kwargs
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """The output of the model, as a plain function for use inside `jax.jit`; arguments as in `__call__`."""
        raise TypeError("OPTPreTrainedModel is abstract: use OPTModel or one of the OPTFor... classes")

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """The output of `forward` for checked inputs, compiled once for each combination of shapes and options.

        Args:
          input_ids: int [B, T]. All array inputs may be NumPy, JAX or nested lists.
          attention_mask: [B, T], above 0 at real tokens; pads may be on either side. None: all tokens are real, even
            pads. With a cache: the mask of the new tokens (HF's [B, past + T] is accepted too).
          **kwargs: optional. `inputs_embeds`: float [B, T, P], instead of input_ids.
            `position_ids`: int [B, T]; default: the number of real tokens before each token.
            `segment_ids`: int [B, T], for packed documents: attention and positions stay within a segment.
            `labels`: see each class; the output then has `loss`.
            `cache`: from `init_cache`. The output's `cache` also holds this call's tokens. The cache is not donated.
            `logits_to_keep`: compute logits for the last n positions only; 0: for all (`OPTForCausalLM`).
            `output_hidden_states`, `output_attentions`: whether to return them (see `outputs.ModelOutput`).
            `hooks`: interventions at hook points (see `interventions.run_with_hooks`).
            `dropout_key`: a `jax.random.key`. Dropout and layerdrop are active only with it.

        Raises:
          ValueError: shapes that do not fit, ids outside the vocabulary, too many positions, or not exactly one of
            input_ids and inputs_embeds.
        """
        kwargs = self._known_arguments(kwargs)
        inputs = check_inputs(self, dict(kwargs, input_ids=input_ids, attention_mask=attention_mask))
        static = tuple((k, inputs.pop(k)) for k in sorted(inputs) if isinstance(inputs[k], (bool, int)))
        call = _call if self._is_watched() else _compiled_call
        return call(self, inputs, static)

    @property
    def base_model(self) -> "OPTModel":
        """The model without its head."""
        return self.model

    def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike | None = None) -> kv.KVCache:
        """An empty `KVCache` with `max_length` columns, for tokens and pads.

        Args:
          batch_size: number of rows.
          max_length: the most tokens of a row, pads included.
          dtype: a floating point dtype, or "int8" (see `int8`; needs qwix). Default: the compute dtype.

        Raises:
          ValueError: another dtype.
        """
        c = self.config
        shape = (c.num_hidden_layers, batch_size, c.num_attention_heads, max_length, c.head_dim)
        return kv.init_cache(*shape, dtype or self.dtype)


def _call(model: OPTPreTrainedModel, inputs: dict[str, Any], static: tuple[tuple[str, Any], ...]) -> Any:
    return model.forward(**inputs, **dict(static))


_compiled_call = jax.jit(_call, static_argnums=2)


class OPTModel(OPTPreTrainedModel):
    """The decoder without a head: HF `OPTModel`. Returns `BaseModelOutput`."""

    def _build(self, rngs: nnx.Rngs, **options: Any) -> None:
        self.decoder = OPTDecoder(self.config, rngs=rngs, **options)

    @property
    def base_model(self) -> "OPTModel":
        """The model itself, which has no head."""
        return self

    def forward(self, input_ids: Ids = None, attention_mask: Mask = None, **rest: Any) -> outputs.BaseModelOutput:
        """The output of the decoder, for use inside `jax.jit`; `rest`: other fields of `DecoderInputs`."""
        inputs = DecoderInputs(input_ids, attention_mask, **rest)
        return self.decoder(inputs) if inputs.hooks is None else self._with_hooks(inputs)


class OPTForCausalLM(GenerationMethods, OPTPreTrainedModel):
    """Next-token prediction: HF `OPTForCausalLM`. `labels`: int [B, T], the input ids, or -100 to ignore a token."""

    def _build(self, rngs: nnx.Rngs, **options: Any) -> None:
        super()._build(rngs, **options)
        tied = self.config.tie_word_embeddings
        self.lm_head = nnx.data(None) if tied else self._head(self.config.vocab_size, False, rngs)

    def forward(
        self,
        input_ids: Ids = None,
        attention_mask: Mask = None,
        *,
        labels: Ids = None,
        logits_to_keep: int = 0,
        **rest: Any,
    ) -> outputs.CausalLMOutput:
        """The output of a call, without its checks, for use inside `jax.jit`; `rest`: fields of `DecoderInputs`."""
        out = self.model.forward(input_ids, attention_mask, **rest)
        logits = self.logits(out.last_hidden_state[:, -logits_to_keep:])
        loss = None if labels is None else outputs.causal_lm_loss(logits, labels)
        return outputs.CausalLMOutput.with_head(out, logits=logits, loss=loss)

    def logits(self, x: Float[Array, "B T P"]) -> Float[Array, "B T V"]:
        """The logits of hidden states: the LM head, by default tied to the token embedding."""
        head = self.model.decoder.embed_tokens.attend if self.lm_head is None else self.lm_head
        return constrain(head(x), "logits")


class OPTForSequenceClassification(OPTPreTrainedModel):
    """Classification by the last token: HF `OPTForSequenceClassification`. `labels`: see `classification_loss`."""

    def _build(self, rngs: nnx.Rngs, **options: Any) -> None:
        super()._build(rngs, **options)
        self.score = self._head(self.config.num_labels, False, rngs)

    def forward(
        self, input_ids: Ids = None, attention_mask: Mask = None, *, labels: Labels = None, **rest: Any
    ) -> outputs.SequenceClassifierOutput:
        """The output of a call, without its checks, for use inside `jax.jit`; `rest`: fields of `DecoderInputs`."""
        out = self.model.forward(input_ids, attention_mask, **rest)
        x, pad = out.last_hidden_state, self.config.pad_token_id
        if pad is None and x.shape[0] > 1:
            raise ValueError("classification of several rows needs config.pad_token_id, to find each row's last token")
        if pad is None or input_ids is None:
            x = x[:, -1]
        else:  # the last id that is not the pad; ignores the mask, as HF does
            columns = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            last = jnp.argmax(jnp.where(input_ids != pad, columns, 0), axis=-1)
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        logits = self.score(x)
        loss = None if labels is None else outputs.classification_loss(self.config, logits, labels)
        return outputs.SequenceClassifierOutput.with_head(out, logits=logits, loss=loss)


class OPTForQuestionAnswering(OPTPreTrainedModel):
    """Extractive QA: HF `OPTForQuestionAnswering`. `start_positions` and `end_positions`, int [B], give `loss`."""

    def _build(self, rngs: nnx.Rngs, **options: Any) -> None:
        super()._build(rngs, **options)
        self.qa_outputs = self._head(2, True, rngs)

    def forward(
        self,
        input_ids: Ids = None,
        attention_mask: Mask = None,
        *,
        start_positions: Int[Array, "..."] | None = None,
        end_positions: Int[Array, "..."] | None = None,
        **rest: Any,
    ) -> outputs.QuestionAnsweringOutput:
        """The output of a call, without its checks, for use inside `jax.jit`; `rest`: fields of `DecoderInputs`."""
        out = self.model.forward(input_ids, attention_mask, **rest)
        start, end = jnp.moveaxis(self.qa_outputs(out.last_hidden_state), -1, 0)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = outputs.question_answering_loss(start, end, start_positions, end_positions)
        return outputs.QuestionAnsweringOutput.with_head(out, start_logits=start, end_logits=end, loss=loss)


def named_parameters(model: OPTPreTrainedModel) -> dict[str, nnx.Param[Any]]:
    """Parameters by canonical path, as used in all tables and files: `model.decoder.layers.0.fc1.kernel`, ...

    The paths of a base model get the prefix `model.`, too. In a stacked model, the path of a layer's parameter has no
    number, and the parameter has a leading axis L: `model.decoder.layers.fc1.kernel`.
    """
    prefix = "model." if isinstance(model, OPTModel) else ""
    return {prefix + ".".join(map(str, path)): param for path, param in parameters(model)}
