"""Token streams -> windows in an order fixed by (seed, step) -> batches, read ahead by threads or processes. No jax.

Grain computes the order (`shuffle`: a permutation by index, which is not stored) and the mixture (`mix`: also by
index). Row r of step n is element n * batch_size + r of one global dataset, on every process.
"""

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

import numpy as np

from opt_jax.data.tokens import Tokens

AHEAD = 4  # batches of this process that are read before their steps ask for them
_THREADS = 16  # rows that are read at the same time: on a slow disk, one read should not wait for another


class _Source:
    """The windows of one stream, for Grain: item i is {"ids": int32 [seq_len + 1], "start": its first position}."""

    def __init__(self, tokens: Tokens, seq_len: int, base: int, vocab_size: int | None):
        self._tokens, self._seq_len, self._base, self._vocab_size = tokens, seq_len, base, vocab_size
        self._count = (len(tokens) - 1) // seq_len
        if self._count < 1:
            where = f"{tokens.name}: " if tokens.name else ""
            raise ValueError(
                f"{where}{len(tokens)} tokens do not fill one sequence and the token after it, {seq_len + 1}: "
                "take more data, or a smaller --seq-len"
            )

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"_Source({self._tokens.name!r}, {self._count})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = int(index) * self._seq_len
        ids = self._tokens.read(start, self._seq_len + 1)
        # For an id out of range JAX would silently use the nearest row of the embedding.
        if self._vocab_size is not None and not (0 <= ids.min() and ids.max() < self._vocab_size):
            bad = int(ids[(ids < 0) | (ids >= self._vocab_size)][0])
            raise ValueError(
                f"{self._tokens.name}: id {bad} after token {self._tokens.first + start}, but the vocabulary ends at "
                f"{self._vocab_size}: it was made with another tokenizer"
            )
        return {"ids": ids, "start": self._base + start}


class Order:
    """Batches whose order is a function of `description` and the step number."""

    def description(self) -> dict[str, Any]:
        raise NotImplementedError

    def state(self, step: int) -> dict[str, Any]:
        """The state of the data in a checkpoint after `step` steps.

        It holds the position, which is one number, and everything that the order depends on. Grain's own state counts
        what each worker process has read, so it would fit the same number of workers and hosts only.
        """
        return {"step": step} | self.description()

    def check_state(self, saved: Mapping[str, Any] | None, step: int) -> None:
        """Compare the state of the data in a checkpoint with this one.

        Raises:
          ValueError: the checkpoint of `step` was made with other data or another order; names the differences.
        """
        if saved is None:
            raise ValueError(f"checkpoint {step} has no state of the data: it was written by an older train.py")
        now = self.state(step)
        differences = [f"{k} was {saved.get(k)}, is now {now[k]}" for k in now if saved.get(k) != now[k]]
        if differences:
            raise ValueError(f"checkpoint {step} was made with other data: " + "; ".join(differences))


