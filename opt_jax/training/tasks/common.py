"""Fine-tuning tasks: their losses on a mesh, and the batches of examples that differ in length.

A task's data (`classification.py`, `squad.py`) has
  training: Batches; held_out: Batches, all of them in order
  evaluate(predict): {"val_loss", "val_..."} by a function batch -> (loss sum, labels counted, logits)
  summary(): for the log
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
from opt_jax.parallel.mesh import batch_sharding, replicated
from opt_jax.parallel.reductions import divide_gradient_over_tensor, sum_over_batch, sum_over_tensor
from opt_jax.parallel.rules import per_device
from opt_jax.training.loss import IGNORED
from opt_jax.training.step import Batch, gathered

TASKS: dict[str, type] = {
    "sequence-classification": OPTForSequenceClassification,
    "question-answering": OPTForQuestionAnswering,
}
LARGEST_FILE = 1 << 30  # bytes of data: they are read at once
SHORTEST = 32  # tokens; other lengths are its doubles, so that a step is compiled for a few of them only


def task_logits(model: Any, batch: Batch, key: DropoutKey | None = None) -> Float[Array, "..."]:
    """[B, C] of a classifier, [B, T, 2] for the start and the end of an answer; the same on all of `tensor`.

    batch: input_ids, attention_mask [B, T], pads on the right. What HF's models compute but for one thing: pads cannot
    be an answer, or the loss would depend on how many of them there are.
    """
    model = gathered(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    x = model.model.forward(ids, attention_mask=mask, dropout_key=key).last_hidden_state
    if isinstance(model, OPTForQuestionAnswering):
        logits = gather_sequence(model.qa_outputs(x))
        return jnp.where(mask[..., None] != 0, logits, jnp.finfo(jnp.float32).min)
    # A row's last token is on one device of `tensor`.
    last = mask.sum(axis=1, dtype=jnp.int32)[:, None] - 1 - tensor_offset(x.shape[1])
    is_local = (last >= 0) & (last < x.shape[1])
    pooled = jnp.take_along_axis(x, jnp.where(is_local, last, 0)[..., None], axis=1)[:, 0]
    return model.score(sum_over_tensor(jnp.where(is_local, pooled, 0)))


def _losses(logits: Float[Array, "..."], batch: Batch) -> tuple[Array, Array]:
    labels = batch["labels"]  # [B], or [B, 2] for start and end
    log_probabilities = jax.nn.log_softmax(logits, axis=1).reshape(*logits.shape[:2], -1)
    counted = labels != IGNORED
    chosen = jnp.where(counted, labels, 0).reshape(len(labels), 1, -1)
    chosen = jnp.take_along_axis(log_probabilities, chosen, axis=1).reshape(labels.shape)
    return -jnp.where(counted, chosen, 0).sum(), counted.sum(dtype=jnp.int32)


def task_loss(model: Any, batch: Batch, dropout_key: DropoutKey | None = None) -> tuple[Array, Array]:
    """(sum of the losses in float32, how many labels counted) of one micro-batch, as `step.Loss` says.

    batch: see `task_logits`, and labels [B], the classes, or [B, 2], first and last token of the answer.
    """
    loss, count = _losses(task_logits(model, batch, dropout_key), batch)
    return divide_gradient_over_tensor(loss), count


def make_predict_step(shardings: Any, mesh: Mesh) -> Callable[[Any, Batch], tuple[Array, Array, Array]]:
    """(model, batch [1, B, T]) -> (sum of the losses, labels counted, logits of all rows), compiled for each length."""

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
    """Examples of different lengths in batches, padded on the right to the next of a few lengths.

    The batch of a step is a function of (seed, step): epochs are permutations drawn from (seed, epoch), and batches
    walk through them end to end. Without a seed, examples come in their order, from the shortest to the longest.

    Args:
      examples: token ids of each. labels: ints [N, ...].
      longest: tokens; no example has more. multiple: of which every length is one.
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
        """[batch_size] numbers of the examples of this step's batch; -1 behind the last, where there is no seed."""
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
        """input_ids, attention_mask [rows, T] and labels [rows, ...], int32; a row without example is ignored."""
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
    def reader(self, _rows: Any, first: int, last: int, _workers: int = 0) -> Iterator[Any]:
        """As `Windows.reader`; examples are in memory, so that nothing is read ahead."""
        yield (partial(self.batch, step) for step in range(first, last))

    def all(self) -> Iterator[tuple[np.ndarray, Callable[[slice], Mapping[str, np.ndarray]]]]:
        """(numbers of the examples or -1, rows -> arrays) of each batch that it takes to see every example once."""
        for step in range(-(-len(self.examples) // self.batch_size)):
            yield self.starts(step), lambda rows, step=step: self.batch(step, rows)


def evaluate(held_out: Batches, predict: Callable) -> tuple[float, list[np.ndarray]]:
    """(mean loss over the labels, logits of every example in order)."""
    total, count, logits = 0.0, 0, [np.zeros(0)] * len(held_out.examples)
    for numbers, rows in held_out.all():
        loss, counted, batch_logits = jax.device_get(predict(rows))
        total, count = total + float(loss), count + int(counted)
        for number, row in zip(numbers, batch_logits, strict=True):
            if number >= 0:
                logits[number] = row
    return total / max(count, 1), logits


def named_files(paths: Sequence[str]) -> list[Path]:
    """FileNotFoundError for what is no file. Not directories: what is trained on and what is not lie side by side."""
    for path in map(Path, paths):
        if not path.is_file():
            what = "a directory: name the files in it" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"{path}: {what}")
    return list(map(Path, paths))


def hash_of_examples(examples: Sequence[Sequence[int]], labels: np.ndarray) -> str:
    """A short hash: tells a resumed run that the files or the tokenizer have changed."""
    digest = hashlib.sha256(np.ascontiguousarray(labels, np.int32).tobytes())
    for example in examples:
        digest.update(np.asarray([len(example), *example], np.int32).tobytes())
    return digest.hexdigest()[:16]


def hold_out(count: int, fraction: float = 0.05) -> tuple[list[int], list[int]]:
    """Numbers of the training examples and of those held out: a fixed random share, whatever the run's seed."""
    order = np.random.default_rng(0).permutation(count).tolist()
    held_out = max(1, int(count * fraction))
    return sorted(order[held_out:]), sorted(order[:held_out])
