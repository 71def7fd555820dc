"""The choice of an attention implementation for a command, on the host."""

from typing import get_args

from opt_jax.model.flash import AttentionImplementation


def choose_attention(requested: str, platform: str, head_dim: int, dtype: str, attention_dropout: float) -> str:
    """The requested implementation, after a check that it can run; for "auto" the best one for the platform.

    Flash attention has no dropout on attention weights. With this dropout, "auto" chooses "xla".

    Args:
      requested: "auto", "xla", "cudnn" or "splash".
      platform: JAX's name of it: "cpu", "gpu", "cuda" or "tpu".
      head_dim: width of an attention head.
      dtype: name of the compute dtype.
      attention_dropout: the dropout rate on attention weights.

    Raises:
      ValueError: the implementation is unknown, or cannot run on this platform.
    """
    if requested not in ("auto", *get_args(AttentionImplementation)):
        raise ValueError(f"attention {requested!r}: choose one of auto, {', '.join(get_args(AttentionImplementation))}")
    fits_cudnn = dtype in ("bfloat16", "float16") and head_dim <= 128 and head_dim % 8 == 0
    if requested == "auto":
        here = {"tpu": "splash", "gpu": "cudnn" if fits_cudnn else "xla", "cuda": "cudnn" if fits_cudnn else "xla"}
        return "xla" if attention_dropout > 0 else here.get(platform, "xla")
    if requested != "xla" and attention_dropout > 0:
        raise ValueError(
            f"attention {requested} has no dropout on attention weights: set attention_dropout 0 (it is "
            f"{attention_dropout}), or choose xla"
        )
    if requested == "splash" and platform != "tpu":
        raise ValueError(f"attention splash needs a TPU, but this is a {platform}: choose auto or xla")
    if requested == "cudnn" and (platform not in ("gpu", "cuda") or not fits_cudnn):
        raise ValueError(
            f"attention cudnn needs a GPU, bfloat16 or float16, and head_dim <= 128 divisible by 8, but this is a "
            f"{platform} with {dtype} and head_dim {head_dim}: choose auto or xla"
        )
    return requested
