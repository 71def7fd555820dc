"""The outputs of the models, and the losses of their heads. Names and meanings follow `transformers`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from opt_jax.config import OPTConfig
from opt_jax.interface import OutputMethods
from opt_jax.model.cache import KVCache

Output = TypeVar("Output", bound="ModelOutput")
# The order of `ModelOutput.to_tuple`: that of HF.
_ORDER = "loss last_hidden_state logits start_logits end_logits cache hidden_states attentions".split()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOutput(OutputMethods, Mapping[str, Any]):
    """The fields that all outputs share. A field that was not requested is None.

    As HF's ModelOutput, it is a mapping and indexed like a tuple too, both without the fields that are None.

    Attributes:
      loss: the loss, if labels were given.
      hidden_states: the embeddings, then the output of each layer, [B, T, D]. The last entry is taken after the final
        LayerNorm and `project_out`. (Deviation from HF: a layer skipped by layerdrop stays in the list.)
      attentions: softmax weights of each layer, [B, H, T, S].
      cache: the given cache, with this call's tokens added.
      activations: hook point -> what `interventions.run_with_cache` asked for. (Not in HF; not part of the mapping.)
    """

    loss: Float[Array, ""] | None = None
    hidden_states: tuple[Float[Array, "B T _"], ...] | None = None
    attentions: tuple[Float[Array, "B H T S"], ...] | None = None
    cache: KVCache | None = None
    activations: dict[str, Array] | None = None

    @classmethod
    def with_head(cls: type[Output], base: "BaseModelOutput", **fields: Array | None) -> Output:
        """The output of a model with a head: `fields`, and the shared fields of the base model's output."""
        shared: Any = {field.name: getattr(base, field.name) for field in dataclasses.fields(ModelOutput)}
        return cls(**shared | fields)

    def __iter__(self) -> Iterator[str]:
        return (name for name in _ORDER if getattr(self, name, None) is not None)

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict(zip(self, self.to_tuple(), strict=True))[key] if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in HF's order."""
        return tuple(getattr(self, name) for name in self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModelOutput(ModelOutput):
    """The output of `OPTModel`."""

    last_hidden_state: Float[Array, "B T P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLMOutput(ModelOutput):
    """The output of `OPTForCausalLM`."""

    logits: Float[Array, "B T V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceClassifierOutput(ModelOutput):
    """The output of `OPTForSequenceClassification`."""

    logits: Float[Array, "B num_labels"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringOutput(ModelOutput):
    """The output of `OPTForQuestionAnswering`."""

    start_logits: Float[Array, "B T"]
    end_logits: Float[Array, "B T"]


def cross_entropy(
    logits: Float[Array, "... C"], labels: Int[Array, "..."], ignore_index: int = -100
) -> Float[Array, ""]:
    """Mean negative log-likelihood over the labels that are not `ignore_index`, in float32.

    As `torch.nn.functional.cross_entropy`. Deviation: 0 instead of NaN if all labels are ignored.
    """
    counted = labels != ignore_index
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(counted, nll, 0.0).sum() / jnp.maximum(counted.sum(), 1).astype(jnp.float32)


def causal_lm_loss(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Next-token loss: position t predicts label t + 1. Labels of -100 are ignored (HF `ForCausalLMLoss`)."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def problem_type(config: OPTConfig, labels_dtype: DTypeLike) -> str:
    """`config.problem_type`. If it is None, the type follows from num_labels and the labels' dtype, as in HF."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    is_integer = jnp.issubdtype(labels_dtype, jnp.integer)
    return "single_label_classification" if is_integer else "multi_label_classification"


def classification_loss(
    config: OPTConfig, logits: Float[Array, "B C"], labels: Int[Array, "..."] | Float[Array, "..."]
) -> Float[Array, ""]:
    """The loss for `problem_type(config, labels.dtype)`, in float32 (HF `OPTForSequenceClassification`)."""
    kind = problem_type(config, labels.dtype)
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    targets = labels.reshape(logits.shape).astype(jnp.float32)
    logits = logits.astype(jnp.float32)
    if kind == "regression":
        return jnp.square(logits - targets).mean()
    return (jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))).mean()


def question_answering_loss(
    start_logits: Float[Array, "B T"],
    end_logits: Float[Array, "B T"],
    start_positions: Int[Array, "..."],
    end_positions: Int[Array, "..."],
) -> Float[Array, ""]:
    """Mean of the start and the end loss. As in HF, positions past the end are ignored, and negative ones become 0."""
    length = start_logits.shape[1]

    def loss(logits: Float[Array, "B T"], positions: Int[Array, "..."]) -> Float[Array, ""]:
        return cross_entropy(logits, jnp.clip(positions.reshape(-1), 0, length), ignore_index=length)

    return (loss(start_logits, start_positions) + loss(end_logits, end_positions)) / 2
