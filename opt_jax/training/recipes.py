"""How the nine published sizes were trained, as the options of train.py that make it so."""

from typing import Any

SEQ_LEN = 2048
WARMUP_TOKENS, TOKENS = 375e6, 300e9
M = 2**20

# Table 1 of the OPT paper (Zhang et al. 2022): tokens per batch, peak learning rate. For 175B, metaseq's launcher has a
# rate of 3e-5 in its table of sizes, beside a batch of 0.25M tokens, not the 2M of the run: the paper's pair is here.
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
    """The options that a recipe sets (section 2.2 of the paper); whatever is not in it has its own default.

    Deviations: no dropout of attention weights (the paper has 0.1), because no flash attention has it; bfloat16 needs
    no loss scaling. Not followed: what was changed by hand amid the run of 175B (its clipping at 0.3, its rates).

    Raises:
      ValueError: no such recipe.
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
