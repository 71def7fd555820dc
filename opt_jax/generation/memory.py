"""Checks that there is enough memory for a call of `generate`, before any array is allocated."""

import os
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from opt_jax.config import OPTConfig
from opt_jax.generation.config import GenerationConfig
from opt_jax.parallel.mesh import platform_of

# Options that make a request large; messages name those that were given.
_SIZES = (
    "num_return_sequences",
    "num_beams",
    "prompt_lookup_num_tokens",
    "num_assistant_tokens",
    "max_new_tokens",
    "max_length",
    "logprobs",
)


def host_memory() -> int:
    """Bytes of physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_memory(model: Any) -> int:
    """Bytes of memory of the devices that hold the model's parameters. On a CPU: of the machine."""
    sharding = jax.tree.leaves(model)[0].sharding
    stats = [device.memory_stats() or {} for device in sharding.addressable_devices]
    if not all("bytes_limit" in stat for stat in stats):
        return host_memory()
    return sum(stat["bytes_limit"] for stat in stats) * len(sharding.device_set) // len(stats)


def default_cache_dtype(model: Any, prefix: Any = None) -> str:
    """The dtype of a KV cache: that of the `Prefix` which it continues, or else the compute dtype.

    On a CPU it is float32 for half precision, too: to add one token to an array of 16-bit numbers, XLA converts all of
    it to float32 and back. The cache then takes twice the memory. Its numbers, and the tokens, are the same.
    """
    if prefix is not None:
        return jax.tree.leaves(prefix.cache.k)[0].dtype.name
    half_on_cpu = np.dtype(model.dtype).itemsize == 2 and platform_of(model) == "cpu"
    return "float32" if half_on_cpu else np.dtype(model.dtype).name


def column_bytes(config: OPTConfig, dtype: DTypeLike) -> int:
    """Bytes of the keys and values of one token in all layers, and of their scales in an int8 cache."""
    scales = 4 * config.num_attention_heads if np.dtype(dtype) == np.int8 else 0
    return 2 * config.num_hidden_layers * (config.hidden_size * np.dtype(dtype).itemsize + scales)


def check_memory(nbytes: int, limit: int, rows: int, given: GenerationConfig) -> None:
    """Check that an allocation is within a limit.

    Raises:
      ValueError: `nbytes` is more than `limit`. The message names the options that make the request large.
    """
    if nbytes > limit:
        asked = ", ".join(f"{name}={value}" for name in _SIZES if (value := getattr(given, name)) is not None)
        raise ValueError(
            f"{asked or 'the prompts'}: {rows:,} rows at a time need {nbytes / 1e9:,.1f} GB, more than the "
            f"{limit / 1e9:,.1f} GB of memory: ask for less, or pass a smaller batch_size or cache_dtype"
        )
