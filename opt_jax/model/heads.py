"""OPT (Zhang et al. 2022, https://arxiv.org/abs/2205.01068): base model and three heads over `decoder.OPTDecoder`.

Modules hold parameters and nothing else, so a model is a pytree: pass it through `jax.jit`, `jax.grad`, `jax.tree.map`.
A model's `forward` is the plain function; calling the model checks the inputs and runs `forward` under `jax.jit`.
"""

import os
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from opt_jax.config import OPTConfig
from opt_jax.model import cache as kv
from opt_jax.model.decoder import DecoderInputs, Ids, Mask, OPTDecoder, linear, parameters
from opt_jax.model.flash import AttentionImplementation
from opt_jax.model.inputs import check_inputs
from opt_jax.model.outputs import (
    BaseModelOutput,
    CausalLMOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    causal_lm_loss,
    classification_loss,
    question_answering_loss,
)
from opt_jax.model.remat import Remat
from opt_jax.parallel.rules import constrain

Model = TypeVar("Model", bound="OPTPreTrainedModel")
Labels = Int[Array, "..."] | Float[Array, "..."] | None


class OPTPreTrainedModel(nnx.Module):
    """What the four models share: construction arguments, the checked and jitted call, loading and saving.

    Args:
      config: the architecture.
      rngs: keys for initialisation, normal(0, init_std) as in HF.
      dtype: of the computation. Logits and losses are always float32.
      param_dtype: of the parameters.
      attn_implementation: "xla", "cudnn" (flash attention on NVIDIA GPUs) or "splash" (on TPUs); see `flash`. Whatever
        it is, decoding with a cache uses "xla".
      remat: what the backward pass computes again: "none", "dots" (all but matrix products), "names" (all but the
        attention's), "full" (all but the layers' inputs).
      grad_dtype: in which the steps of `training.step` add up gradients over `fsdp`; needs `scan_layers`.
      scan_layers: keep the layers as one stacked layer (see `OPTDecoder`); `stack_layers` converts later.
    """

    config: OPTConfig
    dtype: Any
    param_dtype: Any
    # Where `from_pretrained` found the model; its tokenizer files are copied by `save_pretrained`.
    name_or_path: str | None = None
    # The text of the generation_config.json found there: defaults of `generate`.
    generation_config_json: str | None = None

    def __init__(
        self,
        config: OPTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        scan_layers: bool = False,
        attn_implementation: AttentionImplementation = "xla",
        remat: Remat = "none",
        grad_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.dtype, self.param_dtype = config, jnp.dtype(dtype), jnp.dtype(param_dtype)
        how = dict(attn_implementation=attn_implementation, remat=remat, grad_dtype=grad_dtype)
        self._build(rngs, dtype=self.dtype, param_dtype=self.param_dtype, scan_layers=scan_layers, **how)

    def _build(self, rngs: nnx.Rngs, **options: Any) -> None:
        self.model = OPTModel(self.config, rngs=rngs, **options)

    def _head(self, outputs: int, use_bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=self.dtype, param_dtype=self.param_dtype)
        return linear(
            self.config, self.config.embed_dim, outputs, use_bias, preferred_element_type=jnp.float32, **kwargs
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """The model as a plain function of its inputs (see `__call__`), for use inside your own `jax.jit`."""
        raise TypeError("OPTPreTrainedModel is abstract: use OPTModel or one of the OPTFor... classes")

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Check the inputs, then run `forward`, compiled once per combination of shapes and options.

        Args (all optional but one of the first two):
          input_ids: int [B, T]; numpy, jax or nested lists, as all array inputs.
          inputs_embeds: float [B, T, P], instead of ids.
          attention_mask: [B, T], above 0 at real tokens, pads on either side; None: all real, pads included. With a
            cache: the mask of the new tokens (HF's [B, past + T] is accepted too).
          position_ids: int [B, T]; default: the number of real tokens before.
          segment_ids: int [B, T], packed documents: attention and positions stay within a segment.
          labels: as the class says; gives `loss`.
          cache: from `init_cache`; the output's `cache` has this call's tokens added. Not donated here.
          logits_to_keep: compute logits for the last n positions only; 0: all (`OPTForCausalLM`).
          output_hidden_states, output_attentions: return them (see `outputs.ModelOutput`).
          dropout_key: a `jax.random.key`; dropout and layerdrop are active exactly when it is given.

        Raises:
          ValueError: shapes that do not fit, ids outside the vocabulary, too many positions, both or neither of ids
            and embeds.
        """
        inputs = check_inputs(self, dict(kwargs, input_ids=input_ids, attention_mask=attention_mask))
        static = tuple((k, inputs.pop(k)) for k in sorted(inputs) if isinstance(inputs[k], (bool, int)))
        return _call(self, inputs, static)

    @property
    def base_model(self) -> "OPTModel":
        """The model without its head."""
        return self.model

    def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike | None = None) -> kv.KVCache:
        """An empty `KVCache` for `max_length` tokens a row, pads included; dtype defaults to the compute dtype.

        dtype: floating point, or "int8" (see `int8`, which needs qwix); else ValueError.
        """
        c = self.config
        shape = (c.num_hidden_layers, batch_size, c.num_attention_heads, max_length, c.head_dim)
        return kv.init_cache(*shape, dtype or self.dtype)

    @classmethod
    def from_pretrained(cls: type[Model], name: str | os.PathLike[str], **kwargs: Any) -> Model:
        """Load from a hub id, an HF or Orbax directory, or "tiny": see `pretrained.load_pretrained`."""
        from opt_jax.checkpoints import pretrained

        return pretrained.load_pretrained(cls, name, **kwargs)

    def save_pretrained(self, directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a self-contained Orbax directory: see `pretrained.save_pretrained`."""
        from opt_jax.checkpoints import pretrained

        pretrained.save_pretrained(self, directory, **kwargs)


@partial(jax.jit, static_argnums=2)
def _call(model: OPTPreTrainedModel, inputs: dict[str, Any], static: tuple[tuple[str, Any], ...]) -> Any:
    return model.forward(**inputs, **dict(static))


class OPTModel(OPTPreTrainedModel):
    """The decoder without a head: HF `OPTModel`. Returns `BaseModelOutput`."""

    def _build(self, rngs: nnx.Rngs, **options: Any) -> None:
        self.decoder = OPTDecoder(self.config, rngs=rngs, **options)

    @property
    def base_model(self) -> "OPTModel":
        """The model itself, which has no head."""
        return self

    def forward(self, input_ids: Ids = None, attention_mask: Mask = None, **rest: Any) -> BaseModelOutput:
        """`rest`: the other fields of `DecoderInputs`."""
        return self.decoder(DecoderInputs(input_ids, attention_mask, **rest))


class OPTForCausalLM(OPTPreTrainedModel):
    """Next-token prediction: HF `OPTForCausalLM`. `labels`: int [B, T], the ids, -100 where not counted."""

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
    ) -> CausalLMOutput:
        """As a call, without its checks, inside of `jax.jit`; `rest`: the other fields of `DecoderInputs`."""
        out = self.model.forward(input_ids, attention_mask, **rest)
        logits = self.logits(out.last_hidden_state[:, -logits_to_keep:])
        loss = None if labels is None else causal_lm_loss(logits, labels)
        return CausalLMOutput.with_head(out, logits=logits, loss=loss)

    def logits(self, x: Float[Array, "B T P"]) -> Float[Array, "B T V"]:
        """The LM head, tied to the token embedding unless the config says otherwise."""
        head = self.model.decoder.embed_tokens.attend if self.lm_head is None else self.lm_head
        return constrain(head(x), "logits")

    def generate(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Continue prompts: see `opt_jax.generation.generate.generate`."""
        from opt_jax.generation.generate import generate

        return generate(self, input_ids, attention_mask, **kwargs)

    def prefill(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Read the common beginning of many prompts once: see `opt_jax.generation.generate.prefill`."""
        from opt_jax.generation.generate import prefill

        return prefill(self, input_ids, attention_mask, **kwargs)

    def score(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """The log-probability of each token: see `opt_jax.generation.scoring.score`."""
        from opt_jax.generation.scoring import score

        return score(self, input_ids, attention_mask, **kwargs)


class OPTForSequenceClassification(OPTPreTrainedModel):
    """Classification by the last token: HF `OPTForSequenceClassification`. `labels`: see `classification_loss`."""

    def _build(self, rngs: nnx.Rngs, **options: Any) -> None:
        super()._build(rngs, **options)
        self.score = self._head(self.config.num_labels, False, rngs)

    def forward(
        self, input_ids: Ids = None, attention_mask: Mask = None, *, labels: Labels = None, **rest: Any
    ) -> SequenceClassifierOutput:
        """As a call, without its checks, inside of `jax.jit`; `rest`: the other fields of `DecoderInputs`."""
        out = self.model.forward(input_ids, attention_mask, **rest)
        x, pad = out.last_hidden_state, self.config.pad_token_id
        if pad is None and x.shape[0] > 1:
            raise ValueError("classification of several rows needs config.pad_token_id, to find each row's last token")
        if pad is None or input_ids is None:
            x = x[:, -1]
        else:  # the right-most id that is not the pad; the mask is not asked (as in HF)
            columns = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            last = jnp.argmax(jnp.where(input_ids != pad, columns, 0), axis=-1)
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        logits = self.score(x)
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return SequenceClassifierOutput.with_head(out, logits=logits, loss=loss)


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
    ) -> QuestionAnsweringOutput:
        """As a call, without its checks, inside of `jax.jit`; `rest`: the other fields of `DecoderInputs`."""
        out = self.model.forward(input_ids, attention_mask, **rest)
        start, end = jnp.moveaxis(self.qa_outputs(out.last_hidden_state), -1, 0)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = question_answering_loss(start, end, start_positions, end_positions)
        return QuestionAnsweringOutput.with_head(out, start_logits=start, end_logits=end, loss=loss)


def named_parameters(model: OPTPreTrainedModel) -> dict[str, nnx.Param[Any]]:
    """Canonical path -> parameter, the names used in every table and file, such as `model.decoder.layers.0.fc1.kernel`.

    The base model's paths get the same `model.` in front. In a stacked model a layer parameter has no number and a
    leading axis L: `model.decoder.layers.fc1.kernel`.
    """
    prefix = "model." if isinstance(model, OPTModel) else ""
    return {prefix + ".".join(map(str, path)): param for path, param in parameters(model)}
