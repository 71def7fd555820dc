"""Train OPT: `python train.py` trains a small model on the sources of Python's standard library.

`main` reads from top to bottom: options -> mesh and model -> run directory -> data -> state -> loop -> export. If a run
is killed at any moment, the same command resumes it from its last checkpoint, bit for bit as if nothing had happened.
"""

import signal

# Ctrl-C during the imports ends the process; a KeyboardInterrupt may be lost there. A background job that ignores
# SIGINT still ignores it.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from opt_jax import OPTForCausalLM
from opt_jax.checkpoints.saving import write_adapter
from opt_jax.parallel import agreement, processes
from opt_jax.parallel.agreement import on_first_process
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.parallel.rules import named_leaves
from opt_jax.parallel.topologies import topology_devices
from opt_jax.system.disk import keep_standard_descriptors
from opt_jax.training import goodput, loggers, plan
from opt_jax.training.checkpoints import BestModel, Checkpoints
from opt_jax.training.data import TrainingData, make_validation, open_data
from opt_jax.training.files import run_directory
from opt_jax.training.flops import flops_per_token, peak_flops
from opt_jax.training.metrics import Metrics, best_validation, complain, cut_back, machine, say
from opt_jax.training.moments import Due, Termination
from opt_jax.training.nonfinite import kept_before_nonfinite
from opt_jax.training.option_checks import check_grad_dtype, check_options, compare_with_finished, profiled_steps
from opt_jax.training.options import Options, make_deterministic, parse_options
from opt_jax.training.run_directory import RunDirectory, open_run
from opt_jax.training.setup import Setup, make_setup
from opt_jax.training.step import TrainState, checksum, local_rows, place_batch


def main(options: Options) -> None:
    """Do one start of a run: train to the last step, or as far as the options say, and save the model at the end.

    Raises:
      OSError, ValueError: an option, the data or the run directory is bad, or training failed.
      SystemExit: see `fit`.
    """
    check_options(options)
    # JAX must know these three before it looks for devices.
    if options.deterministic:
        make_deterministic()
    absent_tpus = topology_devices(options.topology) if options.topology else None  # for --plan
    processes.start(
        "off" if options.plan else options.distributed,
        options.coordinator_address,
        options.num_processes,
        options.process_id,
        options.heartbeat_seconds,
        options.hang_minutes,
    )
    agreement.check_same_options(dataclasses.asdict(options))
    agreement.check_same_code(__file__)

    # Mesh, model, optimizer, step: shapes and shardings, no arrays yet
    mesh = make_mesh(options.mesh, absent_tpus, dcn=options.dcn_mesh)
    setup = make_setup(options, mesh)
    if options.plan:
        check_grad_dtype(options, mesh)
        train_step = setup.make_train_step()
        with use_mesh(mesh):
            numbers = plan.make_plan(
                train_step, setup.state, setup.shardings, mesh, setup.config, options, setup.seq_len
            )
        plan.report(numbers, options.plan_output)
        return

    # Run directory: resume, or start
    record = {
        "options": dataclasses.asdict(options) | {"process_id": None, "seq_len": setup.seq_len, "dtype": setup.dtype},
        "model": setup.config.to_hf(),
    }
    with open_run(options.output, record) as run:
        if not run.resuming:  # a resumed run may have a mesh on which the option has no effect
            check_grad_dtype(options, mesh)
        if run.finished:
            say(f"{run.path} is finished: {options.steps} steps. Try it: opt-jax generate --model {run.path}")
            return
        say(machine(mesh))

        # Data: documents -> tokenizer -> windows
        data = open_data(setup, saved_tokenizer(options, run))
        run.compare(data.record())
        if setup.continued is not None:
            compare_with_finished(options, setup.continued, run.record)

        # Nothing is written before this line. All options and data have been checked.
        run.begin(data.tokenizer)
        checkpoints = Checkpoints(
            run.path / "checkpoints",
            options.keep_checkpoints,
            options.keep_every,
            data.training.state,
            run.check_lock,
        )
        best = BestModel(run.path / "best", keep=1, before_write=run.check_lock)

        # State: restored or new, each array directly in its shards
        start, state = restore_state(setup, run, data, checkpoints)
        restore_metrics(setup, run, start, state, best)

        last = options.steps if options.stop_after is None else min(options.steps, start + options.stop_after)
        announce(setup, run, data, start)
        state = fit(setup, run, data, checkpoints, best, state, start, last)
        if last < options.steps:
            say(f"stopped after step {last} of {options.steps}, as asked: the same command resumes the run")
            return

        state = dataclasses.replace(state, opt_state=None)  # frees memory for the export
        export(setup, run, data, state)


def saved_tokenizer(options: Options, run: RunDirectory) -> Any:
    """The tokenizer of the run, or of the run that it continues; None before the first start of a new run."""
    if run.resuming:
        return run.path / "tokenizer"
    return None if options.continue_from is None else run_directory(options.continue_from) / "tokenizer"


