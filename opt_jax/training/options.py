"""The options of `train.py`, and the model configuration that they stand for."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from opt_jax.checkpoints import hub, pretrained
from opt_jax.config import OPTConfig
from opt_jax.model.remat import Remat
from opt_jax.training.recipes import RECIPES, recipe_options

# The model of a run without --model: 1.1M parameters, which train in minutes on two CPU cores. Deviations from the
# paper's recipe: no dropout, because such a short run does not overfit, and a larger init_std, because 0.006 suits wide
# models.
SMALL = OPTConfig(
    vocab_size=2048,
    hidden_size=128,
    num_hidden_layers=4,
    ffn_dim=512,
    num_attention_heads=2,
    max_position_embeddings=256,
    dropout=0.0,
    init_std=0.02,
)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What is trained, and where it is written."""

    recipe: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(RECIPES) + "}")] = None
    """The paper's settings for one of its sizes. They are the defaults of the options below; an option that you give
    wins. `--recipe opt-125m --help` shows them."""
    model: str = "small"
    """"small", a preset (125m ... 175b), a config.json, or a checkpoint to start from (directory, hub id, "tiny")."""
    output: str = "runs/small"
    """The run directory. A run found there is resumed."""
    seed: int = 0
    """Seed of new weights, the order of the data, and dropout."""
    continue_from: str | None = None
    """The directory of a finished run. This run, in a new --output, goes on with its state and data, up to --steps (the
    steps of both runs). All other options are those of the finished run."""
    continue_schedule: Literal["constant", "warm-up"] = "constant"
    """The learning rate with --continue-from. constant: that of the finished run's last step. warm-up: it rises to the
    peak again over --warmup-steps, and falls as in a new run."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What is read."""

    data: tuple[str, ...] = ()
    """Text, .jsonl, .json, .csv, .parquet or .arrow files, compressed or not; what `opt-jax tokenize` writes;
    directories or globs of them; URLs (gs://, s3://, hf://); datasets as hf:NAME[,CONFIG][:SPLIT]. Default: the
    sources of the standard library."""
    mixture: tuple[float, ...] = ()
    """A weight for each of --data, as in `--data wiki.npy books/ --mixture 0.7 0.3`: the share of the sequences that
    come from it. Default: all data is one stream."""
    validation_data: tuple[str, ...] = ()
    """The data for the validation loss (with --task also accuracy, or EM and F1), in the forms of --data. Default: a
    part of the data, which is then held out."""
    pack: Literal["concat", "segments"] = "concat"
    """Documents follow each other, with </s> between them. concat: a token attends to all tokens before it in its
    sequence. segments: only to those of its own document, and positions restart with each document."""
    text_key: str = "text"
    """The key or column of the text, in all files but text files."""
    skip_bad_records: bool = False
    """Leave out broken lines, bytes that are not UTF-8 and empty files, and count them. Default: stop at the first."""
    data_workers: int = 0
    """Processes that read ahead. Default: threads of this one."""
    tokenizer: str | None = None
    """Directory or hub id. Default: that of the checkpoint --model; without one, a new one is trained on the data."""
    vocab_size: int | None = None
    """Number of entries of a new tokenizer. Default: the size of the model's vocabulary."""


@dataclasses.dataclass(frozen=True)
class FineTuningOptions:
    """A task, and LoRA."""

    task: Literal["sequence-classification", "question-answering"] | None = None
    """Fine-tune the checkpoint --model for this task. --data is then lines "text TAB label", or SQuAD's JSON."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank (and a task's head), not the model's weights. They are merged in at the end."""
    lora_alpha: float = 16.0
    """For --lora-rank: adapters are scaled by alpha / rank."""
    lora_targets: tuple[Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], ...] = ("q_proj", "v_proj")
    """For --lora-rank: the matrices of each layer that get an adapter."""


