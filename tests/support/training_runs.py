"""Small runs of train.py, in this process and as programs."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from support.processes import free_address, start

import train
from opt_jax import OPTConfig
from opt_jax.parallel.mesh import make_mesh

SCRIPT = Path(train.__file__)


def run_options(directory: Path, positions: int = 16, **changes: Any) -> dict[str, Any]:
    """Options, without --output, of a run that takes seconds. Write its config file and its text.

    Args:
      directory: holds the config file and the text.
      positions: of the model, and so the length of a sequence.
      changes: options that differ from those below.
    """
    config = OPTConfig(
        vocab_size=304,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=positions,
        dropout=0.1,
        init_std=0.05,
    )
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["def", "return", "self", "x", "(", ")"], k=60)) for _ in range(40)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = dict(
        data=(str(directory / "text.jsonl"),),
        model=str(directory / "config.json"),
        steps=12,
        batch_size=8,
        warmup_steps=3,
        learning_rate=6e-4,
        checkpoint_every=4,
        eval_every=6,
        eval_batches=1,
    )
    return options | changes


def run_here(options: dict[str, Any], output: str | Path, devices: int = 1) -> None:
    """Run train.py in this process, on its first `devices` devices, with the options that are not None."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda spec, _, dcn: make_mesh(spec, jax.devices()[:devices], dcn))
        train.main(train.Options(**given, output=str(output)))


def command_line(options: dict[str, Any], output: str | Path, script: Path = SCRIPT) -> list[str]:
    """The command that runs `script` with `options`, without those that are None."""
    lora = ["-W", "ignore::DeprecationWarning"] if "lora_rank" in options else []  # qwix uses Flax's old names
    words = [sys.executable, "-W", "error", *lora, str(script)]
    for name, value in (options | dict(output=output)).items():
        if value is not None:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def start_two(
    options: dict[str, Any],
    output: str | Path,
    others: dict[str, Any] | None = None,
    script: Path = SCRIPT,
    **variables: str,
) -> list[subprocess.Popen]:
    """Start one run of two processes, which have two devices each.

    Args:
      options: of both processes.
      output: of both processes.
      others: options that process 1 has instead.
      script: what process 1 runs.
      variables: of the environment.
    """
    job = dict(coordinator_address=free_address(), num_processes=2)
    commands = [
        command_line(options | job | dict(process_id=0), output),
        command_line(options | job | dict(process_id=1) | (others or {}), output, script),
    ]
    return [start(command, devices=2, **variables) for command in commands]


def metrics(output: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
