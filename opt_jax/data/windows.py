"""Token streams -> windows in an order fixed by (seed, step) -> batches, read ahead by threads or processes. No jax.

Grain does the order (`shuffle`: a permutation by index, nothing is stored), the mixture (`mix`: also by index) and
reading ahead. The row r of step n is element n * batch_size + r of one global dataset, whoever asks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from opt_jax.data.tokens import Tokens


class _Source:
    """Windows of one stream, for Grain: item i is {"ids": int32 [seq_len + 1], "start": where it begins}."""

    def __init__(self, tokens: Tokens, seq_len: int, base: int, vocab_size: int | None):
        self._tokens, self._seq_len, self._base, self._vocab_size = tokens, seq_len, base, vocab_size
        self._count = (len(tokens) - 1) // seq_len
        if self._count < 1:
            where = f"{tokens.name}: " if tokens.name else ""
            raise ValueError(
                f"{where}{len(tokens)} tokens do not fill one sequence and the token behind it, {seq_len + 1}: "
                "take more data, or a smaller --seq-len"
            )

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"_Source({self._tokens.name!r}, {self._count})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = int(index) * self._seq_len
        ids = self._tokens.read(start, self._seq_len + 1)
        # JAX would take the nearest row of the embedding, without a word.
        if self._vocab_size is not None and not (0 <= ids.min() and ids.max() < self._vocab_size):
            bad = int(ids[(ids < 0) | (ids >= self._vocab_size)][0])
            raise ValueError(
                f"{self._tokens.name}: id {bad} after token {self._tokens.first + start}, but the vocabulary ends at "
                f"{self._vocab_size}: it was made with another tokenizer"
            )
        return {"ids": ids, "start": self._base + start}


class Order:
    """Batches in an order that follows from what `description` says, and the step's number."""

    def description(self) -> dict[str, Any]:
        raise NotImplementedError

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` steps. Not Grain's own state, which counts what each worker process has
        read and so fits only as many workers and hosts again; here the position is one number, and the rest is what
        the order of the data follows from."""
        return {"step": step} | self.description()

    def check_state(self, saved: Mapping[str, Any] | None, step: int) -> None:
        """
        Raises:
          ValueError: the checkpoint of `step` was made with other data or another order; says what differs.
        """
        if saved is None:
            raise ValueError(f"checkpoint {step} has no state of the data: it was written by an older train.py")
        now = self.state(step)
        differences = [f"{k} was {saved.get(k)}, is now {now[k]}" for k in now if saved.get(k) != now[k]]
        if differences:
            raise ValueError(f"checkpoint {step} was made with other data: " + "; ".join(differences))


class Windows(Order):
    """Contiguous windows of `seq_len + 1` ids over streams: `seq_len` inputs, and each one's next id as target.

    Neighbours share one id, so an epoch predicts every id once, in another order each time (but for those at the very
    end of a stream that fill no window). `batch(step)` is the global batch of that step, whoever asks.

    streams: one or several; weights: how many windows of each, relatively; each is then repeated when it is through.
    Without weights they are one. separator: the id of `</s>`, for batches with "segment_ids": attention stays within a
    document, positions restart. vocab_size: ids beyond it are an error when they are read.
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
        import grain  # heavy, and nothing to those who only want files read

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
        self._fingerprints = [stream.fingerprint() for stream in streams]

    def _ordered(self, dataset: Any, number: int) -> Any:
        # Grain adds the epoch to the seed: from seeds as they are, epoch 1 of a run would be epoch 0 of the next.
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        return dataset.shuffle(seed=seed).repeat()

    def elements(self, step: int, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """{"ids": int32 [r, seq_len + 1], "start": int64 [r]} of these rows of the step's batch."""
        found: list[Any] = [self._rows[step * self.batch_size + int(row)] for row in rows]
        return {
            "ids": np.stack([element["ids"] for element in found]),
            "start": np.array([element["start"] for element in found], np.int64),
        }

    def starts(self, step: int) -> np.ndarray:
        """[batch_size] where the rows of this step's batch begin, counted through all streams."""
        return self.elements(step, range(self.batch_size))["start"]

    def rows(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """[batch_size, seq_len + 1] int32, or only the given rows of it (what one host of many needs)."""
        return self.elements(step, range(self.batch_size)[rows])["ids"]

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The rows as inputs and labels, [rows, seq_len] each: the last id of a row is a label only, the first an input
        only."""
        return self.as_batch(self.rows(step, rows))

    def as_batch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        if self._separator is not None:
            # `</s>` ends a document as a label and begins the next as an input, so no label crosses over.
            batch["segment_ids"] = np.cumsum(batch["input_ids"] == self._separator, axis=1, dtype=np.int32)
        return batch

    def description(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "fingerprint": "+".join(self._fingerprints),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "segments": self._separator is not None,
            "weights": None if self.weights is None else list(self.weights),
        }

    def reader(self, rows: Sequence[int] | np.ndarray, first: int, last: int, workers: int = 0) -> "Reader":
        return Reader(self, rows, first, last, workers)


class _Batches:
    """For Grain: item i is the rows `rows` of step `first + i`."""

    def __init__(self, windows: Windows, rows: np.ndarray, first: int, last: int):
        self._windows, self._rows, self._first, self._count = windows, rows, first, last - first

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"_Batches({self._first}, {self._count})"

    def __getitem__(self, index: int) -> np.ndarray:
        return self._windows.elements(self._first + int(index), self._rows)["ids"]


class Reader:
    """Reads the batches of steps `first` to `last` - 1 ahead, of each only `rows`, this process's own. A context.

    workers: processes that read; 0: threads of this one, enough for arrays on a disk that keeps up. The batches are the
    same.
    """

    def __init__(self, windows: Windows, rows: Sequence[int] | np.ndarray, first: int, last: int, workers: int = 0):
        import grain

        self._windows, self._local = windows, {int(row): i for i, row in enumerate(rows)}
        batches = grain.MapDataset.source(_Batches(windows, np.asarray(rows), first, last))
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        if workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain's processes are told its flags, which absl.app would have parsed
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
        self._iterator = iter(dataset) if last > first else None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._iterator is not None:
            self._iterator.close()

    def __iter__(self) -> Iterator[Callable[[slice], dict[str, np.ndarray]]]:
        """For each step, what `place_batch` asks for rows of the global batch."""
        while self._iterator is not None and (ids := next(self._iterator, None)) is not None:
            # A copy: what Grain's processes have put into shared memory is to be freed now, not when the program ends.
            ids = np.array(ids)
            yield lambda rows, ids=ids: self._windows.as_batch(ids[self._positions(rows)])

    def _positions(self, rows: slice) -> list[int]:
        return [self._local[row] for row in range(self._windows.batch_size)[rows]]