@dataclasses.dataclass(frozen=True)
class UpdateOptions:
    """Batches, learning rate, AdamW, dropout."""

    steps: int = 1000
    """Number of updates of the whole run."""
    batch_size: int = 8
    """Sequences per step, over all devices."""
    accumulate: int = 1
    """Split each step's batch into this many micro-batches, one after the other: less memory, the same update."""
    seq_len: int | None = None
    """Tokens per sequence. Default: the model's max_position_embeddings."""
    learning_rate: float = 3e-3
    """The peak learning rate, reached after the warm-up. The paper's are lower: see --recipe."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly to its peak."""
    final_lr: float = 0.1
    """After the warm-up the learning rate falls linearly, to this share of the peak at the last step."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, for all parameters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    clip_norm: float = 1.0
    """The largest global norm of the gradients; larger ones are scaled down."""
    dropout: float | None = None
    """Rate of dropout. Default: the model configuration's (0.1 in the presets, 0 in "small")."""
    attention_dropout: float | None = None
    """Rate of dropout of attention weights. Default: the model configuration's."""
    init_std: float | None = None
    """Standard deviation of new weights. Default: the model configuration's; the paper's 0.006 for a preset."""
    skip_nonfinite: bool = False
    """Skip updates whose loss or gradient is NaN or infinite. Default: stop before the first of them."""


@dataclasses.dataclass(frozen=True)
class ComputationOptions:
    """How a step is computed, and on which devices."""

    mesh: str | None = None
    """The device mesh, as in data=2,fsdp=4 (-1: the remaining devices). Default: all devices on fsdp."""
    dcn_mesh: str | None = None
    """How many slices (or, without slices, processes) there are along each axis of --mesh, as in data=2. Default: all
    slices on data."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Implementation of attention. auto: splash on TPUs, cudnn on GPUs in bfloat16, else xla; xla also if attention
    weights have dropout."""
    remat: Remat = "none"
    """What the backward pass computes again, from the most memory to the least: none, dots (all but matrix products),
    names (all but the outputs of attention), full (all but each layer's input)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of the computation. Parameters are float32. auto: float32 on CPU, bfloat16 elsewhere."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype in which gradients are summed over fsdp. bfloat16 sends half as much. Optimizer state is float32."""
    deterministic: bool = False
    """On GPU: use only kernels that give the same bits every time, so that a resumed run repeats exactly. (CPU and TPU
    always do.)"""


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When a run saves, stops and resumes."""

    checkpoint_every: int = 200
    """Steps between checkpoints. There is always one at the end."""
    checkpoint_minutes: float | None = None
    """Write a checkpoint also when the last one is this old."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also write and keep a checkpoint at all steps that are multiples of this."""
    stop_after: int | None = None
    """End this start after this many steps, with a checkpoint. The same command resumes the run."""
    fall_back: bool = False
    """If the newest checkpoint is damaged, resume from the newest that is not, and rename the later ones."""
    verify: bool = True
    """Compare the data of a checkpoint with their checksums."""


@dataclasses.dataclass(frozen=True)
class MeasurementOptions:
    """Validation, logs, traces."""

    eval_every: int = 200
    """Steps between measurements of the validation loss. There is always one at the end."""
    eval_batches: int = 20
    """The largest number of held-out batches in a measurement of the validation loss."""
    log_every: int = 20
    """Steps between lines if the output is not a terminal."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, below the run directory."""
    wandb: str | None = None
    """Also send the metrics to this project of Weights & Biases."""
    profile: str | None = None
    """Trace the steps FIRST to LAST, as in 10:13, to the directory `profile` of the run directory."""


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """Several processes."""

    distributed: Literal["auto", "on", "off"] = "auto"
    """One run on several hosts. auto: on a TPU pod, under SLURM or Open MPI, in a Kubernetes job, or if the next three
    options are given."""
    coordinator_address: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    """Number of processes of the job."""
    process_id: int | None = None
    """Number of this process, from 0."""
    heartbeat_seconds: int = 30
    """A process that sends nothing for this time counts as lost, and the others end."""
    hang_minutes: int = 60
    """With several processes: end if a step, or the compilation before the first one, takes longer."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Memory and communication on TPUs, without TPUs."""

    plan: bool = False
    """Train nothing: compile the step for the TPUs of --topology, and print what it needs and sends. Needs no TPU."""
    topology: str | None = None
    """For --plan: a TPU slice by its shape in chips, as in v5e:4x8, v6e:16x16 or v5p:8x8x8."""
    plan_output: str | None = None
    """For --plan: also write the plan to this JSON file."""


