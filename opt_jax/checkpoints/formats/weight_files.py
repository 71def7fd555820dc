"""The names of Hugging Face's files of weights, in the order in which they are preferred; and the index of shards."""

from pathlib import Path

from opt_jax.system.reading import json_object, name_from_outside, read_small

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")  # of PEFT
_MOST_FILES = 10_000  # weight files: OPT-175B in files of 100 MB has 3,500


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of its file, from the index of weight files `path`.

    Raises:
      ValueError: the index is malformed.
    """
    try:
        weight_map = json_object(read_small(path), "it").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no object weight_map that names files")
        for name in weight_map.values():
            for part in name.split("/") if isinstance(name, str) else [name]:  # a shard may be in a sub-directory
                name_from_outside(part)
        if (count := len(set(weight_map.values()))) > _MOST_FILES:
            raise ValueError(f"it names {count:,} files, more than the {_MOST_FILES:,} that a checkpoint may have")
        return weight_map
    except ValueError as e:
        raise ValueError(f"{path} is not an index of weight files: {e}") from None
