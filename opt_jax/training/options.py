"""What `train.py` can be told, and what may not be told together: its options, and the model they stand for."""

import dataclasses
import json
import os
from typing import Literal

from etils import epath

from opt_jax.config import OPTConfig

# The model of a run without --model: 1.1M parameters, minutes on two CPU cores. Deviations from the paper's recipe: no
# dropout, because so short a run does not overfit, and a wider initialisation, because 0.006 suits wide models.
SMALL = OPTConfig(
    vocab_size=2048, hidden_size=128, num_hidden_layers=4, ffn_dim=512, num_attention_heads=2,
    max_position_embeddings=256, dropout=0.0, init_std=0.02,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Train an OPT language model."""

    data: tuple[str, ...] = ()
    """Text or .jsonl files (key "text"), or directories of them. Default: the standard library's sources."""
    output: str = "runs/small"
    """The run directory. A run found there is resumed."""
    model: str = "small"
    """"small", a preset (125m ... 175b), a config.json, or a checkpoint to start from (directory, hub id, "tiny")."""
    tokenizer: str | None = None
    """Directory or hub id. Default: the starting checkpoint's, else one is trained on the data."""
    vocab_size: int | None = None
    """Entries of the tokenizer trained on the data. Default: the model's vocabulary."""
    steps: int = 1000
    batch_size: int = 8
    """Sequences per step, over all devices."""
    accumulate: int = 1
    """Split each step's batch into so many parts, one after the other: less memory, the same update."""
    seq_len: int | None = None
    """Tokens per sequence. Default: the model's max_position_embeddings."""
    learning_rate: float = 3e-3
    """The peak, reached after the warm-up; then it falls linearly to a tenth at the last step. The paper's are lower:
    6e-4 (125m), 3e-4 (350m), 2e-4 (1.3b) ... 1.2e-4 (175b)."""
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    dropout: float | None = None
    """Default: the model configuration's (0.1 in the presets, 0 in "small")."""
    attention_dropout: float | None = None
    """Default: the model configuration's."""
    init_std: float | None = None
    """Standard deviation of new weights. Default: the model configuration's; the paper's 0.006 for a preset."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; parameters are float32. auto: float32 on CPU, bfloat16 elsewhere."""
    seed: int = 0
    # These may differ from one start of a run to the next.
    mesh: str | None = None
    """Devices, as in data=2,fsdp=4 (-1: the rest). Default: all on fsdp."""
    dcn_mesh: str | None = None
    """How many slices (or, without slices, processes) along each axis, as in data=2; part of --mesh, not beside it.
    Default: all slices on data."""
    checkpoint_every: int = 200
    """Steps between checkpoints; there is always one at the end."""
    checkpoint_minutes: float | None = None
    """Also one when the last is so many minutes old."""
    keep_checkpoints: int = 2
    """So many of the newest stay."""
    keep_every: int | None = None
    """Keep those of every so many steps for good."""
    eval_every: int = 200
    """Steps between measurements of the loss on held-out documents; there is always one at the end."""
    eval_batches: int = 20
    log_every: int = 20
    """Steps between lines where the output is not a terminal."""
    stop_after: int | None = None
    """End after this many steps of this start, with a checkpoint; start again to go on."""
    deterministic: bool = False
    """On GPU: only kernels that give the same bits every time, so that a resumed run repeats exactly. (CPU and TPU
    always do.)"""
    distributed: Literal["auto", "on", "off"] = "auto"
    """One run on several hosts. auto: if a TPU pod, SLURM, Open MPI or a Kubernetes job, or the next three, say so."""
    coordinator_address: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = 30
    """A process not heard of for so long is lost, and the others end."""
    hang_minutes: int = 60
    """With several processes: end when a step, or the compilation before the first, takes longer."""


MAY_CHANGE = {
    "output", "mesh", "dcn_mesh", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_every",
    "eval_every", "eval_batches", "log_every", "stop_after",
    "distributed", "coordinator_address", "num_processes", "process_id", "heartbeat_seconds", "hang_minutes",
}  # fmt: skip


def check_options(options: Options) -> None:
    for name in ("steps", "batch_size", "seq_len", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batches",
                 "log_every", "stop_after", "vocab_size", "accumulate", "keep_every", "num_processes",
                 "heartbeat_seconds", "hang_minutes"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("learning_rate", "clip_norm", "init_std", "checkpoint_minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name in ("weight_decay", "warmup_steps", "process_id"):
        if (getattr(options, name) or 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must not be negative")


def make_deterministic() -> None:
    """Ask XLA for GPU kernels that repeat bit for bit; before JAX starts, which reads this then."""
    flag = "--xla_gpu_deterministic_ops=true"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def model_config(options: Options) -> tuple[OPTConfig, str | None]:
    """(configuration, checkpoint to start from or None) that --model stands for, with the options that change it."""
    name, start = options.model, None
    changes = {n: getattr(options, n) for n in ("dropout", "attention_dropout", "init_std")}
    changes = {name: value for name, value in changes.items() if value is not None}
    try:
        preset = OPTConfig.preset(name, init_std=0.006) if "/" not in name else None
    except ValueError:
        preset = None
    if name == "small":
        config = SMALL
    elif preset is not None:
        config = preset
    elif name.endswith(".json"):
        config = OPTConfig.from_hf(name)
    else:
        from opt_jax import hub

        start = str(hub.resolve(name))
        config = OPTConfig.from_hf(start)
        if "init_std" in changes:
            raise ValueError("--init-std is for new weights, but --model is a checkpoint: leave one of them out")
    if options.vocab_size and (options.tokenizer or start):
        raise ValueError("--vocab-size is for a tokenizer trained on the data: leave it out, or --tokenizer / --model")
    return dataclasses.replace(config, **changes), start


def compare_with_first_start(path: epath.Path, record: dict) -> None:
    """Refuse to resume a run with anything changed that would change its losses.

    An option that did not exist when the run began counts as having had its default.
    """
    if not path.exists():
        return
    before, differences = json.loads(path.read_text(encoding="utf-8")), []
    defaults = {"options": dataclasses.asdict(Options())}
    for section, values in record.items():
        old_values = defaults.get(section, {}) | before.get(section, {})
        for name in sorted({*values, *old_values}):
            old, new = old_values.get(name), json.loads(json.dumps(values.get(name)))
            old = json.loads(json.dumps(old))
            if old != new and not (section == "options" and name in MAY_CHANGE):
                differences.append(f"{section}: {name} was {json.dumps(old)}, is now {json.dumps(new)}")
    if differences:
        raise ValueError(
            f"{path.parent} holds a run that was started differently:\n  " + "\n  ".join(differences)
            + "\nStart it as it was, or choose another --output."
        )  # fmt: skip
