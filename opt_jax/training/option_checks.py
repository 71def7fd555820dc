"""Which options of `train.py` contradict each other, have no effect, or may not change when a run is resumed."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from opt_jax.system.messages import shown
from opt_jax.system.temporary import refuse_links
from opt_jax.training.files import read_record, run_directory
from opt_jax.training.options import MAY_CHANGE, PLANNED, Options, defaults_of

_FLOAT32 = np.finfo(np.float32)


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
    check_continuation(options)
    check_fine_tuning(options)
    if jax.config.jax_disable_jit:  # type: ignore[reportAttributeAccessIssue]
        raise ValueError("jax_disable_jit is on, but jit is what places a run's arrays: unset JAX_DISABLE_JIT")
    if options.plan and options.topology is None:
        raise ValueError("--plan needs --topology, the TPU slice to compile for, as in v5p:8x8x8")
    defaults = dataclasses.asdict(defaults_of(options.recipe))
    changed = [name for name, value in defaults.items() if getattr(options, name) != value]
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


def check_continuation(options: Options) -> None:
    """Check the options of a run that continues another.

    Raises:
      ValueError: see `check_options`.
    """
    if options.continue_from is None:
        if options.continue_schedule != Options.continue_schedule:
            raise ValueError("--continue-schedule is for --continue-from: leave it out, or name the run")
        return
    for name in ("task", "lora_rank"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--continue-from goes on with pretraining: start a new run from --model RUN/model with {_flag(name)}"
            )
    if run_directory(options.continue_from) == run_directory(options.output):
        raise ValueError(
            f"--continue-from {options.continue_from}: is --output, too; give the new run another --output"
        )


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


def read_finished(options: Options) -> dict[str, Any]:
    """The record of the run that --continue-from names.

    Raises:
      ValueError: it is no run, or is not finished; or --steps asks for no more steps.
    """
    assert options.continue_from is not None
    path = run_directory(options.continue_from)
    if not (path / "run.json").exists():
        raise ValueError(f"--continue-from {path}: no run of train.py (there is no run.json)")
    record = read_record(path / "run.json")
    done = record["options"].get("steps")
    if type(done) is not int or not (path / "model/config.json").exists():
        raise ValueError(f"--continue-from {path}: the run is not finished; the command that began it goes on with it")
    if options.steps <= done:
        raise ValueError(f"--steps {options.steps}: {path} has done {done} steps; --steps counts these, so give more")
    if options.continue_schedule == "warm-up" and options.steps - done <= options.warmup_steps:
        raise ValueError(
            f"--continue-schedule warm-up: all {options.steps - done} steps after the {done} of {path} belong to the "
            f"warm-up of {options.warmup_steps}; take more --steps"
        )
    return record


def compare_with_finished(options: Options, finished: dict[str, Any], record: dict) -> None:
    """Check that a run which continues a finished one has its options, model and data.

    Raises:
      ValueError: they differ.
    """
    assert options.continue_from is not None
    may_differ = ("steps", "continue_from", "continue_schedule")
    defaults = dataclasses.asdict(Options())
    allowed = {name: finished["options"].get(name, defaults[name]) for name in may_differ}
    compare_with_first_start(
        run_directory(options.continue_from) / "run.json",
        record | {"options": record["options"] | allowed},
        "Give --continue-from the options of that run; only --steps and --output may be others.",
    )


def compare_with_first_start(
    path: epath.Path, record: dict, advice: str = "Start it as it was, or choose another --output."
) -> None:
    """Check that nothing has changed since the first start of a run that would change its losses.

    An option that did not exist at the first start counts as if it had had its default. Other sections that were not
    recorded then are not compared.

    Args:
      path: the run.json of the first start; it need not exist.
      record: the record of this start.
      advice: the last line of the error.

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
    if any(difference.startswith("options: steps ") for difference in differences):
        advice += " A finished run goes on in a new one: --continue-from."
    if differences:
        raise ValueError(
            f"{path.parent} holds a run that was started differently:\n  " + "\n  ".join(differences) + f"\n{advice}"
        )
