"""Train OPT: `python train.py` trains a small one on the sources of Python's standard library; `--help` lists the rest.

Reads from top to bottom: options -> run directory -> data -> mesh and state -> loop -> export. Killed at any moment and
started again with the same command, a run goes on from its last checkpoint, bit for bit as if nothing had happened.
"""

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer, stack_layers
from opt_jax.sharding import make_mesh, use_mesh
from opt_jax.training import data
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.metrics import Metrics, cut_back
from opt_jax.training.optimizer import make_optimizer, make_schedule
from opt_jax.training.step import batch_loss, make_train_step, new_model, new_state, place_batch, state_shardings

# The model of a run without --model: 1.1M parameters, minutes on two CPU cores. Deviations from the paper's recipe: no
# dropout, because so short a run does not overfit, and a wider initialisation, because 0.006 suits wide models.
SMALL = OPTConfig(
    vocab_size=2048, hidden_size=128, num_hidden_layers=4, ffn_dim=512, num_attention_heads=2,
    max_position_embeddings=256, dropout=0.0, init_std=0.02,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


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
    checkpoint_every: int = 200
    """Steps between checkpoints; there is always one at the end."""
    keep_checkpoints: int = 2
    eval_every: int = 200
    """Steps between measurements of the loss on held-out documents; there is always one at the end."""
    eval_batches: int = 20
    log_every: int = 20
    """Steps between lines where the output is not a terminal."""
    stop_after: int | None = None
    """End after this many steps of this start, with a checkpoint; start again to go on."""


MAY_CHANGE = {
    "output", "mesh", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batches", "log_every", "stop_after",
}  # fmt: skip


def check_options(options: Options) -> None:
    for name in ("steps", "batch_size", "seq_len", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batches",
                 "log_every", "stop_after", "vocab_size"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("learning_rate", "clip_norm", "init_std"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name in ("weight_decay", "warmup_steps"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must not be negative")


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


def compare_with_first_start(path: Path, record: dict) -> None:
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


def main(options: Options) -> None:
    check_options(options)
    is_main = jax.process_index() == 0  # writes the run directory, alone
    say = partial(print, flush=True) if is_main else lambda *_: None

    # -----------------------------------------------------------------------------------------------------------------
    # Run directory: resume, or start
    # -----------------------------------------------------------------------------------------------------------------

    output = Path(options.output)
    mesh = make_mesh(options.mesh)
    platform = mesh.devices.flat[0].platform
    config, start = model_config(options)
    seq_len = options.seq_len or config.max_position_embeddings
    dtype = options.dtype if options.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    if seq_len > config.max_position_embeddings:
        raise ValueError(f"--seq-len {seq_len}: the model has {config.max_position_embeddings} positions")
    rows_over = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.batch_size % rows_over:
        raise ValueError(f"--batch-size {options.batch_size} does not divide over the mesh's data x fsdp = {rows_over}")

    record = {
        "options": dataclasses.asdict(options) | {"seq_len": seq_len, "dtype": dtype},
        "model": config.to_hf(),
    }
    resuming = (output / "run.json").exists()
    compare_with_first_start(output / "run.json", record)
    if resuming and (output / "model").exists():
        say(f"{output} is finished: {options.steps} steps. Try it: opt-jax generate --model {output}")
        return

    # -----------------------------------------------------------------------------------------------------------------
    # Data: documents -> tokenizer -> windows
    # -----------------------------------------------------------------------------------------------------------------

    files = data.find_files(options.data) if options.data else data.stdlib_files()
    training, held_out = data.split_documents(data.read_documents(files))
    if resuming:
        tokenizer = OPTTokenizer.from_pretrained(output / "tokenizer")
    elif options.tokenizer or start:
        tokenizer = OPTTokenizer.from_pretrained(options.tokenizer or str(start))
    else:
        size = options.vocab_size or config.vocab_size
        say(f"training a tokenizer of {size} entries on {sum(map(len, training)) / 1e6:.1f}M characters")
        tokenizer = data.train_tokenizer(training, size)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, but the model's vocabulary ends at {config.vocab_size}: "
            "choose another --tokenizer or --model"
        )
    tokens, held_out_tokens = data.tokenize(training, tokenizer), data.tokenize(held_out, tokenizer)
    windows = data.Windows(tokens, seq_len, options.batch_size, options.seed)
    validation = None
    if len(held_out_tokens) > seq_len:
        validation = data.Windows(held_out_tokens, seq_len, options.batch_size)

    record["data"] = {"tokens": len(tokens), "fingerprint": data.fingerprint(tokens)}
    compare_with_first_start(output / "run.json", record)

    # -----------------------------------------------------------------------------------------------------------------
    # Nothing is written before this line, where all that was asked for is known to make sense
    # -----------------------------------------------------------------------------------------------------------------

    if is_main:
        output.mkdir(parents=True, exist_ok=True)
        if not resuming:
            data.save_tokenizer(tokenizer, output / "tokenizer")
        temporary = output / "run.json.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, output / "run.json")
    checkpoints = Checkpoints(output / "checkpoints", options.keep_checkpoints)
    first = checkpoints.latest_step() or 0
    if is_main:
        cut_back(output / "metrics.jsonl", first)

    # -----------------------------------------------------------------------------------------------------------------
    # Mesh and state: restored, or begun, straight into their shards
    # -----------------------------------------------------------------------------------------------------------------

    schedule = make_schedule(peak=options.learning_rate, warmup_steps=options.warmup_steps, steps=options.steps)
    optimizer = make_optimizer(schedule, weight_decay=options.weight_decay, clip_norm=options.clip_norm)
    begin = lambda: new_state(new_model(config, options.seed, dtype), optimizer)  # noqa: E731
    abstract = jax.eval_shape(begin)
    shardings = state_shardings(abstract, mesh)
    if first:
        state = checkpoints.restore(first, abstract, shardings)
    elif start:
        loaded = OPTForCausalLM.from_pretrained(start, dtype=dtype, param_dtype=jnp.float32, mesh=mesh)
        # Its arrays in a model built from `config`, which may ask for another dropout.
        model = jax.tree.unflatten(jax.tree.structure(abstract.model), jax.tree.leaves(stack_layers(loaded)))
        state = jax.jit(partial(new_state, optimizer=optimizer), out_shardings=shardings)(model)
    else:
        state = jax.jit(begin, out_shardings=shardings)()

    train_step = make_train_step(optimizer, schedule, config, options.seed, shardings, mesh)
    eval_step = jax.jit(batch_loss)
    batch_shape = (options.batch_size, seq_len + 1)

    def validate() -> float | None:
        if validation is None:
            return None
        count = max(1, min(options.eval_batches, validation.count // options.batch_size))
        batches = (place_batch(partial(validation.rows, i), batch_shape, mesh) for i in range(count))
        return sum(float(jax.device_get(eval_step(state.model, batch))) for batch in batches) / count

    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.model))
    devices = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    say(f"model: {options.model}, {parameters:,} parameters, computing in {dtype}; {platform} mesh {devices}")
    say(f"data: {len(files)} files, {len(tokens):,} tokens to train on, {len(held_out_tokens):,} held out")
    say(f"run: {output}, steps {first} to {options.steps}, {options.batch_size} x {seq_len} tokens each")
    if validation is None:
        say(f"no validation loss: the held-out documents do not fill one sequence of {seq_len} tokens")

    # -----------------------------------------------------------------------------------------------------------------
    # Loop
    # -----------------------------------------------------------------------------------------------------------------

    last = options.steps if options.stop_after is None else min(options.steps, first + options.stop_after)
    metrics = Metrics(
        output / "metrics.jsonl" if is_main else None,
        start=first, steps=options.steps, tokens_per_step=options.batch_size * seq_len, log_every=options.log_every,
    )  # fmt: skip
    with use_mesh(mesh), metrics, jax.transfer_guard("disallow"):
        pending = None  # the numbers of a step are fetched when the next one is already under way
        for step in range(first + 1, last + 1):
            batch = place_batch(partial(windows.rows, step - 1), batch_shape, mesh)
            state, measured = train_step(state, batch)
            if pending is not None:
                metrics.record(*pending)
            pending = (step, measured)

            evaluate = step % options.eval_every == 0 or step == options.steps
            save = step % options.checkpoint_every == 0 or step == last
            if evaluate or save:  # the metrics of a checkpoint's step are on disk before the checkpoint
                metrics.record(*pending, val_loss=validate if evaluate else None)
                pending = None
            if save:
                checkpoints.save(step, state)
            if evaluate or save:
                metrics.pause()
    checkpoints.close()
    if last < options.steps:
        say(f"stopped after step {last} of {options.steps}, as asked: the same command goes on from there")
        return

    # -----------------------------------------------------------------------------------------------------------------
    # Export, and a first sample
    # -----------------------------------------------------------------------------------------------------------------

    if is_main:
        state.model.save_pretrained(output / "model", tokenizer=tokenizer)
        model = OPTForCausalLM.from_pretrained(output / "model")
        prompt = held_out_tokens[
            None, : min(12, seq_len // 2)
        ]  # </s>, and how a document begins that it has never seen
        room = min(120, config.max_position_embeddings - prompt.shape[1])
        sample = model.generate(prompt, max_new_tokens=room, do_sample=True, temperature=0.8, top_p=0.95, seed=0)
        beginning, continuation = (tokenizer.decode(row) for row in (prompt[0, 1:], sample[0][prompt.shape[1] :]))
        say(f"\na sample: {output / 'model'} goes on from {beginning!r}\n\n{beginning}{continuation}\n")
        say(f"more of it: opt-jax generate --model {output} 'def '")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from the last checkpoint")
