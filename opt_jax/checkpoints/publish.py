"""`push_to_hub`: models and tokenizers to the Hugging Face hub, in the form that `transformers` reads."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from opt_jax.checkpoints import hf_scripts

_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags:
- opt
- jax{base}
---

# {name}

An OPT model ({cls}) with {parameters:,} parameters: {layers} layers of width {width}, {heads} attention heads,
{vocabulary:,} tokens, texts of at most {positions:,} tokens. The weights are {dtype}.{origin}

With opt-jax, in JAX:

```python
from opt_jax import {cls}, OPTTokenizer

tokenizer = OPTTokenizer.from_pretrained("{name}")
model = {cls}.from_pretrained("{name}")
```

With `transformers`, in PyTorch:

```python
from transformers import AutoTokenizer, {cls}

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {cls}.from_pretrained("{name}")
```

This card was generated. What the model was trained on, what it is for, its limits and its licence are still to be said.
"""
_TASKS = {
    "OPTForCausalLM": "text-generation",
    "OPTForSequenceClassification": "text-classification",
    "OPTForQuestionAnswering": "question-answering",
    "OPTModel": "feature-extraction",
}


def push_model(  # noqa: PLR0913  (options, by keyword)
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a model of opt-jax",
    max_shard_size: int | str | None = None,
    **foreign: Any,
) -> str:
    """Upload the model as safetensors, with a model card if the repository has none. The page of the commit.

    Args:
      model: the model.
      repo_id: "USER/NAME". The repository is created if there is none.
      tokenizer: an `OPTTokenizer` to upload with the model; default: the files of the directory that the model was
        loaded from.
      private: whether a new repository is private; default: that of the account.
      token: with the right to write; default: that of `hf auth login`, or HF_TOKEN.
      revision: the branch, which exists; default: "main".
      create_pr: open a pull request instead of a commit to the branch.
      commit_message: the title of the commit.
      max_shard_size: see `save_pretrained`.
      **foreign: none; the error for an argument of `transformers` says what to write instead.

    Raises:
      ValueError: see `save_pretrained`; not a name of a repository; or a model with an adapter that is kept apart.
      huggingface_hub.errors.HfHubHTTPError: the hub refuses.
    """
    _refuse(foreign, push_model)
    if getattr(model, "lora", None) is not None:
        raise ValueError("push_to_hub uploads complete models: load this one with its adapter merged")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        model.save_pretrained(folder, tokenizer=tokenizer, safe_serialization=True, max_shard_size=max_shard_size)
        return _upload(
            folder,
            repo_id,
            lambda name: _card(model, name),
            dict(private=private, token=token, revision=revision, create_pr=create_pr, commit_message=commit_message),
        )


def push_tokenizer(
    tokenizer: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a tokenizer of opt-jax",
    **foreign: Any,
) -> str:
    """Upload the files of the tokenizer; arguments, result and errors as of a model's `push_to_hub`."""
    _refuse(foreign, push_tokenizer)
    with TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        options = dict(private=private, token=token, revision=revision, create_pr=create_pr)
        return _upload(Path(temporary), repo_id, None, options | dict(commit_message=commit_message))


def _refuse(foreign: dict[str, Any], function: Callable[..., str]) -> None:
    for name in hf_scripts.known("push_to_hub", foreign, hf_scripts.PUSHING):
        raise hf_scripts.unknown_argument("push_to_hub", name, inspect.signature(function).parameters)


def _upload(folder: Path, repo_id: str, card: Callable[[str], str] | None, options: dict[str, Any]) -> str:
    """Upload the files of `folder`, and the card unless there is one. The page of the commit."""
    import huggingface_hub

    private, token = options.pop("private"), options.pop("token")
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if card is not None and "README.md" not in api.list_repo_files(repo_id, revision=options["revision"]):
        (folder / "README.md").write_text(card(repo_id), encoding="utf-8")
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def _card(model: Any, name: str) -> str:
    """A model card: what is known of the model, and how to load it."""
    config, origin = model.config, model.name_or_path or ""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", origin)  # in the hub's cache
    base = f"{cached[1]}/{cached[2]}" if cached else ""
    return _CARD.format(
        name=name,
        cls=type(model).__name__,
        task=_TASKS.get(type(model).__name__, "feature-extraction"),
        base=f"\nbase_model: {base}" if base else "",
        origin=f" It was loaded from `{base}` and may have been changed since." if base else "",
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        dtype=model.base_model.decoder.embed_positions.embedding.get_value().dtype,
    )