class Windows(Order):
    """Contiguous windows of `seq_len + 1` ids over streams: `seq_len` inputs, and the next id of each as target.

    Neighbouring windows share one id, so an epoch predicts every id once, except those at the end of a stream that fill
    no window. Each epoch has another order. `batch(step)` is the global batch of that step, on every process.

    Args:
      streams: one or more streams.
      seq_len: tokens of a row.
      batch_size: rows of a global batch.
      seed: of the order.
      weights: relative numbers of windows from each stream; a stream is repeated when it ends. None: the streams are
        concatenated.
      separator: the id of `</s>`; adds "segment_ids" to batches, so that attention stays within a document and
        positions restart. None: no segments.
      vocab_size: reading an id beyond it is an error.

    Raises:
      ValueError: a stream does not fill one window.
    """

    def __init__(
        self,
        streams: np.ndarray | Sequence[Tokens],
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        *,
        weights: Sequence[float] | None = None,
        separator: int | None = None,
        vocab_size: int | None = None,
    ):
        import grain  # slow to import, and not needed to read files

        if isinstance(streams, np.ndarray):
            streams = [Tokens("", streams)]
        self.seq_len, self.batch_size, self.seed, self.weights = seq_len, batch_size, seed, weights
        self.streams, self._separator = list(streams), separator
        self.tokens = sum(map(len, streams))
        bases = np.cumsum([0, *map(len, streams)]).tolist()
        sources = [_Source(s, seq_len, b, vocab_size) for s, b in zip(streams, bases, strict=False)]
        self.count = sum(map(len, sources))
        datasets = [grain.MapDataset.source(source) for source in sources]
        if weights is None:
            self._rows = self._ordered(grain.MapDataset.concatenate(datasets), 0)
        else:
            ordered = [self._ordered(dataset, i) for i, dataset in enumerate(datasets)]
            self._rows = grain.MapDataset.mix(ordered, weights=list(weights))
        self._hashes = [stream.hash_of_ids() for stream in streams]

    def _ordered(self, dataset: Any, number: int) -> Any:
        # Grain adds the epoch to the seed. Unhashed, epoch 1 of seed s would have the order of epoch 0 of s + 1.
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        return dataset.shuffle(seed=seed).repeat()

    def elements(self, step: int, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """{"ids": int32 [r, seq_len + 1], "start": int64 [r]} for the given rows of the step's batch."""
        elements: list[Any] = [self._rows[step * self.batch_size + int(row)] for row in rows]
        return {
            "ids": np.stack([element["ids"] for element in elements]),
            "start": np.array([element["start"] for element in elements], np.int64),
        }

    def starts(self, step: int) -> np.ndarray:
        """The position of each row of this step's batch, int64 [batch_size], counted over all streams."""
        return self.elements(step, range(self.batch_size))["start"]

    def rows(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The ids of this step's batch, int32 [batch_size, seq_len + 1], or of the given rows only."""
        return self.elements(step, range(self.batch_size)[rows])["ids"]

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The rows as inputs and labels, [rows, seq_len] each; labels are the ids one position later."""
        return self.as_batch(self.rows(step, rows))

    def as_batch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        if self._separator is not None:
            # `</s>` is the last label of a document and the first input of the next, so no label crosses documents.
            batch["segment_ids"] = np.cumsum(batch["input_ids"] == self._separator, axis=1, dtype=np.int32)
        return batch

    def description(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "fingerprint": "+".join(self._hashes),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "segments": self._separator is not None,
            "weights": None if self.weights is None else list(self.weights),
        }

    def reader(
        self,
        rows: Sequence[int] | np.ndarray,
        first: int,
        last: int,
        workers: int = 0,
        waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> "Reader":
        return Reader(self, rows, first, last, workers, waiting)


class _Batches:
    """The batches of steps, for Grain: item i is the given rows of step `first + i`."""

    def __init__(self, windows: Windows, rows: np.ndarray, first: int, last: int):
        self._windows, self._rows, self._first, self._count = windows, rows, first, last - first

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"_Batches({self._first}, {self._count})"

    def __getitem__(self, index: int) -> np.ndarray:
        return self._windows.elements(self._first + int(index), self._rows)["ids"]


def _read_by_processes(batches: _Batches, workers: int) -> Any:
    """An iterator over the batches, which reader processes read ahead."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain passes absl's flags to its processes; absl.app would parse them
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    # Batches come through a pipe. Grain's shared memory is not always freed, and Python's resource tracker then warns.
    options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    return iter(grain.experimental.WithOptionsIterDataset(dataset, options))


class Reader:
    """A context that reads the given rows of the batches of steps `first` to `last` - 1, before the steps need them.

    This process holds at most `AHEAD` + 2 batches of its rows, 4 bytes per token; a reader process holds 6 more. The
    error of a read is raised when its batch is asked for.

    Args:
      windows: the batches.
      rows: the rows of the global batch that this process needs.
      first, last: the steps.
      workers: reader processes; 0: threads of this process. The batches are the same.
      waiting: a context in which to wait for a batch that is asked for before it is there.

    Attributes:
      waits: the number of such batches.
    """

    def __init__(
        self,
        windows: Windows,
        rows: Sequence[int] | np.ndarray,
        first: int,
        last: int,
        workers: int = 0,
        waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self._windows, self._local = windows, {int(row): i for i, row in enumerate(rows)}
        self._steps, self._waiting, self.waits = range(first, last), waiting, 0
        self._iterator: Any = None
        if workers and last > first:
            self._iterator = _read_by_processes(_Batches(windows, np.asarray(rows), first, last), workers)
        self._pool = ThreadPoolExecutor(1 if workers else _THREADS, "read-ahead")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._iterator is not None:
            self._iterator.close()

    def __iter__(self) -> Iterator[Callable[[slice], dict[str, np.ndarray]]]:
        """For each step, a function from a slice of the global batch's rows to these rows, for `place_batch`."""
        steps = iter(self._steps)
        ahead = deque(map(self._begin, islice(steps, AHEAD)))
        while ahead:
            if not all(part.done() for part in ahead[0]):
                self.waits += 1
                with self._waiting():
                    wait(ahead[0])
            ids = np.concatenate([part.result() for part in ahead.popleft()])
            ahead.extend(map(self._begin, islice(steps, 1)))
            yield lambda rows, ids=ids: self._windows.as_batch(ids[self._positions(rows)])

    def _begin(self, step: int) -> list[Future]:
        """Begin to read the batch of a step, in parts."""
        if self._iterator is not None:
            return [self._pool.submit(next, self._iterator)]
        return [self._pool.submit(self._windows.rows, step, slice(row, row + 1)) for row in self._local]

    def _positions(self, rows: slice) -> list[int]:
        return [self._local[row] for row in range(self._windows.batch_size)[rows]]
