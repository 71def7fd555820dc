"""What "auto" chooses, and where an implementation of attention is refused."""

import pytest

from opt_jax.model.attention_choice import choose_attention


def test_auto_is_chosen_by_platform_dtype_and_dropout():
    choose = lambda requested="auto", platform="tpu", head_dim=64, dtype="bfloat16", dropout=0.0: choose_attention(  # noqa: E731
        requested, platform, head_dim, dtype, dropout
    )
    assert [choose(), choose(platform="gpu"), choose(platform="cpu")] == ["splash", "cudnn", "xla"]
    assert choose(platform="gpu", dtype="float32") == choose(platform="gpu", head_dim=36) == "xla"
    assert choose(dropout=0.1) == choose("xla", dropout=0.1) == "xla"
    for wrong, words in [
        (dict(requested="splash", dropout=0.1), "attention_dropout 0"),
        (dict(requested="splash", platform="cpu"), "needs a TPU, but this is a cpu"),
        (dict(requested="cudnn"), "needs a GPU"),
        (dict(requested="flash"), "choose one of auto, xla, cudnn, splash"),
    ]:
        with pytest.raises(ValueError, match=words):
            choose(**wrong)
