"""The options of `train.py`, their checks, and the model configuration that they stand for."""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from etils import epath
from jax.sharding import Mesh

from opt_jax.checkpoints import hub, pretrained
from opt_jax.config import OPTConfig
from opt_jax.model.remat import Remat
from opt_jax.system.messages import shown
from opt_jax.system.temporary import refuse_links
from opt_jax.training.files import read_record
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


_FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True)
class Options:
    """Train an OPT language model."""

    recipe: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(RECIPES) + "}")] = None
    """The paper's settings for one of its sizes. They are the defaults of the options below; an option that you give
    wins. `--recipe opt-125m --help` shows them."""
    data: tuple[str, ...] = ()
    """Text, .jsonl, .json, .csv, .parquet or .arrow files, compressed or not; .npy files of `opt-jax tokenize`;
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
    task: Literal["sequence-classification", "question-answering"] | None = None
    """Fine-tune the checkpoint --model for this task. --data is then lines "text TAB label", or SQuAD's JSON."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank (and a task's head), not the model's weights. They are merged in at the end."""
    lora_alpha: float = 16.0
    """For --lora-rank: adapters are scaled by alpha / rank."""
    lora_targets: tuple[Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], ...] = ("q_proj", "v_proj")
    """For --lora-rank: the matrices of each layer that get an adapter."""
    output: str = "runs/small"
    """The run directory. A run found there is resumed."""
    model: str = "small"
    """"small", a preset (125m ... 175b), a config.json, or a checkpoint to start from (directory, hub id, "tiny")."""
    tokenizer: str | None = None
    """Directory or hub id. Default: that of the checkpoint --model; without one, a new one is trained on the data."""
    vocab_size: int | None = None
    """Number of entries of a new tokenizer. Default: the size of the model's vocabulary."""
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
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Implementation of attention. auto: splash on TPUs, cudnn on GPUs in bfloat16, else xla; xla also if attention
    weights have dropout."""
    remat: Remat = "none"
    """What the backward pass computes again, from the most memory to the least: none, dots (all but matrix products),
    names (all but the outputs of attention), full (all but each layer's input)."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype in which gradients are summed over fsdp. bfloat16 sends half as much. Optimizer state is float32."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of the computation. Parameters are float32. auto: float32 on CPU, bfloat16 elsewhere."""
    seed: int = 0
    """Seed of new weights, the order of the data, and dropout."""
    # These may differ from one start of a run to the next, as may some of those above: see MAY_CHANGE.
    data_workers: int = 0
    """Processes that read ahead. Default: threads of this one."""
    mesh: str | None = None
    """The device mesh, as in data=2,fsdp=4 (-1: the remaining devices). Default: all devices on fsdp."""
    dcn_mesh: str | None = None
    """How many slices (or, without slices, processes) there are along each axis of --mesh, as in data=2. Default: all
    slices on data."""
    checkpoint_every: int = 200
    """Steps between checkpoints. There is always one at the end."""
    checkpoint_minutes: float | None = None
    """Write a checkpoint also when the last one is this old."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also write and keep a checkpoint at all steps that are multiples of this."""
    fall_back: bool = False
    """If the newest checkpoint is damaged, resume from the newest that is not, and rename the later ones."""
    verify: bool = True
    """Compare the data of a checkpoint with their checksums."""
    eval_every: int = 200
    """Steps between measurements of the validation loss. There is always one at the end."""
    eval_batches: int = 20
    """The largest number of held-out batches in a measurement of the validation loss."""
    log_every: int = 20
    """Steps between lines if the output is not a terminal."""
    stop_after: int | None = None
    """End this start after this many steps, with a checkpoint. The same command resumes the run."""
    skip_nonfinite: bool = False
    """Skip updates whose loss or gradient is NaN or infinite. Default: stop before the first of them."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, below the run directory."""
    wandb: str | None = None
    """Also send the metrics to this project of Weights & Biases."""
    profile: str | None = None
    """Trace the steps FIRST to LAST, as in 10:13, to the directory `profile` of the run directory."""
    deterministic: bool = False
    """On GPU: use only kernels that give the same bits every time, so that a resumed run repeats exactly. (CPU and TPU
    always do.)"""
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
    plan: bool = False
    """Train nothing: compile the step for the TPUs of --topology, and print what it needs and sends. Needs no TPU."""
    topology: str | None = None
    """For --plan: a TPU slice by its shape in chips, as in v5e:4x8, v6e:16x16 or v5p:8x8x8."""
    plan_output: str | None = None
    """For --plan: also write the plan to this JSON file."""


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
    return tyro.cli(Options, args=args, default=_defaults(name), prog=program)


def _defaults(recipe: str | None) -> Options:
    return Options(**recipe_options(recipe)) if recipe else Options()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _in_float32(number: float) -> bool:
    """True for 0, and for numbers that float32 neither rounds to infinity nor to a subnormal number or 0."""
    return number == 0 or float(_FLOAT32.tiny) <= abs(number) <= float(_FLOAT32.max)  # False for NaN


def check_options(options: Options) -> None:
    """Check each option, and that they go together.

    Raises:
      ValueError: an option has a bad value, contradicts another one, or has no effect.
    """
    for name, value in dataclasses.asdict(options).items():
        values = value if isinstance(value, tuple) else (value,)
        if "" in values:  # as from an unset shell variable
            raise ValueError(f"{_flag(name)} '': the value is empty; leave the option out, or give one")
        for number in values:
            if isinstance(number, float) and not _in_float32(number):
                raise ValueError(f"{_flag(name)} {number}: must be a finite number, and one that float32 holds")
    for name in (
        "steps",
        "batch_size",
        "seq_len",
        "checkpoint_every",
        "keep_checkpoints",
        "eval_every",
        "eval_batches",
        "log_every",
        "stop_after",
        "vocab_size",
        "accumulate",
        "keep_every",
        "num_processes",
        "heartbeat_seconds",
        "hang_minutes",
        "lora_rank",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(name)} {value}: must be at least 1")
    for name in ("learning_rate", "clip_norm", "init_std", "checkpoint_minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{_flag(name)} {value}: must be above 0")
    for name in ("weight_decay", "warmup_steps", "process_id", "data_workers", "seed"):
        if (getattr(options, name) or 0) < 0:
            raise ValueError(f"{_flag(name)} {getattr(options, name)}: must not be negative")
    if options.seed >= 2**32:  # JAX would use the lower 32 bits only
        raise ValueError(f"--seed {shown(options.seed)}: must be below 2**32")
    if not 0 <= options.final_lr <= 1:
        raise ValueError(f"--final-lr {options.final_lr}: must be a share of the peak, from 0 to 1")
    if not all(0 <= beta and np.float32(beta) < 1 for beta in options.betas):
        raise ValueError(f"--betas {options.betas[0]} {options.betas[1]}: must be at least 0 and below 1")
    if options.mixture and (len(options.mixture) != len(options.data) or not all(w > 0 for w in options.mixture)):
        raise ValueError(
            f"--mixture {' '.join(map(str, options.mixture))}: needs one weight above 0 for each of the "
            f"{len(options.data)} of --data"
        )
    if (profiled := profiled_steps(options.profile)) and profiled.start > options.steps:
        raise ValueError(f"--profile {options.profile} without effect: the run ends with step {options.steps}")
    if options.final_lr != Options.final_lr and options.steps <= options.warmup_steps:
        raise ValueError(
            f"--final-lr {options.final_lr} without effect: all {options.steps} steps belong to the warm-up of "
            f"{options.warmup_steps}; take fewer --warmup-steps"
        )
    check_fine_tuning(options)
    if jax.config.jax_disable_jit:  # type: ignore[reportAttributeAccessIssue]
        raise ValueError("jax_disable_jit is on, but jit is what places a run's arrays: unset JAX_DISABLE_JIT")
    if options.plan and options.topology is None:
        raise ValueError("--plan needs --topology, the TPU slice to compile for, as in v5p:8x8x8")
    changed = [
        name for name, value in dataclasses.asdict(_defaults(options.recipe)).items() if getattr(options, name) != value
    ]
    if options.plan and (unused := [_flag(name) for name in changed if name not in PLANNED]):
        raise ValueError(f"--plan compiles a pretraining step and runs nothing: leave out {', '.join(unused)}")
    for name in ("topology", "plan_output"):
        if getattr(options, name) is not None and not options.plan:
            raise ValueError(f"{_flag(name)} is for --plan: leave it out, or add --plan")
    if options.plan_output and not Path(options.plan_output).absolute().parent.is_dir():
        raise ValueError(f"--plan-output {options.plan_output}: there is no such directory to write it to")
    if options.plan_output:
        refuse_links(options.plan_output)
    for name in ("tensorboard", "profile"):
        if getattr(options, name) and "://" in options.output:
            raise ValueError(f"--{name} writes to local disks only, not to {options.output}: leave it out")
    for option, given, package in (
        ("tensorboard", options.tensorboard, "tensorboardX"),
        ("wandb", options.wandb is not None, "wandb"),
    ):
        if given and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{option} needs the package {package}: pip install {package}")


def check_grad_dtype(options: Options, mesh: Mesh) -> None:
    """Check that --grad-dtype has an effect on this mesh.

    Raises:
      ValueError: it has none.
    """
    if options.grad_dtype != Options.grad_dtype and mesh.shape["fsdp"] == 1:
        raise ValueError(f"--grad-dtype {options.grad_dtype} without effect: the mesh has fsdp=1, and adds up nothing")


def check_fine_tuning(options: Options) -> None:
    """Check the options of fine-tuning.

    Raises:
      ValueError: see `check_options`.
    """
    default = Options()
    if options.task:
        if not options.data:
            raise ValueError(f"--task {options.task} needs --data, the examples to train on")
        if options.vocab_size:
            raise ValueError(
                "--vocab-size is for a new tokenizer, --task for a checkpoint with one: leave one of them out"
            )
        if options.eval_batches != default.eval_batches:
            raise ValueError("--eval-batches: with --task all held-out examples are measured; leave it out")
        for name in ("mixture", "pack", "text_key", "skip_bad_records", "data_workers"):
            if getattr(options, name) != getattr(default, name):
                raise ValueError(f"{_flag(name)} is for pretraining data: leave it out with --task")
    if options.lora_rank is None:
        for name in ("lora_alpha", "lora_targets"):
            if getattr(options, name) != getattr(default, name):
                raise ValueError(f"{_flag(name)} is for --lora-rank: leave it out, or add --lora-rank")
    elif importlib.util.find_spec("qwix") is None:
        raise ValueError("--lora-rank needs the package qwix: pip install qwix")


def profiled_steps(profile: str | None) -> range:
    """The steps of --profile FIRST:LAST, with LAST; none without the option.

    Raises:
      ValueError: the value does not have this form, or there are no such steps.
    """
    if profile is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", profile)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--profile {profile}: needs the first and the last step to trace, as in 10:13")
    return range(int(match[1]), int(match[2]) + 1)


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


def compare_with_first_start(path: epath.Path, record: dict) -> None:
    """Check that nothing has changed since the first start of a run that would change its losses.

    An option that did not exist at the first start counts as if it had had its default. Other sections that were not
    recorded then are not compared.

    Args:
      path: the run.json of the first start; it need not exist.
      record: the record of this start.

    Raises:
      ValueError: the record of the first start is damaged, or this one differs from it.
    """
    if not path.exists():
        return
    before, differences = read_record(path), []
    defaults = {"options": dataclasses.asdict(Options())}
    for section, values in record.items():
        if section not in before:
            continue
        old_values = defaults.get(section, {}) | before[section]
        for name in sorted({*values, *old_values}):
            old, new = old_values.get(name), json.loads(json.dumps(values.get(name)))
            old = json.loads(json.dumps(old))
            if old != new and not (section == "options" and name in MAY_CHANGE):
                differences.append(f"{section}: {name} was {json.dumps(old)}, is now {json.dumps(new)}")
    if differences:
        raise ValueError(
            f"{path.parent} holds a run that was started differently:\n  "
            + "\n  ".join(differences)
            + "\nStart it as it was, or choose another --output."
        )
