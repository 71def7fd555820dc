"""Train OPT: `python train.py` trains a small one on the sources of Python's standard library; `--help` lists the rest.

`main` reads from top to bottom: options -> mesh and model -> run directory -> data -> state -> loop -> export. A run
that was killed at any moment goes on from its last checkpoint when it is started again with the same command, bit for
bit as if nothing had happened.
"""

import signal

# Ctrl-C ends the process: a KeyboardInterrupt may be lost amid the imports. (A job in the background may ignore it.)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from opt_jax import OPTForCausalLM
from opt_jax.parallel import agreement, processes
from opt_jax.parallel.agreement import on_first_process
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.system.disk import keep_standard_descriptors
from opt_jax.training import loggers, plan
from opt_jax.training.checkpoints import BestModel, Checkpoints, Due, Termination
from opt_jax.training.data import TrainingData, make_validation, open_data
from opt_jax.training.flops import flops_per_token, peak_flops
from opt_jax.training.metrics import Metrics, best_validation, complain, cut_back, machine, say
from opt_jax.training.nonfinite import kept_before_nonfinite
from opt_jax.training.options import (
    Options,
    check_grad_dtype,
    check_options,
    make_deterministic,
    parse_options,
    profiled_steps,
)
from opt_jax.training.run_directory import RunDirectory, open_run
from opt_jax.training.setup import Setup, make_setup
from opt_jax.training.step import TrainState, checksum, local_rows, place_batch


def main(options: Options) -> None:
    check_options(options)
    # Three things that must be said before JAX looks for devices.
    if options.deterministic:
        make_deterministic()
    absent_tpus = plan.topology_devices(options.topology) if options.topology else None  # for --plan
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

    # Mesh, model, optimizer, step: shapes and shardings, no array yet
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
        if not run.resuming:  # a run may go on with fewer devices
            check_grad_dtype(options, mesh)
        if run.finished:
            say(f"{run.path} is finished: {options.steps} steps. Try it: opt-jax generate --model {run.path}")
            return
        say(machine(mesh))

        # Data: documents -> tokenizer -> windows
        data = open_data(setup, run.path / "tokenizer" if run.resuming else None)
        run.compare(data.record())

        # Nothing is written before this line, where all that was asked for is known to make sense.
        run.begin(data.tokenizer)
        checkpoints = Checkpoints(
            run.path / "checkpoints",
            options.keep_checkpoints,
            options.keep_every,
            data.training.state,
            run.check_lock,
        )
        best = BestModel(run.path / "best", keep=1, before_write=run.check_lock)

        # State: restored, or begun, straight into its shards
        start, state = restore_state(setup, run, data, checkpoints)
        restore_metrics(run, start, state, best)

        last = options.steps if options.stop_after is None else min(options.steps, start + options.stop_after)
        announce(setup, run, data, start)
        state = fit(setup, run, data, checkpoints, best, state, start, last)
        if last < options.steps:
            say(f"stopped after step {last} of {options.steps}, as asked: the same command goes on from there")
            return

        state = dataclasses.replace(state, opt_state=None)  # its memory may be needed
        export(setup, run, data, state)