def restore_state(
    setup: Setup, run: RunDirectory, data: TrainingData, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
    """The step and the state of the newest checkpoint, or 0 and the state before step 1. Also writes the run record.

    Without a checkpoint of its own, a run that continues another one begins with the last checkpoint of that one.

    Raises:
      ValueError: the checkpoint is damaged, or the data or the frozen parameters are not those of the first start.
    """
    options, start = setup.options, checkpoints.latest_step() or 0
    state: Any = None
    fall_back = options.fall_back
    if not start and options.continue_from is not None:
        assert setup.continued is not None
        last: int = setup.continued["options"]["steps"]
        path = run_directory(options.continue_from) / "checkpoints"
        checkpoints = Checkpoints(path, options.keep_checkpoints, read_only=True)
        if checkpoints.latest_step() != last:
            raise ValueError(f"{path}: the newest checkpoint is of step {checkpoints.latest_step()}, not of {last}")
        start, fall_back = last, False  # falling back would rename the damaged ones
    elif not start or setup.lora:  # parameters that LoRA does not train are in no checkpoint
        state = setup.first_state()
    if setup.lora:
        run.compare({"not trained": {"checksum of the parameters": checksum(state.frozen)}})
    run.write_record()
    if start:
        frozen = state and state.frozen
        with goodput.spend("restore"):
            start, state, data_state = checkpoints.restore_newest(
                setup.state, setup.shardings, complain, fall_back=fall_back, verify=options.verify
            )
        data.training.check_state(data_state, start)
        state = dataclasses.replace(state, frozen=frozen)
    return start, state


def restore_metrics(setup: Setup, run: RunDirectory, start: int, state: TrainState, best: BestModel) -> None:
    """Cut `metrics.jsonl` back to step `start`, and restore the lowest validation loss (and a lost model of it)."""
    path = run.path / "metrics.jsonl"
    on_first_process(run.check_lock)
    first = 0 if setup.continued is None else setup.continued["options"]["steps"]
    on_first_process(lambda: cut_back(path, start, complain, first))
    best_step, best.loss = json.loads(agreement.from_first(lambda: json.dumps(best_validation(path)).encode()))
    if start and best_step == start:  # an earlier start may have been killed before it saved the best model
        best.save_model(start, state)


def announce(setup: Setup, run: RunDirectory, data: TrainingData, start: int) -> None:
    """Print model, data and steps of the run."""
    options, (trained, parameters) = setup.options, setup.parameter_counts()
    recipe = f" (recipe {options.recipe})" if options.recipe else ""
    share = f" ({trained:,} of them trained: LoRA of rank {setup.lora.rank})" if setup.lora else ""
    say(
        f"model: {options.model}{recipe}, {parameters:,} parameters{share}, computing in {setup.dtype}, "
        f"attention: {setup.attention}"
    )
    say(f"data: {data.summary}")
    say(
        f"run: {run.path}, steps {start} to {options.steps}, {options.batch_size} x {setup.seq_len} tokens each"
        + (" at most" if data.task else "")
    )
    if data.held_out is None:
        say(f"no validation loss: the held-out documents do not fill one sequence of {setup.seq_len} tokens")


def open_metrics(setup: Setup, run: RunDirectory, data: TrainingData, start: int) -> Metrics:
    """The `Metrics` of this start, with the loggers of the options."""
    options, mesh, is_main = setup.options, setup.mesh, jax.process_index() == 0
    trained, parameters = setup.parameter_counts()
    # Of the 6 FLOPs per parameter and token, a parameter's gradient takes 2. Frozen parameters have none.
    counted = round(trained + (parameters - trained) * 2 / 3)
    device = mesh.devices.flat[0]
    if (peak := peak_flops(device)) is None:
        say(f"no MFU: the peak of {device.device_kind!r} is not in opt_jax/training/flops.py")
    chosen_loggers = []
    if is_main and options.tensorboard:
        chosen_loggers.append(loggers.TensorBoard(run.path / "tensorboard", start))
    if is_main and options.wandb:
        chosen_loggers.append(loggers.WandB(options.wandb, run.path, run.record))
    return Metrics(
        run.path / "metrics.jsonl" if is_main else None,
        start=start,
        steps=options.steps,
        tokens_per_step=data.tokens_per_step,
        log_every=options.log_every,
        flops_per_step=flops_per_token(setup.config, counted, setup.seq_len) * data.tokens_per_step,
        peak_flops=peak and peak * mesh.size,
        batch_rows=lambda step: data.training.starts(step - 1),
        skip_nonfinite=options.skip_nonfinite,
        loggers=chosen_loggers,
        memory_of=mesh.local_devices,
        before_write=run.check_lock,
    )


def fit(
    setup: Setup,
    run: RunDirectory,
    data: TrainingData,
    checkpoints: Checkpoints,
    best: BestModel,
    state: TrainState,
    start: int,
    last: int,
) -> TrainState:
    """The training loop: takes the state after step `start`, and returns that after step `last`, with a checkpoint.

    Raises:
      SystemExit: SIGTERM or Ctrl-C has ended the loop, after a checkpoint of its last step.
      ValueError: a loss or gradient is NaN or infinite; see `kept_before_nonfinite` and `Metrics.record`.
    """
    options, mesh = setup.options, setup.mesh
    train_step = setup.make_train_step()
    validate = make_validation(setup, data)
    place = partial(place_batch, batch_size=options.batch_size, accumulate=options.accumulate, mesh=mesh)
    metrics = open_metrics(setup, run, data, start)
    trace = loggers.Trace(profiled_steps(options.profile), run.path / "profile", start, last, say)
    kept = kept_before_nonfinite(checkpoints, lambda: state, setup.shardings)
    due = Due(options.checkpoint_every, options.checkpoint_minutes, options.keep_every, start)
    processes.reached(f"step {start + 1}")
    guard = jax.transfer_guard("disallow")
    rows = local_rows(options.batch_size, options.accumulate, mesh)
    pending = None  # a step's metrics are fetched when the next step has been dispatched

    def waiting() -> contextlib.AbstractContextManager:
        jax.block_until_ready(pending)  # while a step is under way, waiting for data costs nothing
        return goodput.spend("data")

    reading = data.training.reader(rows, start, last, options.data_workers, waiting)
    with (
        Termination() as termination,
        reading as reader,
        checkpoints,
        best,
        kept,
        use_mesh(mesh),
        metrics,
        trace,
        guard,
        jax.debug_nans(False),  # the step looks for NaNs; JAX would repeat it operation by operation, against the guard
    ):
        step, stopping = start, False
        for step, batch_rows in enumerate(reader, start=start + 1):
            batch = place(batch_rows)
            trace.before(step)
            with goodput.spend("compile") if step == start + 1 else contextlib.nullcontext():
                state, measured = train_step(state, batch)
            trace.after(step, measured)
            if pending is not None:
                metrics.record(*pending)
            pending = (step, measured)
            processes.reached(f"step {step + 1}")

            stopping = termination.asked(step)
            evaluate = step % options.eval_every == 0 or step == options.steps
            save = due(step) or step == last or stopping
            if evaluate or save:  # a checkpoint's step must be in `metrics.jsonl` before the checkpoint is written
                val_loss = metrics.record(*pending, val_loss=partial(validate, state) if evaluate else None)
                pending = None
                if val_loss is not None:
                    with goodput.spend("checkpoint"):
                        best.offer(step, state, val_loss)
            if save:
                with goodput.spend("checkpoint"):
                    metrics.flush()
                    checkpoints.save(step, state)
                due.saved()
            if evaluate or save:
                metrics.pause()
            if stopping:
                break
    if (summary := metrics.goodput()) is not None:
        say(summary)
    # The signal may also have come after the loop, while the last checkpoint was written.
    if stopping or termination.came and jax.process_count() == 1:
        what, code = termination.reason_and_exit_code()
        say(f"{what}: stopped after step {step} of {options.steps}, and saved it: the same command resumes the run")
        sys.exit(code)
    return state


def export(setup: Setup, run: RunDirectory, data: TrainingData, state: TrainState) -> None:
    """Save the model in the run directory, and print a sample of it."""
    model = setup.lora.merge(state.full_model, setup.saved_model) if setup.lora else state.model
    on_first_process(run.check_lock)
    if setup.lora:  # before the model, with which the run is finished
        trained, name = named_leaves(state.model), setup.model_class.__name__
        write_adapter(run.path / "adapter", trained, setup.lora, setup.options.model, name)
    model.save_pretrained(run.path / "model", tokenizer=data.tokenizer)
    if setup.lora:
        say(f"the adapters are merged in: {run.path / 'model'} is a model without adapters")
        say(f"for PEFT, they are also in {run.path / 'adapter'}")
    if data.task:
        say(f'finished. Load it: {setup.model_class.__name__}.from_pretrained("{run.path}")')
    elif jax.process_count() == 1:
        assert data.sample_from is not None
        model = OPTForCausalLM.from_pretrained(run.path / "model")
        # `</s>` and the beginning of a document, which is held out if any are.
        prompt = data.sample_from.read(0, min(12, -(-setup.seq_len // 2)))[None]
        room = min(120, setup.config.max_position_embeddings - prompt.shape[1])
        sample = model.generate(prompt, max_new_tokens=room, do_sample=True, temperature=0.8, top_p=0.95, seed=0)
        beginning, continuation = (data.tokenizer.decode(row) for row in (prompt[0, 1:], sample[0][prompt.shape[1] :]))
        say(f"\na sample: {run.path / 'model'} continues {beginning!r}\n\n{beginning}{continuation}\n")
        say(f"more samples: opt-jax generate --model {run.path} 'def '")
    else:
        say(f"finished: the model is in {run.path / 'model'}")


def run(args: Sequence[str] | None = None, program: str = "train.py") -> None:
    """Run `main` as a program. An error is one line on stderr, and an exit code."""
    keep_standard_descriptors()
    with processes.last_words(program, at_once=True):
        main(parse_options(args, program))


if __name__ == "__main__":
    run()
