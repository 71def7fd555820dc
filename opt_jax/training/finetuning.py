"""What train.py needs to start a fine-tuning task: the model's configuration, its data, the checkpoint with a head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opt_jax.checkpoints import hub
from opt_jax.config import OPTConfig
from opt_jax.model.heads import OPTModel
from opt_jax.model.stacking import stack_layers
from opt_jax.parallel.rules import named_leaves
from opt_jax.text.tokenizer import OPTTokenizer
from opt_jax.training.options import Options
from opt_jax.training.step import new_model, state_shardings
from opt_jax.training.tasks.classification import Classification, label_config
from opt_jax.training.tasks.common import TASKS
from opt_jax.training.tasks.squad import QuestionAnswering


def task_config(options: Options, config: OPTConfig, start: str | None) -> OPTConfig:
    """The configuration of the model with the task's head; for classification with the names of the labels."""
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
    """The data of --task; multiple: of which the lengths of all batches are one."""
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
    """The model of checkpoint `start`, on the mesh, in the form of `plain`: an abstract, stacked one, of any class.

    before: the checkpoint's configuration. The head of a task is kept if it is of this class and for the same labels;
    else it is new, drawn from the seed. verify: see `from_pretrained`.
    """
    cls, config = type(plain), plain.config
    labels = lambda c: [c.extra.get(name) for name in ("architectures", "id2label")]  # noqa: E731
    kept = cls not in TASKS.values() or labels(before) == labels(config)
    verify = verify or not hub.is_orbax(start)  # otherwise --no-verify is for the run's own checkpoints
    options: Any = dict(dtype=plain.dtype, param_dtype=jnp.float32, mesh=mesh, verify=verify)
    model = stack_layers((cls if kept else OPTModel).from_pretrained(start, **options))
    values = {("" if kept else "model.") + name: leaf for name, leaf in named_leaves(model).items()}
    names = named_leaves(plain)
    shardings = dict(zip(names, jax.tree.leaves(state_shardings(plain, mesh)), strict=True))
    fresh = {name: sharding for name, sharding in shardings.items() if name not in values}

    def head() -> dict[str, jax.Array]:  # the compiler leaves out all else
        new = named_leaves(new_model(config, seed, plain.dtype, cls))
        return {name: new[name] for name in fresh}

    if fresh:
        values |= jax.jit(head, out_shardings=fresh)()
    # In a model built from the run's configuration, which may ask for another dropout.
    return jax.tree.unflatten(jax.tree.structure(plain), [values[name] for name in names])
