"""Train OPT: `python train.py` trains a small one on the sources of Python's standard library; `--help` lists the rest.

Reads from top to bottom: options -> run directory -> data -> mesh and state -> loop -> export. Killed at any moment and
started again with the same command, a run goes on from its last checkpoint, bit for bit as if nothing had happened.
"""

import signal

# Ctrl-C ends the process: a KeyboardInterrupt may be lost amid the imports. (A job in the background may ignore it.)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax

from opt_jax import OPTForCausalLM, OPTTokenizer
from opt_jax.data.corpus import Corpus
from opt_jax.data.tokenizers import (
    read_tokenizer,
    save_tokenizer,
    tokenizer_from_bytes,
    tokenizer_to_bytes,
    train_tokenizer,
)
from opt_jax.data.windows import Windows
from opt_jax.model.attention_choice import choose_attention
from opt_jax.model.lora import LoRA, is_trained
from opt_jax.parallel import agreement, processes
from opt_jax.parallel.agreement import on_first_process
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.system.disk import keep_standard_descriptors
from opt_jax.training import finetuning, loggers, plan
from opt_jax.training.checkpoints import Checkpoints, Due, Termination
from opt_jax.training.files import begin_run, check_run_directory, run_directory, write_record
from opt_jax.training.flops import flops_per_token, peak_flops
from opt_jax.training.metrics import Metrics, best_validation, cut_back, machine
from opt_jax.training.nonfinite import kept_before_nonfinite
from opt_jax.training.optimizer import make_optimizer, make_schedule
from opt_jax.training.options import (
    Options,
    check_grad_dtype,
    check_options,
    compare_with_first_start,
    make_deterministic,
    model_config,
    parse_options,
    profiled_steps,
)
from opt_jax.training.run_lock import RunLock
from opt_jax.training.step import (
    batch_loss,
    check_divides,
    checksum,
    local_rows,
    make_eval_step,
    make_train_step,
    new_model,
    new_state,
    place_batch,
    state_shardings,
)
from opt_jax.training.tasks.common import TASKS, make_predict_step, task_loss


def main(options: Options) -> None:
    with ExitStack() as held:
        train(options, held)


