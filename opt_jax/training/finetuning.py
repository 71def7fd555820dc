"""The beginning of a fine-tuning run: the model's configuration, the task's data, the checkpoint with a task's head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opt_jax.checkpoints import hub
from opt_jax.config import OPTConfig
from opt_jax.model.heads import OPTModel
from opt_jax.parallel.rules import named_leaves
from opt_jax.text.tokenizer import OPTTokenizer
from opt_jax.training.options import Options
from opt_jax.training.step import new_model, state_shardings
from opt_jax.training.tasks.classification import Classification, label_config
from opt_jax.training.tasks.common import TASKS
from opt_jax.training.tasks.squad import QuestionAnswering


def task_config(options: Options, config: OPTConfig, start: str | None) -> OPTConfig:
    """The configuration of the model with the task's head; for classification, with the names of the labels.

    Args:
      options: the options of the run, with a task.
      config: the configuration that --model stands for.
      start: the checkpoint that --model stands for; None: the weights are new.

    Raises:
      ValueError: options, configuration and data do not go together.
    """
    assert options.task is not None
    if start is None and options.tokenizer is None:
        raise ValueError(f"--task {options.task} fine-tunes a checkpoint: name one with --model (or a --tokenizer)")
    extra = {name: value for name, value in config.extra.items() if name not in ("id2label", "label2id")}
    extra["architectures"], num_labels = [TASKS[options.task].__name__], OPTConfig.num_labels
    if options.task == "sequence-classification":
        if config.pad_token_id is None:
            raise ValueError(f"--model {options.model}: classification needs a pad_token_id in its configuration")
        extra |= label_config(options.data)
        num_labels = len(extra["id2label"])
    return dataclasses.replace(config, num_labels=num_labels, problem_type=None, extra=extra)


def make_task(options: Options, tokenizer: OPTTokenizer, seq_len: int, multiple: int) -> Any:
    """The data of --task: a `Classification` or `QuestionAnswering`.

    Args:
      seq_len: the largest number of tokens of an example.
      multiple: the padded length of each batch is a multiple of this.

    Raises:
      FileNotFoundError, ValueError: see `tasks.classification.read_tsv` and `tasks.squad.read_squad`.
    """
    kind: Any = Classification if options.task == "sequence-classification" else QuestionAnswering
    return kind(
        options.data,
        options.validation_data,
        tokenizer,
        batch_size=options.batch_size,
        seq_len=seq_len,
        seed=options.seed,
        multiple=multiple,
    )


def load(start: str, before: OPTConfig, plain: Any, seed: int, mesh: Mesh, verify: bool = True) -> Any:
    """The model that a run begins with: the weights of the checkpoint `start`, and new weights for a new head.

    A task's head in the checkpoint is kept if it is of the same class and for the same labels.

    Args:
      start: the directory of the checkpoint.
      before: the configuration of the checkpoint.
      plain: the model to return, as `jax.ShapeDtypeStruct`s, with stacked layers.
      seed: for the weights of a new head.
      mesh: the mesh on which the parameters are placed.
      verify: see `from_pretrained`.
    """
    cls, config = type(plain), plain.config
    labels = lambda c: [c.extra.get(name) for name in ("architectures", "id2label")]  # noqa: E731
    kept = cls not in TASKS.values() or labels(before) == labels(config)
    verify = verify or not hub.is_orbax(start)  # otherwise --no-verify is for the run's own checkpoints
    options: Any = dict(dtype=plain.dtype, param_dtype=jnp.float32, mesh=mesh, verify=verify, scan_layers=True)
    model = (cls if kept else OPTModel).from_pretrained(start, **options)
    values = {("" if kept else "model.") + name: leaf for name, leaf in named_leaves(model).items()}
    names = named_leaves(plain)
    shardings = dict(zip(names, jax.tree.leaves(state_shardings(plain, mesh)), strict=True))
    fresh = {name: sharding for name, sharding in shardings.items() if name not in values}

    def head() -> dict[str, jax.Array]:  # XLA removes the computation of all other parameters
        new = named_leaves(new_model(config, seed, plain.dtype, cls))
        return {name: new[name] for name in fresh}

    if fresh:
        values |= jax.jit(head, out_shardings=fresh)()
    # Not the model that was read: the run's configuration may have another dropout.
    return jax.tree.unflatten(jax.tree.structure(plain), [values[name] for name in names])
