"""The interface of the engines that generate tokens, and the plain engine: one step of the model for each token.

An engine runs jobs. A job begins and ends independently of the others: it is a row or, in beam search, a prompt with
all its rows. The host loop in `generate.py` decides which jobs run when. The other engines are in `speculative.py` and
`beams.py`.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from opt_jax.generation import loop
from opt_jax.generation.loop import DecodeState, FlatModel, Report, TokenLogprobs
from opt_jax.generation.memory import check_memory, device_memory
from opt_jax.generation.prompts import batch_bucket, take_prompts
from opt_jax.generation.request import Request
from opt_jax.generation.sampling import SamplingOptions
from opt_jax.model.cache import KVCache
from opt_jax.parallel.mesh import platform_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """The new tokens of R rows in N columns, on the host."""

    tokens: Int32[np.ndarray, "R N"]
    lengths: Int32[np.ndarray, " R"]  # number of new tokens of each row; later columns are padding
    stopped: Bool[np.ndarray, " R"]  # True: ended by an end token, stop sequence or stop string
    logprobs: TokenLogprobs | None = None  # its fields are NumPy arrays
    scores: Float32[np.ndarray, " R"] | None = None  # of beam search
    drafted: Int32[np.ndarray, " R"] | None = None  # of speculative decoding: see `GenerateOutput`
    accepted: Int32[np.ndarray, " R"] | None = None


@dataclasses.dataclass(frozen=True)
class Slots:
    """The S slots of a batch, each with a running job. The engine's next call donates the arrays of `state`."""

    state: Any
    options: Any  # arguments of the engine's compiled functions, one row for each slot
    jobs: Int[np.ndarray, " S"]  # the job of each slot; where there are fewer jobs than slots, the last one repeats


class Engine(Protocol):
    """What the host loop calls."""

    jobs: int  # number of all jobs
    rows_per_job: int
    refills: bool  # whether `place` is supported; if not, a batch must end before the next one begins

    def begin(self, jobs: Int[np.ndarray, " S"]) -> tuple[Slots, Report]:
        """Slots with these jobs, after their prompts were read and their first token was chosen.

        Raises:
          ValueError: the jobs need more memory than the devices have.
        """
        ...

    def advance(self, slots: Slots, steps: int, enough: int) -> tuple[Slots, Report]:
        """The slots after at most `steps` more steps, and none after `enough` slots have ended.

        It may return earlier; the caller then calls it again.
        """
        ...

    def place(self, slots: Slots, jobs: np.ndarray, places: np.ndarray, size: int) -> Slots:
        """The slots with new jobs in `places`, whose jobs have ended.

        Args:
          slots: the slots of the batch.
          jobs: the new jobs.
          places: the slot of each new job.
          size: the number of jobs to compile for, at least `len(jobs)`.
        """
        ...

    def results(self, slots: Slots) -> NewTokens:
        """The rows of all slots: row s * rows_per_job + i is row i of slot s. They are final where a job has ended."""
        ...


