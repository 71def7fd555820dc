"""FLOPs of a training step, and peak FLOP/s of devices: their ratio is the model FLOPs utilization (MFU)."""

import re
from typing import Any

from opt_jax.config import OPTConfig

# Dense bfloat16 FLOP/s of one device. The first pattern that matches JAX's `device_kind` counts. Source: the vendors'
# data sheets (cloud.google.com/tpu/docs, nvidia.com). NVIDIA's also print twice as much, "with sparsity".
PEAK_FLOPS = (
    (r"TPU v4", 275e12),
    (r"TPU v5 ?lite|TPU v5e", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 ?lite|TPU v6e", 918e12),
    (r".*A100.*", 312e12),
    (r".*H100 PCIe.*", 756e12),
    (r".*(H100|H200) NVL.*", 835e12),
    (r".*(H100|H200|GH200).*", 989e12),
    (r".*GB200.*", 2500e12),
    (r".*B200.*", 2250e12),
    (r".*L40S.*", 362e12),
    (r".*\bL4\b.*", 121e12),
)


def peak_flops(device: Any) -> float | None:
    """Peak of a `jax.Device` in dense bfloat16 FLOP/s; None if its kind is not in the table."""
    return next((peak for kind, peak in PEAK_FLOPS if re.fullmatch(kind, device.device_kind)), None)


def flops_per_token(config: OPTConfig, parameters: int, seq_len: int) -> float:
    """Model FLOPs of forward and backward pass for one token: 6 N + 12 L H Q T.

    Source: PaLM (Chowdhery et al. 2022), appendix B. As there, all of the attention matrix counts, although half of it
    is masked, and recomputation does not count.

    Args:
      config: the architecture; L = layers, H Q = hidden size.
      parameters: N.
      seq_len: T, tokens per sequence.
    """
    return 6 * parameters + 12 * config.num_hidden_layers * config.hidden_size * seq_len
