"""The interface of the engines that generate tokens, and the plain one: a step of the model for each token.

An engine works on jobs. A job is what begins and ends by itself: a row, or, for beams, a prompt with all its rows. The
driver in `generate.py` decides which jobs are at work, and when. The other engines: `speculative.py` and `beams.py`.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from opt_jax.generation import loop
from opt_jax.generation.loop import DecodeState, FlatModel, Report, TokenLogprobs
from opt_jax.generation.memory import check_memory, device_memory
from opt_jax.generation.request import Request, batch_bucket, take_prompts
from opt_jax.generation.sampling import SamplingOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What generation returns, on the host. R rows, each N columns wide."""

    tokens: np.ndarray  # int32 [R, N]
    lengths: np.ndarray  # int32 [R]: how many of them count
    stopped: np.ndarray  # bool [R]: rows that have ended before being as long as allowed
    logprobs: TokenLogprobs | None = None  # of NumPy arrays
    scores: np.ndarray | None = None  # float32 [R], of beams
    drafted: np.ndarray | None = None  # int32 [R], of drafts
    accepted: np.ndarray | None = None  # int32 [R], of drafts


@dataclasses.dataclass(frozen=True)
class Slots:
    """Jobs at work. `state` is a pytree of arrays that the engine's next call consumes."""

    state: Any
    options: Any  # what the engine's compiled functions are told about each slot
    jobs: np.ndarray  # int [S]: the job of each slot. More slots than jobs: copies of the last


class Engine(Protocol):
    jobs: int
    rows_per_job: int
    refills: bool  # whether `place` works. If not, a batch ends before the next begins

    def begin(self, jobs: np.ndarray) -> tuple[Slots, Report]:
        """Read the prompts of these jobs and make their first step. ValueError: more than the memory can hold."""
        ...

    def advance(self, slots: Slots, steps: int, enough: int) -> tuple[Slots, Report]:
        """At most so many steps, and none once `enough` slots have ended. It may return early: then call it again."""
        ...

    def place(self, slots: Slots, jobs: np.ndarray, places: np.ndarray, size: int) -> Slots:
        """Begin jobs in slots whose own have ended. Compiled for `size` jobs, of which there may be fewer."""
        ...

    def results(self, slots: Slots) -> NewTokens:
        """Of all slots; those of a job are final once it has ended. Row s * rows_per_job + i is row i of slot s."""
        ...


class PlainEngine:
    """One token of each row for each step of the model."""

    rows_per_job, refills = 1, True

    def __init__(self, model: FlatModel, request: Request, more_columns: int = 0, branches: int = 1):
        # more_columns, branches: see `Request.capacity_with` and `check_fits`; more than the defaults for drafts.
        self.model, self.request, self.jobs = model, request, request.rows
        self._more_columns, self._branches = more_columns, branches

    def begin(self, jobs: np.ndarray) -> tuple[Slots, Report]:
        """All jobs at once: a prompt is read once for all its rows. Prompts are filled up to a bucket.

        On a GPU to two at least: XLA makes of a product with one row a multiplication of the whole matrix, which it
        writes to memory and adds up after that (`xla_gpu_enable_dot_strength_reduction`), and three kernels of each
        LayerNorm.
        """
        request, copies, prompts = self.request, 1, jobs // self.request.copies
        if len(jobs) == self.jobs:
            count, copies = len(request.input_ids), request.copies
            size = batch_bucket(2 if self.jobs == 1 and _platform(self.model) == "gpu" else count)
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
        places = np.pad(places, (0, size - len(jobs)), constant_values=len(all_jobs)).astype(np.int32)  # no slot
        state = self.place_state(slots.state, padded(jobs, size), places)
        return Slots(state, self.request.options_of(all_jobs), all_jobs)

    def place_state(self, state: Any, jobs: np.ndarray, places: np.ndarray) -> Any:
        """The engine's state with new jobs in some places."""
        return place_rows(state, self.new_rows(jobs), places)

    def new_rows(self, jobs: np.ndarray) -> DecodeState:
        """The state of rows that are to be placed among others: without columns of the cache for all that will come."""
        return self._read(jobs // self.request.copies, self.request.options_of(jobs), capacity=1)[0]

    def results(self, slots: Slots) -> NewTokens:
        return new_tokens(slots.state)


def new_tokens(state: DecodeState) -> NewTokens:
    tokens, *others = jax.device_get((state.tokens, state.lengths, state.stopped, state.logprobs))
    return NewTokens(tokens[:, state.width :], *others)


def check_fits(model: Any, request: Request, rows: int, new_columns: int, branches: int = 1) -> None:
    """ValueError unless the devices have the memory for so many rows at a time.

    branches: continuations of a row that are looked at together (beams, drafts): one distribution over the vocabulary
    each, and the columns that each of them sees.
    """
    columns = request.width + new_columns
    nbytes = columns * (request.column_bytes + branches) + branches * request.vocab_size * 4
    nbytes += request.capacity * (request.logprobs or 0) * 8  # token and value
    check_memory(rows * nbytes, device_memory(model), rows, request.given)


def padded(x: np.ndarray, size: int) -> np.ndarray:
    """Rows up to `size`, copies of the last one."""
    return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)], mode="edge")


def _platform(model: Any) -> str:
    return next(iter(jax.tree.leaves(model)[0].devices())).platform


# Compiled -----------------------------------------------------------------------------------------------------


@partial(jax.jit, donate_argnames="state")
def place_rows(state: DecodeState, new: DecodeState, places: Int[Array, " r"]) -> DecodeState:
    """The state with other rows in some places; those outside [0, R) are dropped.

    All rows share the column of the cache that a step writes. The columns of a new row go right before that one; after
    the last column comes the first. So nothing is compiled for each place, and no other row is touched.
    """

    def put(x: Array, y: Array) -> Array:
        y = jnp.pad(y, [(0, a - b if axis else 0) for axis, (a, b) in enumerate(zip(x.shape, y.shape, strict=True))])
        return x.at[places].set(y, mode="drop")

    names = ("tokens", "token", "prompt_lengths", "lengths", "stopped", "logprobs", "matched")
    changed = {name: jax.tree.map(put, getattr(state, name), getattr(new, name)) for name in names}
    return dataclasses.replace(state, cache=state.cache.replace_rows(places, new.cache), **changed)