def restore_state(
    setup: Setup, run: RunDirectory, data: TrainingData, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
    """(step, state) of the newest checkpoint; without one, (0, the state before step 1). Also writes the run record."""
    options, start = setup.options, checkpoints.latest_step() or 0
    state: Any = None
    if not start or setup.lora:  # what LoRA does not train is in no checkpoint
        state = setup.first_state()
    if setup.lora:
        run.compare({"not trained": {"checksum of the parameters": checksum(state.frozen)}})
    run.write_record()
    if start:
        frozen = state and state.frozen
        start, state, data_state = checkpoints.restore_newest(
            setup.state, setup.shardings, complain, fall_back=options.fall_back, verify=options.verify
        )
        data.training.check_state(data_state, start)
        state = dataclasses.replace(state, frozen=frozen)
    return start, state


def restore_metrics(run: RunDirectory, start: int, state: TrainState, best: BestModel) -> None:
    """Go on with `metrics.jsonl` and the best model after step `start`."""
    path = run.path / "metrics.jsonl"
    on_first_process(run.check_lock)
    on_first_process(lambda: cut_back(path, start, complain))
    best_step, best.loss = json.loads(agreement.from_first(lambda: json.dumps(best_validation(path)).encode()))
    if start and best_step == start:  # the last start may have been killed between the checkpoint and its copy
        best.save_model(start, state)


def announce(setup: Setup, run: RunDirectory, data: TrainingData, start: int) -> None:
    """Say what will be done."""
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
    """`metrics.jsonl`, the progress bar, and the loggers that were asked for."""
    options, mesh, is_main = setup.options, setup.mesh, jax.process_index() == 0
    trained, parameters = setup.parameter_counts()
    counted = round(trained + (parameters - trained) * 2 / 3)  # of what is not trained there are no gradients
    device = mesh.devices.flat[0]
    if (peak := peak_flops(device)) is None:
        say(f"no MFU: the peak of {device.device_kind!r} is not in opt_jax/training/flops.py")
    also = []
    if is_main and options.tensorboard:
        also.append(loggers.TensorBoard(run.path / "tensorboard", start))
    if is_main and options.wandb:
        also.append(loggers.WandB(options.wandb, run.path, run.record))
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
        loggers=also,
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
    """The state after step `last`, from the one after step `start`; there is a checkpoint of it.

    Raises:
      SystemExit: SIGTERM or Ctrl-C asked for the end; there is a checkpoint of the last step that was done.
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
    reading = data.training.reader(rows, start, last, options.data_workers)
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
        jax.debug_nans(False),  # a run looks for NaN by itself; JAX's search for the operation cannot run within a step
    ):
        step, stopping = start, False
        pending = None  # the numbers of a step are fetched when the next one is already under way
        for step, batch_rows in enumerate(reader, start=start + 1):
            batch = place(batch_rows)
            trace.before(step)
            state, measured = train_step(state, batch)
            trace.after(step, measured)
            if pending is not None:
                metrics.record(*pending)
            pending = (step, measured)
            processes.reached(f"step {step + 1}")

            stopping = termination.asked(step)
            evaluate = step % options.eval_every == 0 or step == options.steps
            save = due(step) or step == last or stopping
            if evaluate or save:  # the metrics of a checkpoint's step are on disk before the checkpoint
                val_loss = metrics.record(*pending, val_loss=partial(validate, state) if evaluate else None)
                pending = None
                if val_loss is not None:
                    best.offer(step, state, val_loss)
            if save:
                metrics.flush()
                checkpoints.save(step, state)
                due.saved()
            if evaluate or save:
                metrics.pause()
            if stopping:
                break
    if stopping or termination.came and jax.process_count() == 1:  # it may come while the last checkpoint is written
        what, code = termination.reason_and_exit_code()
        say(f"{what}: stopped after step {step} of {options.steps}, and saved it: the same command goes on from there")
        sys.exit(code)
    return state


def export(setup: Setup, run: RunDirectory, data: TrainingData, state: TrainState) -> None:
    """Write the model to the run directory and show a first sample of it."""
    model = setup.lora.merge(state.full_model, setup.saved_model) if setup.lora else state.model
    on_first_process(run.check_lock)
    model.save_pretrained(run.path / "model", tokenizer=data.tokenizer)
    if setup.lora:
        say(f"the adapters are merged in: {run.path / 'model'} is a model like any other")
    if data.task:
        say(f'finished. Load it: {setup.model_class.__name__}.from_pretrained("{run.path}")')
    elif jax.process_count() == 1:
        assert data.sample_from is not None
        model = OPTForCausalLM.from_pretrained(run.path / "model")
        # `</s>`, and how a document begins, one that it has never seen where there is one.
        prompt = data.sample_from.read(0, min(12, -(-setup.seq_len // 2)))[None]
        room = min(120, setup.config.max_position_embeddings - prompt.shape[1])
        sample = model.generate(prompt, max_new_tokens=room, do_sample=True, temperature=0.8, top_p=0.95, seed=0)
        beginning, continuation = (data.tokenizer.decode(row) for row in (prompt[0, 1:], sample[0][prompt.shape[1] :]))
        say(f"\na sample: {run.path / 'model'} goes on from {beginning!r}\n\n{beginning}{continuation}\n")
        say(f"more of it: opt-jax generate --model {run.path} 'def '")
    else:
        say(f"finished: the model is in {run.path / 'model'}")


def run(args: Sequence[str] | None = None, program: str = "train.py") -> None:
    """`main` as a program: what ends it is one line on stderr, and an exit code."""
    keep_standard_descriptors()
    with processes.last_words(program, at_once=True):
        main(parse_options(args, program))


if __name__ == "__main__":
    run()