def train(options: Options, held: ExitStack) -> None:
    """held: what is let go of at the end, whichever it is."""
    check_options(options)
    # Three things that must be said before JAX looks for devices.
    if options.deterministic:
        make_deterministic()
    absent = plan.topology_devices(options.topology) if options.topology else None  # --plan: TPUs that are not here
    processes.start(
        "off" if options.plan else options.distributed,
        options.coordinator_address,
        options.num_processes,
        options.process_id,
        options.heartbeat_seconds,
        options.hang_minutes,
    )
    common = dataclasses.asdict(options) | {"process_id": None}  # what must be the same on all processes
    agreement.check_same({f"--{k.replace('_', '-')}": v for k, v in common.items()})
    agreement.check_same_code(__file__)
    is_main = jax.process_index() == 0  # writes the run directory, alone
    say = partial(print, flush=True) if is_main else lambda *_: None
    complain = partial(print, file=sys.stderr, flush=True)  # of what only one process may see

    # -----------------------------------------------------------------------------------------------------------------
    # Devices and model
    # -----------------------------------------------------------------------------------------------------------------

    mesh = make_mesh(options.mesh, absent, dcn=options.dcn_mesh)
    platform = mesh.devices.flat[0].platform
    config, start = model_config(options)
    cls, before = OPTForCausalLM, config
    if options.task:
        cls, config = TASKS[options.task], finetuning.task_config(options, config, start)
    seq_len = options.seq_len or config.max_position_embeddings
    dtype = options.dtype if options.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    if seq_len > config.max_position_embeddings:
        raise ValueError(f"--seq-len {seq_len}: the model has {config.max_position_embeddings} positions")
    rows_over = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.batch_size % rows_over:
        raise ValueError(f"--batch-size {options.batch_size} does not divide over the mesh's data x fsdp = {rows_over}")
    if options.batch_size % (rows_over * options.accumulate):
        raise ValueError(
            f"--batch-size {options.batch_size} does not divide into --accumulate {options.accumulate} parts over the "
            f"mesh's data x fsdp = {rows_over}"
        )
    check_divides(config, seq_len if options.task is None else mesh.shape["tensor"], mesh)  # tasks pad to a multiple

    # -----------------------------------------------------------------------------------------------------------------
    # The step, and what it is for
    # -----------------------------------------------------------------------------------------------------------------

    schedule = make_schedule(
        peak=options.learning_rate, warmup_steps=options.warmup_steps, steps=options.steps, final=options.final_lr
    )
    optimizer = make_optimizer(
        schedule, weight_decay=options.weight_decay, clip_norm=options.clip_norm, betas=options.betas
    )
    attention = choose_attention(options.attention, platform, config.head_dim, dtype, config.attention_dropout)
    compute = dict(attn_implementation=attention, remat=options.remat, grad_dtype=options.grad_dtype)
    new = lambda: new_model(config, options.seed, dtype, cls, **compute)  # noqa: E731
    plain = jax.eval_shape(new)  # the model as it will be saved; one in training may have adapters
    lora = LoRA(options.lora_rank, options.lora_alpha, options.lora_targets) if options.lora_rank else None
    adapted = lora.adapt(plain) if lora else None

    def begin(model=None):
        model = new() if model is None else model
        if lora:
            return new_state(lora.initial(adapted, model, options.seed), optimizer, is_trained)
        return new_state(model, optimizer)

    abstract = jax.eval_shape(begin)
    shardings = state_shardings(abstract, mesh)
    train_step = make_train_step(
        optimizer,
        schedule,
        config,
        options.seed,
        shardings,
        mesh,
        options.skip_nonfinite,
        task_loss if options.task else batch_loss,
    )
    if options.plan:
        check_grad_dtype(options, mesh)
        with use_mesh(mesh):
            found = plan.make_plan(train_step, abstract, shardings, mesh, config, options, seq_len)
        plan.report(found, options.plan_output)
        return

    # -----------------------------------------------------------------------------------------------------------------
    # Run directory: resume, or start
    # -----------------------------------------------------------------------------------------------------------------

    output = run_directory(options.output)
    record = {
        "options": common | {"seq_len": seq_len, "dtype": dtype},
        "model": config.to_hf(),
    }
    agreement.check_same(record)

    lock = held.enter_context(RunLock(output))  # for process 0 to take

    def look() -> list[bool]:
        check_run_directory(output)
        if not (output / "model/config.json").exists():
            lock.take(create=False)
        return [(output / name).exists() for name in ("run.json", "model/config.json")]

    resuming, finished = json.loads(agreement.from_first(lambda: json.dumps(look()).encode()))
    compare_with_first_start(output / "run.json", record)
    if not resuming:  # a run may go on with fewer devices
        check_grad_dtype(options, mesh)
    if resuming and finished:
        say(f"{output} is finished: {options.steps} steps. Try it: opt-jax generate --model {output}")
        return
    say(machine(mesh))

    # -----------------------------------------------------------------------------------------------------------------
    # Data: documents -> tokenizer -> windows
    # -----------------------------------------------------------------------------------------------------------------

    if options.task is None:
        corpus = Corpus(options.data, options.validation_data, bool(options.mixture), options.skip_bad_records)

    def choose_tokenizer() -> OPTTokenizer:
        if resuming:
            return read_tokenizer(output / "tokenizer")
        if options.tokenizer or start:
            return OPTTokenizer.from_pretrained(options.tokenizer or str(start))
        size = options.vocab_size or config.vocab_size
        if not corpus.training:
            raise ValueError("--data is tokenised already: name the tokenizer that did it with --tokenizer")
        say(f"training a tokenizer of {size} entries on {sum(map(len, corpus.training)) / 1e6:.1f}M characters")
        return train_tokenizer(corpus.training, size)

    # The one of process 0, on all of them.
    tokenizer = agreement.from_first(lambda: tokenizer_to_bytes(choose_tokenizer()))
    tokenizer = tokenizer_from_bytes(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, but the model's vocabulary ends at {config.vocab_size}: "
            "choose another --tokenizer or --model"
        )
    task: Any = None
    if options.task:
        task = finetuning.make_task(options, tokenizer, seq_len, mesh.shape["tensor"])
        windows, validation, described = task.training, task.held_out, task.describe()
        tokens_per_step = round(options.batch_size * windows.lengths.mean())
    else:
        streams, held_out = corpus.tokens(tokenizer)
        make_windows = partial(
            Windows,
            seq_len=seq_len,
            batch_size=options.batch_size,
            vocab_size=config.vocab_size,
            separator=tokenizer.bos_token_id if options.pack == "segments" else None,
        )
        windows = make_windows(streams, seed=options.seed, weights=options.mixture or None)
        held_out = [stream for stream in held_out if len(stream) > seq_len]
        if options.validation_data and not held_out:
            raise ValueError(
                f"--validation-data: too short for one sequence of {seq_len} tokens: take more, or a smaller --seq-len"
            )
        validation = make_windows(held_out) if held_out else None
        described = corpus.describe(windows.tokens, validation.tokens if validation else 0)
        tokens_per_step = options.batch_size * seq_len
    record["data"] = windows.description()
    record["held-out data"] = validation.description() if validation else {}
    agreement.check_same(record["data"] | {f"held-out {name}": v for name, v in record["held-out data"].items()})
    compare_with_first_start(output / "run.json", record)

    # -----------------------------------------------------------------------------------------------------------------
    # Nothing is written before this line, where all that was asked for is known to make sense
    # -----------------------------------------------------------------------------------------------------------------

    def open_run() -> None:
        lock.take()
        if look() != [resuming, finished]:
            raise FileExistsError(f"{output} was written by another start in the meantime: start this one again")
        begin_run(output)
        if not resuming:
            save_tokenizer(tokenizer, output / "tokenizer")

    on_first_process(open_run)
    checkpoints = Checkpoints(
        output / "checkpoints", options.keep_checkpoints, options.keep_every, windows.state, lock.check
    )
    # The parameters alone, of the step with the lowest val_loss.
    best = Checkpoints(output / "best", keep=1, before_write=lock.check)
    first = checkpoints.latest_step() or 0

    # -----------------------------------------------------------------------------------------------------------------
    # Mesh and state: restored, or begun, straight into their shards
    # -----------------------------------------------------------------------------------------------------------------

    state: Any = None
    if not first or lora:  # what LoRA does not train is in no checkpoint
        if start:
            model = finetuning.load(start, before, plain, options.seed, mesh, options.verify)
            state = jax.jit(begin, out_shardings=shardings)(model)
            del model
        else:
            state = jax.jit(begin, out_shardings=shardings)()
    if lora:
        record["not trained"] = {"checksum of the parameters": checksum(state.frozen)}
        compare_with_first_start(output / "run.json", record)
    if is_main:
        write_record(output, record)
    agreement.check_shared(output / "run.json")
    if first:
        frozen = state and state.frozen
        first, state, saved = checkpoints.restore_newest(
            abstract, shardings, complain, fall_back=options.fall_back, verify=options.verify
        )
        windows.check_state(saved, first)
        state = dataclasses.replace(state, frozen=frozen)
    on_first_process(lock.check)
    on_first_process(lambda: cut_back(output / "metrics.jsonl", first, complain))
    seen = agreement.from_first(lambda: json.dumps(best_validation(output / "metrics.jsonl")).encode())
    best_step, best_loss = json.loads(seen)
    if first and best_step == first:  # it may have been killed between the checkpoint and its copy
        best.save_model(first, state)

    eval_step = (make_predict_step if task else make_eval_step)(shardings.whole, mesh)
    place = partial(place_batch, batch_size=options.batch_size, mesh=mesh)

    def validate() -> dict[str, float] | float | None:
        if task:
            return task.evaluate(lambda rows: eval_step(state.whole, place(rows, accumulate=1)))
        if validation is None:
            return None
        count = max(1, min(options.eval_batches, validation.count // options.batch_size))
        batches = (place(partial(validation.batch, i), accumulate=1) for i in range(count))
        sums, counts = zip(*(jax.device_get(eval_step(state.whole, batch)) for batch in batches), strict=True)
        return float(sum(sums) / sum(counts))

    trained, parameters = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (abstract.model, abstract.whole))
    recipe = f" (recipe {options.recipe})" if options.recipe else ""
    share = f" ({trained:,} of them trained: LoRA of rank {lora.rank})" if lora else ""
    say(
        f"model: {options.model}{recipe}, {parameters:,} parameters{share}, computing in {dtype}, "
        f"attention: {attention}"
    )
    say(f"data: {described}")
    say(
        f"run: {output}, steps {first} to {options.steps}, {options.batch_size} x {seq_len} tokens each"
        + (" at most" if task else "")
    )
    if validation is None:
        say(f"no validation loss: the held-out documents do not fill one sequence of {seq_len} tokens")

    # -----------------------------------------------------------------------------------------------------------------
    # Loop
    # -----------------------------------------------------------------------------------------------------------------

    last = options.steps if options.stop_after is None else min(options.steps, first + options.stop_after)
    counted = round(trained + (parameters - trained) * 2 / 3)  # of what is not trained there are no gradients
    device = mesh.devices.flat[0]
    if (peak := peak_flops(device)) is None:
        say(f"no MFU: the peak of {device.device_kind!r} is not in opt_jax/training/flops.py")
    also = []
    if is_main and options.tensorboard:
        also.append(loggers.TensorBoard(output / "tensorboard", first))
    if is_main and options.wandb:
        also.append(loggers.WandB(options.wandb, output, record))
    metrics = Metrics(
        output / "metrics.jsonl" if is_main else None,
        start=first,
        steps=options.steps,
        tokens_per_step=tokens_per_step,
        log_every=options.log_every,
        flops_per_step=flops_per_token(config, counted, seq_len) * tokens_per_step,
        peak_flops=peak and peak * mesh.size,
        batch_rows=lambda step: windows.starts(step - 1),
        skip_nonfinite=options.skip_nonfinite,
        loggers=also,
        memory_of=mesh.local_devices,
        before_write=lock.check,
    )
    trace = loggers.Trace(profiled_steps(options.profile), output / "profile", first, last, say)
    kept = kept_before_nonfinite(checkpoints, lambda: state, shardings)
    due = Due(options.checkpoint_every, options.checkpoint_minutes, options.keep_every, first)
    processes.reached(f"step {first + 1}")
    guard = jax.transfer_guard("disallow")
    rows = local_rows(options.batch_size, options.accumulate, mesh)
    reading = windows.reader(rows, first, last, options.data_workers)
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
        step, stopping = first, False
        pending = None  # the numbers of a step are fetched when the next one is already under way
        for step, own_rows in enumerate(reader, start=first + 1):
            batch = place(own_rows, accumulate=options.accumulate)
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
                val_loss = metrics.record(*pending, val_loss=validate if evaluate else None)
                pending = None
                if val_loss is not None and (best_loss is None or val_loss < best_loss):
                    best_loss = val_loss
                    best.save_model(step, state)
            if save:
                metrics.flush()
                checkpoints.save(step, state)
                due.saved()
            if evaluate or save:
                metrics.pause()
            if stopping:
                break
    if stopping or termination.came and jax.process_count() == 1:  # it may come while the last checkpoint is written
        what, code = termination.describe()
        say(f"{what}: stopped after step {step} of {options.steps}, and saved it: the same command goes on from there")
        sys.exit(code)
    if last < options.steps:
        say(f"stopped after step {last} of {options.steps}, as asked: the same command goes on from there")
        return

    # -----------------------------------------------------------------------------------------------------------------
    # Export, and a first sample
    # -----------------------------------------------------------------------------------------------------------------

    state = dataclasses.replace(state, opt_state=None)  # its memory may be needed
    model = lora.merge(state.whole, plain) if lora else state.model
    on_first_process(lock.check)
    model.save_pretrained(output / "model", tokenizer=tokenizer)
    if lora:
        say(f"the adapters are merged in: {output / 'model'} is a model like any other")
    if task:
        say(f'finished. Load it: {cls.__name__}.from_pretrained("{output}")')
    elif jax.process_count() == 1:
        model = OPTForCausalLM.from_pretrained(output / "model")
        # `</s>`, and how a document begins, one that it has never seen where there is one.
        prompt = (held_out or streams)[0].read(0, min(12, -(-seq_len // 2)))[None]
        room = min(120, config.max_position_embeddings - prompt.shape[1])
        sample = model.generate(prompt, max_new_tokens=room, do_sample=True, temperature=0.8, top_p=0.95, seed=0)
        beginning, continuation = (tokenizer.decode(row) for row in (prompt[0, 1:], sample[0][prompt.shape[1] :]))
        say(f"\na sample: {output / 'model'} goes on from {beginning!r}\n\n{beginning}{continuation}\n")
        say(f"more of it: opt-jax generate --model {output} 'def '")
    else:
        say(f"finished: the model is in {output / 'model'}")


def run(args: Sequence[str] | None = None, program: str = "train.py") -> None:
    """`main` as a program: what ends it is one line on stderr, and an exit code."""
    keep_standard_descriptors()
    with processes.last_words(program, at_once=True):
        main(parse_options(args, program))


if __name__ == "__main__":
    run()
