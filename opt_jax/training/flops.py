"""How much arithmetic a training step is, and how much the chips could do: what MFU compares."""

import re
from typing import Any

from opt_jax.config import OPTConfig

# Dense bfloat16 FLOP/s of one device, by a pattern for JAX's `device_kind`, the first that matches. From the vendors'
# data sheets (cloud.google.com/tpu/docs, nvidia.com), where those of NVIDIA print twice as much "with sparsity".
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
    """Dense bfloat16 FLOP/s of a `jax.Device`; None if its kind is not in the table."""
    return next((peak for kind, peak in PEAK_FLOPS if re.fullmatch(kind, device.device_kind)), None)


def flops_per_token(config: OPTConfig, parameters: int, seq_len: int) -> float:
    """Model FLOPs of forward and backward for one token: 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B).

    As there, the whole attention matrix counts though half of it is masked, and recomputation does not count.
    """
    return 6 * parameters + 12 * config.num_hidden_layers * config.hidden_size * seq_len