class PlainEngine:
    """The plain engine: each step of the model gives one token of each row."""

    rows_per_job, refills = 1, True

    def __init__(self, model: FlatModel, request: Request, more_columns: int = 0, branches: int = 1):
        # For more_columns see `Request.capacity_with`, for branches `check_fits`. Speculative decoding passes both.
        self.model, self.request, self.jobs = model, request, request.rows
        self._more_columns, self._branches = more_columns, branches

    def begin(self, jobs: np.ndarray) -> tuple[Slots, Report]:
        """Slots with these jobs. If they are all jobs, each prompt is read once for all its rows.

        The number of prompts is padded to a bucket. On a GPU a single row is padded to two. XLA turns a product with
        one row into an elementwise product, which it writes to memory, and a sum
        (`xla_gpu_enable_dot_strength_reduction`); and it splits each LayerNorm into three kernels.
        """
        request, copies, prompts = self.request, 1, jobs // self.request.copies
        if len(jobs) == self.jobs:
            count, copies = len(request.input_ids), request.copies
            size = batch_bucket(2 if self.jobs == 1 and platform_of(self.model) == "gpu" else count)
            prompts, jobs = padded(np.arange(count), size), padded(jobs, size * copies)
        capacity = request.capacity_with(self._more_columns)
        check_fits(self.model, request, len(jobs), capacity, self._branches)
        options = request.options_of(jobs)
        state, report = self._read(prompts, options, capacity, copies)
        return Slots(state, options, jobs), report

    def _read(
        self, prompts: np.ndarray, options: SamplingOptions, capacity: int, copies: int = 1
    ) -> tuple[DecodeState, Report]:
        request = self.request
        return loop.begin(
            self.model,
            take_prompts(request.prompts, prompts),
            options,
            capacity=capacity,
            copies=copies,
            do_sample=request.do_sample,
            logprobs=request.logprobs,
            cache_dtype=request.cache_dtype,
        )

    def advance(self, slots: Slots, steps: int, enough: int) -> tuple[Slots, Report]:
        state, report = loop.advance(
            self.model,
            slots.state,
            slots.options,
            np.int32(steps),
            np.int32(enough),
            do_sample=self.request.do_sample,
        )
        return dataclasses.replace(slots, state=state), report

    def place(self, slots: Slots, jobs: np.ndarray, places: np.ndarray, size: int) -> Slots:
        all_jobs = slots.jobs.copy()
        all_jobs[places] = jobs
        # `place_rows` drops the padding, which lies outside the batch.
        places = np.pad(places, (0, size - len(jobs)), constant_values=len(all_jobs)).astype(np.int32)
        state = self.place_state(slots.state, padded(jobs, size), places)
        return Slots(state, self.request.options_of(all_jobs), all_jobs)

    def place_state(self, state: Any, jobs: np.ndarray, places: np.ndarray) -> Any:
        """The engine's state with new jobs in `places`."""
        return place_rows(state, self.new_rows(jobs), places)

    def new_rows(self, jobs: np.ndarray) -> DecodeState:
        """The state of rows for `place_rows`. Its cache has one column for new tokens; that of the batch has all."""
        return self._read(jobs // self.request.copies, self.request.options_of(jobs), capacity=1)[0]

    def results(self, slots: Slots) -> NewTokens:
        return new_tokens(slots.state)

    def cache_of(self, slots: Slots) -> KVCache:
        """The cache after the last step: all tokens of each row but the last; or pads after a row's end as well."""
        return slots.state.cache


def new_tokens(state: DecodeState) -> NewTokens:
    tokens, *others = jax.device_get((state.tokens, state.lengths, state.stopped, state.logprobs))
    return NewTokens(tokens[:, state.width :], *others)


def check_fits(model: Any, request: Request, rows: int, new_columns: int, branches: int = 1, records: int = 1) -> None:
    """Check that the devices have enough memory for a batch of `rows` rows.

    Args:
      model: its parameters tell the devices.
      request: the sizes of one row.
      rows: rows in the batch.
      new_columns: columns of the cache besides those of the prompt.
      branches: positions of a row in one step (beams, or drafts and one more). Each has logits over the vocabulary and
        a row of the attention mask.
      records: sequences of a row for which log-probabilities are kept.

    Raises:
      ValueError: the batch needs more memory.
    """
    columns = request.width + new_columns
    nbytes = columns * (request.column_bytes + branches) + branches * request.vocab_size * 4
    nbytes += records * request.capacity * (request.logprobs or 0) * 8  # token and value
    check_memory(rows * nbytes, device_memory(model), rows, request.given)


def padded(x: np.ndarray, size: int) -> np.ndarray:
    """`x` padded to `size` rows with copies of its last row."""
    return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)], mode="edge")


# Compiled -----------------------------------------------------------------------------------------------------


@partial(jax.jit, donate_argnames="state")
def place_rows(state: DecodeState, new: DecodeState, places: Int[Array, " r"]) -> DecodeState:
    """The state with row `places[i]` replaced by row i of `new`. A place outside [0, R) is dropped.

    A step writes the same column of the cache in all rows. The columns of a new row are rotated to end right before
    that column (columns wrap around). Therefore one compiled program serves all places, and other rows do not change.
    """

    def put(x: Array, y: Array) -> Array:
        y = jnp.pad(y, [(0, a - b if axis else 0) for axis, (a, b) in enumerate(zip(x.shape, y.shape, strict=True))])
        return x.at[places].set(y, mode="drop")

    names = ("tokens", "token", "prompt_lengths", "lengths", "stopped", "logprobs", "matched")
    changed = {name: jax.tree.map(put, getattr(state, name), getattr(new, name)) for name in names}
    return dataclasses.replace(state, cache=state.cache.replace_rows(places, new.cache), **changed)
