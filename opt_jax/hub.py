"""A model's name (hub id, directory, "tiny") to a local directory."""

import importlib.resources
import os
import re
from pathlib import Path

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
# What travels with a model's weights, besides config.json.
COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")


def resolve(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The directory that holds the model `name`.

    Args:
      name: "tiny", the model inside this package; a directory (in a run directory of train.py: its exported `model`);
        else the id of a repository on the Hugging Face hub, which is downloaded, or taken from the cache.
      revision: branch, tag or commit of a hub id.
      cache_dir: where downloads are kept; default: Hugging Face's cache.
      local_files_only: never download.
      weights: False leaves out the weights (for a tokenizer). Of the two formats only safetensors are downloaded if the
        repository has them.

    Raises:
      FileNotFoundError: no such directory or repository, or it cannot be reached and is not in the cache.
      ValueError: not a possible name, or `revision` of something that is not on the hub.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    if name == "tiny":
        path = Path(str(importlib.resources.files("opt_jax") / "tiny"))
    if name and path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for models on the hub, but {name} is a local directory")
        return path / "model" if (path / "model" / "config.json").is_file() else path
    if name and path.exists():
        raise ValueError(f"{name} is a file; give the directory it is in")
    if name == "tiny" or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise FileNotFoundError(f"no directory {name!r}" + (" in this package" if name == "tiny" else ""))
    return _download(name, weights, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)


def _download(name: str, weights: bool, **options) -> Path:
    from huggingface_hub import snapshot_download  # here, because it is slow to import

    small = ["config.json", *COMPANION_FILES]
    try:
        if not weights:
            return Path(snapshot_download(name, allow_patterns=small, **options))
        folder = Path(snapshot_download(name, allow_patterns=[*small, *_SAFETENSORS], **options))
        if not any((folder / file).is_file() for file in _SAFETENSORS[:2]):
            folder = Path(snapshot_download(name, allow_patterns=[*small, *_TORCH], **options))
        return folder
    except Exception as e:  # huggingface_hub's own and whatever its HTTP library raises
        reason = " ".join(str(e).split())
        raise FileNotFoundError(f"no directory {name}, and not available from the hub: {reason}") from e


def is_orbax(path: str | os.PathLike) -> bool:
    """Whether the directory is a model of our own (`checkpoint.save_pretrained`, `python -m convert`)."""
    return (Path(path) / "params" / "_METADATA").is_file()