@dataclasses.dataclass(frozen=True)
class Options(
    PlanOptions,
    JobOptions,
    MeasurementOptions,
    CheckpointOptions,
    ComputationOptions,
    UpdateOptions,
    FineTuningOptions,
    DataOptions,
    RunOptions,
):
    """Train an OPT language model."""


# The groups of --help, in its order.
_GROUPS = {
    "run": RunOptions,
    "data": DataOptions,
    "fine_tuning": FineTuningOptions,
    "update": UpdateOptions,
    "computation": ComputationOptions,
    "checkpoint": CheckpointOptions,
    "measurement": MeasurementOptions,
    "job": JobOptions,
    "plan": PlanOptions,
}
_Grouped: Any = dataclasses.make_dataclass("_Grouped", [(name, group, group()) for name, group in _GROUPS.items()])
_Grouped.__doc__ = Options.__doc__

# The options that a resumed run may change.
MAY_CHANGE = {
    "output",
    "mesh",
    "dcn_mesh",
    "accumulate",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_every",
    "data_workers",
    "eval_every",
    "eval_batches",
    "log_every",
    "stop_after",
    "fall_back",
    "verify",
    "recipe",
    "skip_nonfinite",
    "tensorboard",
    "wandb",
    "profile",
    "distributed",
    "coordinator_address",
    "num_processes",
    "process_id",
    "heartbeat_seconds",
    "hang_minutes",
    "plan",
    "topology",
    "plan_output",
    "attention",
    "remat",
}
# The options that the compiled step, and so a plan, depends on.
PLANNED = {
    "recipe",
    "pack",
    "model",
    "steps",
    "batch_size",
    "accumulate",
    "seq_len",
    "learning_rate",
    "warmup_steps",
    "final_lr",
    "weight_decay",
    "betas",
    "clip_norm",
    "dropout",
    "attention_dropout",
    "attention",
    "remat",
    "grad_dtype",
    "dtype",
    "seed",
    "mesh",
    "dcn_mesh",
    "skip_nonfinite",
    "plan",
    "topology",
    "plan_output",
}


def parse_options(args: Sequence[str] | None = None, program: str | None = None) -> Options:
    """The options of a command line. Those that are not given have the value of --recipe, or else the default.

    Raises:
      ValueError: there is no such recipe. (For other mistakes and --help, tyro ends the program.)
    """
    args = sys.argv[1:] if args is None else list(args)
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--recipe", nargs="?")  # if the name is missing, tyro prints the error
    name = recipe_parser.parse_known_args(args)[0].recipe
    defaults = defaults_of(name)
    groups = {
        name: group(**{field.name: getattr(defaults, field.name) for field in dataclasses.fields(group)})
        for name, group in _GROUPS.items()
    }
    parsed = tyro.cli(
        _Grouped, args=args, default=_Grouped(**groups), prog=program, config=(tyro.conf.OmitArgPrefixes,)
    )
    values: dict[str, Any] = {}
    for name in _GROUPS:
        group = getattr(parsed, name)
        values |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    return Options(**values)


def defaults_of(recipe: str | None) -> Options:
    """The options of a command line with --recipe only, or without any."""
    return Options(**recipe_options(recipe)) if recipe else Options()


def make_deterministic() -> None:
    """Make XLA use only GPU kernels that repeat bit for bit. Call this before JAX looks for devices."""
    flag = "--xla_gpu_deterministic_ops=true"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def model_config(options: Options) -> tuple[OPTConfig, str | None]:
    """The model's configuration, and the directory of the checkpoint to start from, or None.

    Both are what --model stands for. Other options may change the configuration.

    Raises:
      OSError: --model names a checkpoint that does not exist or cannot be read.
      ValueError: --model is no configuration, or options do not go together with it.
    """
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
        directory = hub.resolve(name)
        start, (config, _) = str(directory), pretrained.read_config(directory)
        if "init_std" in changes:
            raise ValueError("--init-std is for new weights, but --model is a checkpoint: leave one of them out")
    if options.vocab_size and (options.tokenizer or start):
        raise ValueError("--vocab-size is for a tokenizer trained on the data: leave it out, or --tokenizer / --model")
    if options.lora_rank and start is None:
        raise ValueError(f"--lora-rank adapts a checkpoint, but the weights of --model {name} are new: name one")
    return dataclasses.replace(config, **changes), start
