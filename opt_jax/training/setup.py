"""What a run computes: configuration, optimizer, shapes and shardings. No arrays are created here."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from opt_jax.config import OPTConfig
from opt_jax.model.attention_choice import choose_attention
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.lora import LoRA, is_trained
from opt_jax.training import finetuning
from opt_jax.training.optimizer import continued_schedule, make_optimizer, make_schedule
from opt_jax.training.option_checks import read_finished
from opt_jax.training.options import Options, model_config
from opt_jax.training.step import (
    Batch,
    TrainState,
    batch_loss,
    check_divides,
    make_train_step,
    new_model,
    new_state,
    state_shardings,
)
from opt_jax.training.tasks.common import TASKS, task_loss


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run computes.

    Attributes:
      options: the options of the command line.
      mesh: the device mesh.
      config: the model's configuration, with the head of the task.
      model_class: the model's class, with the head of the task.
      checkpoint: the directory that the weights come from; None if they are new.
      checkpoint_config: the configuration there; without a checkpoint, that of --model.
      seq_len: tokens per sequence; with a task, the largest number.
      dtype: the dtype of the computation.
      attention: the implementation of attention.
      schedule: the learning rate schedule.
      continued: the record of the run that this one continues; None without --continue-from.
      optimizer: see `make_optimizer`.
      saved_model: the model that is saved at the end, as `jax.ShapeDtypeStruct`s. In training it may have adapters.
      lora: the adapters that are trained; None if all parameters are.
      state: the training state, as `jax.ShapeDtypeStruct`s.
      shardings: a pytree of `NamedSharding`s like `state`.
      begin: returns the state before step 1 of a model, or of new weights without one. For use in `jax.jit`.
    """

    options: Options
    mesh: Mesh
    config: OPTConfig
    model_class: type
    checkpoint: str | None
    checkpoint_config: OPTConfig
    seq_len: int
    dtype: str
    attention: str
    schedule: optax.Schedule
    continued: dict[str, Any] | None
    optimizer: optax.GradientTransformationExtraArgs
    saved_model: Any
    lora: LoRA | None
    state: Any
    shardings: Any
    begin: Callable[..., TrainState]

    def make_train_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
        """The jitted step; see `step.make_train_step`."""
        return make_train_step(
            self.optimizer,
            self.schedule,
            self.config,
            self.options.seed,
            self.shardings,
            self.mesh,
            self.options.skip_nonfinite,
            task_loss if self.options.task else batch_loss,
        )

    def first_state(self) -> TrainState:
        """The state before step 1 on the mesh, with the weights of `checkpoint` or new ones."""
        begin = jax.jit(self.begin, out_shardings=self.shardings)
        if self.checkpoint is None:
            return begin()
        options = self.options
        model = finetuning.load(
            self.checkpoint, self.checkpoint_config, self.saved_model, options.seed, self.mesh, options.verify
        )
        return begin(model)

    def parameter_counts(self) -> tuple[int, int]:
        """The number of trained parameters, and of all parameters."""
        models = self.state.model, self.state.full_model
        trained, total = (sum(leaf.size for leaf in jax.tree.leaves(model)) for model in models)
        return trained, total


def make_setup(options: Options, mesh: Mesh) -> Setup:
    """The setup of a run with these options on the mesh.

    Raises:
      OSError: see `options.model_config`.
      ValueError: the options do not fit the model or the mesh.
    """
    platform = mesh.devices.flat[0].platform
    checkpoint_config, checkpoint = model_config(options)
    model_class, config = OPTForCausalLM, checkpoint_config
    if options.task:
        model_class, config = TASKS[options.task], finetuning.task_config(options, checkpoint_config, checkpoint)
    seq_len = options.seq_len or config.max_position_embeddings
    dtype = options.dtype if options.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    _check_sizes(options, config, seq_len, mesh)

    continued = None if options.continue_from is None else read_finished(options)
    schedule = _schedule(options, None if continued is None else continued["options"]["steps"])
    optimizer = make_optimizer(
        schedule, weight_decay=options.weight_decay, clip_norm=options.clip_norm, betas=options.betas
    )
    attention = choose_attention(options.attention, platform, config.head_dim, dtype, config.attention_dropout)
    compute = dict(attn_implementation=attention, remat=options.remat, grad_dtype=options.grad_dtype)
    new = partial(new_model, config, options.seed, dtype, model_class, **compute)
    saved_model = jax.eval_shape(new)
    lora = LoRA(options.lora_rank, options.lora_alpha, options.lora_targets) if options.lora_rank else None
    adapted = lora.adapt(saved_model) if lora else None

    def begin(model: Any = None) -> TrainState:
        model = new() if model is None else model
        if lora:
            return new_state(lora.initial(adapted, model, options.seed), optimizer, is_trained)
        return new_state(model, optimizer)

    state = jax.eval_shape(begin)
    return Setup(
        options=options,
        mesh=mesh,
        config=config,
        model_class=model_class,
        checkpoint=checkpoint,
        checkpoint_config=checkpoint_config,
        seq_len=seq_len,
        dtype=dtype,
        attention=attention,
        schedule=schedule,
        continued=continued,
        optimizer=optimizer,
        saved_model=saved_model,
        lora=lora,
        state=state,
        shardings=state_shardings(state, mesh),
        begin=begin,
    )


def _schedule(options: Options, done: int | None) -> optax.Schedule:
    """The learning rate. `done`: the number of updates of the run that this one continues."""
    of_run = partial(
        make_schedule, peak=options.learning_rate, warmup_steps=options.warmup_steps, final=options.final_lr
    )
    if done is None:
        return of_run(steps=options.steps)
    again = of_run(steps=options.steps - done) if options.continue_schedule == "warm-up" else None
    return continued_schedule(of_run(steps=done), done, again)


def _check_sizes(options: Options, config: OPTConfig, seq_len: int, mesh: Mesh) -> None:
    if seq_len > config.max_position_embeddings:
        raise ValueError(
            f"--seq-len {seq_len}: the model has {config.max_position_embeddings} positions; take a smaller --seq-len"
        )
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.batch_size % shards:
        raise ValueError(f"--batch-size {options.batch_size} does not divide over the mesh's data x fsdp = {shards}")
    if options.batch_size % (shards * options.accumulate):
        raise ValueError(
            f"--batch-size {options.batch_size} does not divide into --accumulate {options.accumulate} parts over the "
            f"mesh's data x fsdp = {shards}"
        )
    check_divides(config, seq_len if options.task is None else mesh.shape["tensor"], mesh)  # a task pads to a multiple
