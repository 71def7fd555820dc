"""The training recipes of the nine published sizes, as options of train.py."""

from typing import Any

SEQ_LEN = 2048
WARMUP_TOKENS, TOKENS = 375e6, 300e9
M = 2**20

# Tokens per batch and peak learning rate: table 1 of the OPT paper (Zhang et al. 2022). For 175B metaseq's launcher
# differs: it has a rate of 3e-5 with a batch of 0.25M tokens. The run had 2M, so the paper's pair stands here.
_TABLE = {
    "opt-125m": (M // 2, 6e-4),
    "opt-350m": (M // 2, 3e-4),
    "opt-1.3b": (M, 2e-4),
    "opt-2.7b": (M, 1.6e-4),
    "opt-6.7b": (2 * M, 1.2e-4),
    "opt-13b": (4 * M, 1e-4),
    "opt-30b": (4 * M, 1e-4),
    "opt-66b": (2 * M, 8e-5),
    "opt-175b": (2 * M, 1.2e-4),
}
RECIPES = tuple(_TABLE)


def recipe_options(name: str) -> dict[str, Any]:
    """The options that a recipe sets, by name. Other options have their defaults. Source: section 2.2 of the paper.

    Deviations: no dropout of attention weights (the paper has 0.1), because flash attention does not support it. No
    loss scaling, because bfloat16 does not need it. None of the changes that were made by hand during the run of 175B
    (clipping at 0.3, lower rates).

    Raises:
      ValueError: there is no such recipe.
    """
    if name not in _TABLE:
        raise ValueError(f"--recipe {name}: unknown; the recipes are {', '.join(RECIPES)}")
    batch_tokens, peak = _TABLE[name]
    return dict(
        recipe=name,
        output=f"runs/{name}",
        model=name.removeprefix("opt-"),
        steps=int(TOKENS // batch_tokens),
        batch_size=batch_tokens // SEQ_LEN,
        seq_len=SEQ_LEN,
        learning_rate=peak,
        warmup_steps=2000 if name == "opt-175b" else int(WARMUP_TOKENS // batch_tokens),
        final_lr=0.1,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip_norm=1.0,
        dropout=0.1,
        attention_dropout=0.0,
        init_std=0.006,
        checkpoint_every=2000,
        eval_every=2000,
    )
