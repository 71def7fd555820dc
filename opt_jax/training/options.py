"""What `train.py` can be told, and what may not be told together: its options, and the model they stand for."""

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

# The model of a run without --model: 1.1M parameters, minutes on two CPU cores. Deviations from the paper's recipe: no
# dropout, because so short a run does not overfit, and a wider initialisation, because 0.006 suits wide models.
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
    """The paper's settings for one of its sizes: defaults for all options below, which win where they are given.
    `--recipe opt-125m --help` shows them."""
    data: tuple[str, ...] = ()
    """Text, .jsonl, .json, .csv, .parquet or .arrow files, compressed or not; .npy files of `opt-jax tokenize`;
    directories or globs of them; URLs (gs://, s3://, hf://); datasets as hf:NAME[,CONFIG][:SPLIT]. Default: the
    sources of the standard library."""
    mixture: tuple[float, ...] = ()
    """A weight for each of --data, as in `--data wiki.npy books/ --mixture 0.7 0.3`: so many of the sequences come from
    it. Default: all of the data is one."""
    validation_data: tuple[str, ...] = ()
    """What the validation loss (with --task also accuracy, or EM and F1) is measured on, as --data. Default: a part of
    the data, which is then held out."""
    pack: Literal["concat", "segments"] = "concat"
    """Documents follow each other, with </s> between them. concat: a token sees all before it in its sequence;
    segments: only its own document, and positions restart with each."""
    text_key: str = "text"
    """The key or column of the text, in all of these but text files."""
    skip_bad_records: bool = False
    """Leave out broken lines, bytes that are no UTF-8 and empty files, and count them. Default: stop at the first."""
    task: Literal["sequence-classification", "question-answering"] | None = None
    """Fine-tune for this, from the checkpoint --model. --data then takes lines "text TAB label", or SQuAD's JSON."""
    lora_rank: int | None = None
    """Train adapters of this rank (and a task's head), not the model's own weights. They are merged in at the end."""
    lora_alpha: float = 16.0
    """For --lora-rank: adapters count alpha / rank."""
    lora_targets: tuple[Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], ...] = ("q_proj", "v_proj")
    """For --lora-rank: the matrices of each layer that get an adapter."""
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
    """The peak, reached after the warm-up. The paper's are lower: see --recipe."""
    warmup_steps: int = 100
    final_lr: float = 0.1
    """The learning rate falls linearly to this share of the peak at the last step."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    """Of Adam."""
    clip_norm: float = 1.0
    dropout: float | None = None
    """Default: the model configuration's (0.1 in the presets, 0 in "small")."""
    attention_dropout: float | None = None
    """Default: the model configuration's."""
    init_std: float | None = None
    """Standard deviation of new weights. Default: the model configuration's; the paper's 0.006 for a preset."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto: splash on TPUs, cudnn on GPUs in bfloat16, else xla; xla also where there is dropout on its weights."""
    remat: Remat = "none"
    """What the backward pass computes again, from the most memory to the least: none, dots (all but products of
    matrices), names (all but what comes out of attention), full (all but each layer's input)."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which gradients are added up over fsdp. bfloat16 sends half as much; optimizer state is always float32."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; parameters are float32. auto: float32 on CPU, bfloat16 elsewhere."""
    seed: int = 0
    # These may differ from one start of a run to the next.
    data_workers: int = 0
    """Processes that read ahead. Default: threads of this one."""
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
    fall_back: bool = False
    """If the newest checkpoint is damaged, go on from the newest that is not, and rename those after it."""
    verify: bool = True
    """Compare what is read of a checkpoint with its checksums."""
    eval_every: int = 200
    """Steps between measurements of the loss on held-out documents; there is always one at the end."""
    eval_batches: int = 20
    log_every: int = 20
    """Steps between lines where the output is not a terminal."""
    stop_after: int | None = None
    """End after this many steps of this start, with a checkpoint; start again to go on."""
    skip_nonfinite: bool = False
    """Where a loss or gradient is NaN or infinite, pass over the update and go on. Default: stop, before the update."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too, below the run directory."""
    wandb: str | None = None
    """Send the metrics to this project of Weights & Biases, too."""
    profile: str | None = None
    """Trace the steps FIRST:LAST, both included, to the directory `profile` of the run directory; as in 10:13."""
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
    plan: bool = False
    """Train nothing: compile the step for the TPUs of --topology, and print what it needs and sends. Needs no TPU."""
    topology: str | None = None
    """For --plan: a TPU slice by its shape in chips, as in v5e:4x8, v6e:16x16 or v5p:8x8x8."""
    plan_output: str | None = None
    """For --plan: also write its numbers to this JSON file."""


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
# What the compiled step depends on, and with it a plan.
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
    """The options on the command line, over those of its --recipe, over the defaults.

    Raises:
      ValueError: no such recipe. (Other mistakes, and --help, end the program as tyro does.)
    """
    args = sys.argv[1:] if args is None else list(args)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", nargs="?")  # without a name: tyro says what is wrong
    name = first.parse_known_args(args)[0].recipe
    return tyro.cli(Options, args=args, default=_defaults(name), prog=program)


def _defaults(recipe: str | None) -> Options:
    return Options(**recipe_options(recipe)) if recipe else Options()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _in_float32(number: float) -> bool:
    """Whether float32 has a finite number for it, and not 0 for what is none."""
    return number == 0 or float(_FLOAT32.tiny) <= abs(number) <= float(_FLOAT32.max)  # False for NaN


def check_options(options: Options) -> None:
    for name, value in dataclasses.asdict(options).items():
        values = value if isinstance(value, tuple) else (value,)
        if "" in values:  # as of a shell's variable that is not set
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
    if options.seed >= 2**32:  # JAX would take the lower bits
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
            raise ValueError(f"--{option} needs the package {package}: pip install 'opt-jax[{option}]'")


def check_grad_dtype(options: Options, mesh: Mesh) -> None:
    if options.grad_dtype != Options.grad_dtype and mesh.shape["fsdp"] == 1:
        raise ValueError(f"--grad-dtype {options.grad_dtype} without effect: the mesh has fsdp=1, and adds up nothing")


def check_fine_tuning(options: Options) -> None:
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
        raise ValueError("--lora-rank needs the package qwix: pip install 'opt-jax[lora]'")


def profiled_steps(profile: str | None) -> range:
    """The steps of --profile FIRST:LAST, LAST included.

    Raises:
      ValueError: not of this form, or no steps.
    """
    if profile is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", profile)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--profile {profile}: needs the first and the last step to trace, as in 10:13")
    return range(int(match[1]), int(match[2]) + 1)


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
    """Refuse to resume a run with anything changed that would change its losses.

    An option that did not exist when the run began counts as having had its default; what was not recorded then is not
    compared.
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
