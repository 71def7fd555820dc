"""The source of the drafts of `speculative.py`, and the checks of its options."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from opt_jax.generation.loop import FlatModel
from opt_jax.generation.memory import default_cache_dtype
from opt_jax.generation.request import Request, checkpoint_options
from opt_jax.model.bfloat16 import with_cpu_products
from opt_jax.model.heads import OPTForCausalLM

DEFAULT_DRAFTS = 5  # HF: 20, or fewer after a draft with a probability below 0.4; here all rows draft equally many
DEFAULT_NGRAM = 2  # HF's
_STEPS_OF_HOLES = 8  # the cache has room for the holes of this many steps before `compact`, which reads and writes it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """The source of drafts: an assistant model, or prompt lookup."""

    assistant: FlatModel | None  # None: prompt lookup
    ngram: Int[Any, ""]  # prompt lookup compares at most this many last tokens
    count: int = dataclasses.field(metadata=dict(static=True))  # k: drafted tokens in one step
    cache_dtype: str | None = dataclasses.field(default=None, metadata=dict(static=True))  # of the assistant's cache

    def more_columns(self, rows: int) -> int:
        """Number of columns that the cache needs besides those of the tokens: for drafts and for holes.

        A single row has no holes. For more rows the cache has room for the holes of a few steps. Room for the holes of
        all steps would make it k times as large, and every step reads all of it.
        """
        return self.count + (0 if rows == 1 else _STEPS_OF_HOLES * (self.count + 1))


def check_drafts(model: OPTForCausalLM, request: Request, assistant: Any) -> Drafts | None:
    """The source of drafts that the options ask for; None: no drafts.

    Raises:
      ValueError: options that contradict each other, or an assistant that does not fit the model.
    """
    given = request.given
    lookup = given.prompt_lookup_num_tokens or None
    if assistant is not None and lookup is not None:
        raise ValueError(f"give assistant_model or prompt_lookup_num_tokens={lookup}, not both")
    if assistant is None and given.num_assistant_tokens is not None:
        raise ValueError("num_assistant_tokens without effect: pass assistant_model as well")
    if lookup is None and given.max_matching_ngram_size is not None:
        raise ValueError("max_matching_ngram_size without effect: pass prompt_lookup_num_tokens as well")
    if assistant is None and lookup is None:
        return None
    if request.num_beams > 1:
        name = "assistant_model" if lookup is None else "prompt_lookup_num_tokens"
        raise ValueError(
            f"{name} is not supported with num_beams: a draft continues one sequence, but beam search compares "
            "many; leave one of them out"
        )
    if assistant is not None and request.prompts.embeds is not None:
        raise ValueError("assistant_model reads token ids: leave it out beside inputs_embeds")
    limit = model.config.max_position_embeddings
    if lookup is not None:
        _check_count("prompt_lookup_num_tokens", lookup, limit)
        return Drafts(None, np.int32(given.max_matching_ngram_size or DEFAULT_NGRAM), lookup)
    assistant = _checked(model, request, assistant)
    count = _draft_count(request, assistant)
    _check_count("num_assistant_tokens", count, limit)
    return Drafts(FlatModel.of(with_cpu_products(assistant)), np.int32(0), count, default_cache_dtype(assistant))


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"{name}={count} must be at most max_position_embeddings={limit}")


def _checked(model: OPTForCausalLM, request: Request, assistant: Any) -> OPTForCausalLM:
    if not isinstance(assistant, OPTForCausalLM):
        raise ValueError(f"assistant_model must be an OPTForCausalLM, not a {type(assistant).__name__}")
    if not isinstance(assistant.model.decoder.layers, nnx.List):
        raise ValueError("assistant_model has stacked layers: use opt_jax.unstack_layers(assistant_model) first")
    theirs, ours = assistant.config, model.config
    if theirs.vocab_size != ours.vocab_size:
        raise ValueError(
            f"assistant_model has a vocabulary of {theirs.vocab_size} tokens, the model one of {ours.vocab_size}: "
            "both must have the same tokenizer"
        )
    most = np.asarray(request.options.max_new_tokens)
    needed = int((np.repeat(request.prompts.lengths, request.copies) + most).max())
    if needed > theirs.max_position_embeddings:
        raise ValueError(
            f"assistant_model has max_position_embeddings={theirs.max_position_embeddings}, but prompt and new tokens "
            f"are up to {needed}: shorten the prompt, or ask for fewer new tokens"
        )
    return assistant


def _draft_count(request: Request, assistant: OPTForCausalLM) -> int:
    if request.given.num_assistant_tokens is not None:
        return request.given.num_assistant_tokens
    count = checkpoint_options(assistant).get("num_assistant_tokens") or DEFAULT_DRAFTS
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"assistant_model's generation_config.json: num_assistant_tokens={count!r} must be at least 1")
    return count
