"""What the fine-tuning tasks share: losses on a mesh, and batches of examples of different lengths.

A task (`classification.py`, `squad.py`) is a class whose objects have
  training: the `Batches` to train on
  held_out: the `Batches` to validate on, without a seed
  evaluate(predict): returns {"val_loss", "val_..."}; see `evaluate` for `predict`
  summary(): a line for the log
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from opt_jax.data.windows import Order
from opt_jax.model.attention import DropoutKey
from opt_jax.model.heads import OPTForQuestionAnswering, OPTForSequenceClassification
from opt_jax.model.ids import as_ids
from opt_jax.parallel.collectives import gather_sequence, tensor_offset
from opt_jax.parallel.mesh import batch_sharding, per_device, replicated
from opt_jax.parallel.reductions import divide_gradient_over_tensor, sum_over_batch, sum_over_tensor
from opt_jax.training.loss import IGNORED
from opt_jax.training.step import Batch, gathered

TASKS: dict[str, type] = {
    "sequence-classification": OPTForSequenceClassification,
    "question-answering": OPTForQuestionAnswering,
}
LARGEST_FILE = 1 << 30  # bytes; a file is read into memory
SHORTEST = 32  # tokens; other lengths are this doubled, so that a step is compiled for few lengths


def task_logits(model: Any, batch: Batch, key: DropoutKey | None = None) -> Float[Array, "..."]:
    """Logits [B, C] of a classifier, or [B, T, 2] for the start and the end of an answer; the same along `tensor`.

    As in HF's OPTForSequenceClassification and OPTForQuestionAnswering. Deviation: the logits of pads as an answer are
    the smallest float32, because otherwise the loss would depend on the number of pads.

    Args:
      batch: input_ids and attention_mask [B, T], with pads on the right.
      key: for dropout; None: no dropout.
    """
    model = gathered(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    x = model.model.forward(ids, attention_mask=mask, dropout_key=key).last_hidden_state
    if isinstance(model, OPTForQuestionAnswering):
        logits = gather_sequence(model.qa_outputs(x))
        return jnp.where(mask[..., None] != 0, logits, jnp.finfo(jnp.float32).min)
    # The classifier reads a row's last token, which is on one of the devices along `tensor`.
    last = mask.sum(axis=1, dtype=jnp.int32)[:, None] - 1 - tensor_offset(x.shape[1])
    is_local = (last >= 0) & (last < x.shape[1])
    pooled = jnp.take_along_axis(x, jnp.where(is_local, last, 0)[..., None], axis=1)[:, 0]
    return model.score(sum_over_tensor(jnp.where(is_local, pooled, 0)))


def _losses(logits: Float[Array, "..."], batch: Batch) -> tuple[Array, Array]:
    """The sum of the losses, and the number of labels that count."""
    labels = batch["labels"]  # [B], or [B, 2] for start and end
    log_probabilities = jax.nn.log_softmax(logits, axis=1).reshape(*logits.shape[:2], -1)
    counted = labels != IGNORED
    chosen = jnp.where(counted, labels, 0).reshape(len(labels), 1, -1)
    chosen = jnp.take_along_axis(log_probabilities, chosen, axis=1).reshape(labels.shape)
    return -jnp.where(counted, chosen, 0).sum(), counted.sum(dtype=jnp.int32)


def task_loss(model: Any, batch: Batch, dropout_key: DropoutKey | None = None) -> tuple[Array, Array]:
    """The sum of the losses of one micro-batch in float32, and the number of labels that count: a `step.Loss`.

    Args:
      model, dropout_key: see `task_logits`.
      batch: see `task_logits`; also labels: [B], the classes, or [B, 2], the first and the last token of the answers.
    """
    loss, count = _losses(task_logits(model, batch, dropout_key), batch)
    return divide_gradient_over_tensor(loss), count


def make_predict_step(shardings: Any, mesh: Mesh) -> Callable[[Any, Batch], tuple[Array, Array, Array]]:
    """A jitted function: (model, batch [1, B, T]) -> (sum of the losses, number of labels that count, logits)."""

    def predict(model: Any, batch: Batch):
        batch = jax.tree.map(lambda x: x[0], batch)
        logits = task_logits(model, batch)
        loss, count = _losses(logits, batch)
        return sum_over_batch(loss), sum_over_batch(count), logits

    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    rows, everywhere = batch_sharding(mesh, leading=1), replicated(mesh)
    outputs = (everywhere.spec, everywhere.spec, batch_sharding(mesh).spec)
    mapped = per_device(predict, mesh, (specs, rows.spec), outputs)
    return jax.jit(mapped, in_shardings=(shardings, rows), out_shardings=everywhere)


class Batches(Order):
    """Batches of examples of different lengths, padded on the right to one of a few lengths.

    The batch of a step is a function of (seed, step). Each epoch is a permutation drawn from (seed, epoch), and batches
    go through the epochs without a gap. Without a seed, the only epoch goes from the shortest example to the longest.

    Args:
      labels: ints [N, ...].
      longest: no example has more tokens.
      pad: the id for padding.
      multiple: each length is a multiple of this.
    """

    def __init__(
        self,
        examples: Sequence[Sequence[int]],
        labels: np.ndarray,
        batch_size: int,
        longest: int,
        pad: int,
        seed: int | None = None,
        multiple: int = 1,
    ):
        self.examples, self.labels, self.batch_size, self.pad = examples, as_ids("labels", labels), batch_size, pad
        self.lengths, self.longest, self._multiple = np.array([len(e) for e in examples]), longest, multiple
        self._seed = seed
        self._epoch: tuple[int, np.ndarray] | None = None

    def _order(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.argsort(self.lengths, kind="stable")
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self.examples))
        return self._epoch[1]

    def starts(self, step: int) -> np.ndarray:
        """The numbers [batch_size] of the examples in this step's batch. Without a seed, -1 fills up the last batch."""
        numbers = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, i = divmod(position, len(self.examples))
            numbers.append(-1 if self._seed is None and epoch else int(self._order(epoch)[i]))
        return np.array(numbers)

    def _padded_length(self, longest: int) -> int:
        length = SHORTEST
        while length < longest:
            length *= 2
        length = min(length, self.longest)
        return length + -length % self._multiple

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """input_ids and attention_mask [rows, T], labels [rows, ...], all int32. Rows without example do not count."""
        numbers = self.starts(step)
        length = self._padded_length(self.lengths[numbers[numbers >= 0]].max())
        numbers = numbers[rows]
        ids = np.full((len(numbers), length), self.pad, np.int32)
        mask = np.zeros_like(ids)
        labels = np.full((len(numbers), *self.labels.shape[1:]), IGNORED, np.int32)
        for row, number in enumerate(numbers):
            example = [self.pad] if number < 0 else self.examples[number]
            ids[row, : len(example)], mask[row, : len(example)] = example, 1
            if number >= 0:
                labels[row] = self.labels[number]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def description(self) -> dict[str, Any]:
        return {
            "tokens": int(self.lengths.sum()),
            "fingerprint": hash_of_examples(self.examples, self.labels),
            "seed": self._seed,
            "batch_size": self.batch_size,
        }

    @contextlib.contextmanager
    def reader(self, _rows: Any, first: int, last: int, _workers: int = 0, _waiting: Any = None) -> Iterator[Any]:
        """Like `Windows.reader`. Examples are in memory, so nothing is read ahead."""
        yield (partial(self.batch, step) for step in range(first, last))

    def all(self) -> Iterator[tuple[np.ndarray, Callable[[slice], Mapping[str, np.ndarray]]]]:
        """For each batch of one epoch: the numbers of its examples, and a function slice of rows -> arrays."""
        for step in range(-(-len(self.examples) // self.batch_size)):
            yield self.starts(step), lambda rows, step=step: self.batch(step, rows)


def evaluate(held_out: Batches, predict: Callable) -> tuple[float, list[np.ndarray]]:
    """The mean loss of the labels, and the logits of each example, in the order of the examples.

    Args:
      held_out: the examples, in batches without a seed.
      predict: called with a function (slice of rows -> arrays of a batch); returns the sum of the losses, the number of
        labels that count, and the logits of all rows.
    """
    total, count, logits = 0.0, 0, [np.zeros(0)] * len(held_out.examples)
    for numbers, rows in held_out.all():
        loss, counted, batch_logits = jax.device_get(predict(rows))
        total, count = total + float(loss), count + int(counted)
        for number, row in zip(numbers, batch_logits, strict=True):
            if number >= 0:
                logits[number] = row
    return total / max(count, 1), logits


def named_files(paths: Sequence[str]) -> list[Path]:
    """The paths of files. Directories are not allowed, because training and validation files often lie in one.

    Raises:
      FileNotFoundError: a path is not that of a file.
    """
    for path in map(Path, paths):
        if not path.is_file():
            what = "a directory: name the files in it" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"{path}: {what}")
    return list(map(Path, paths))


def hash_of_examples(examples: Sequence[Sequence[int]], labels: np.ndarray) -> str:
    """A short hash, by which a resumed run notices that the files or the tokenizer have changed."""
    digest = hashlib.sha256(np.ascontiguousarray(labels, np.int32).tobytes())
    for example in examples:
        digest.update(np.asarray([len(example), *example], np.int32).tobytes())
    return digest.hexdigest()[:16]


def hold_out(count: int, fraction: float = 0.05) -> tuple[list[int], list[int]]:
    """The numbers of the training examples and of the held-out ones: a random share that no seed of a run changes."""
    order = np.random.default_rng(0).permutation(count).tolist()
    held_out = max(1, int(count * fraction))
    return sorted(order[held_out:]), sorted(order[:held_out])
