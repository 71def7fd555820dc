"""Continuous batching: a row that has ended makes room for the next prompt. Ids only, no text.

All rows share the column of the cache that a step writes. A prompt that comes later is read on its own and put into
the columns right before that one; after the last column comes the first. So nothing is compiled for the place where a
prompt goes, and no other row is touched.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opt_jax.generation.loop import DecodeState, Model, NewTokens, advance, begin, new_tokens
from opt_jax.generation.request import Request, take_prompts

_CHECK_EVERY = 8  # steps between two looks for stop strings


def generate(model: Model, request: Request, slots: int, progress_bar: bool | None) -> NewTokens:
    """What `generate.generate` makes of all rows of a request, with `slots` rows at work at a time."""
    rows = np.argsort(-request.prompts.lengths.repeat(request.copies), kind="stable")  # long ones first: the last to
    working, waiting = rows[:slots], list(rows[slots:][::-1])  # end are short, and neighbours are of one length
    several = max(1, slots // 8)  # prompts read at a time: few enough that slots hardly wait for each other
    state, _, _ = _begin(model, request, working, request.capacity)
    made = _nothing(request, state)
    with _progress(progress_bar) as bar:
        task = bar.add_task("generating", total=request.rows)
        while (working >= 0).any():
            state, ended = _advance(model, request, state, working, min(several, len(waiting)) or slots)
            _collect(made, working, ended, new_tokens(state))
            bar.advance(task, int((ended & (working >= 0)).sum()))
            # For the device: a free slot has stopped, whatever its options will be.
            state = dataclasses.replace(state, stopped=state.stopped | ended)
            working, free = np.where(ended, -1, working), np.flatnonzero(ended)
            while waiting and len(free) >= min(several, len(waiting)):
                taken, free = free[: min(several, len(waiting))], free[several:]
                working[taken] = [waiting.pop() for _ in taken]
                state = _refill(model, request, state, working[taken], taken, several)
    return made


def _begin(model: Model, request: Request, rows: np.ndarray, capacity: int):
    return begin(
        model,
        take_prompts(request.prompts, rows // request.copies),
        request.options_of(rows),
        capacity=capacity,
        do_sample=request.do_sample,
        logprobs=request.logprobs,
        cache_dtype=request.cache_dtype,
    )


def _advance(
    model: Model, request: Request, state: DecodeState, working: np.ndarray, enough: int
) -> tuple[DecodeState, np.ndarray]:
    """Steps until `enough` slots are free; the state, and which are."""
    options = request.options_of(np.maximum(working, 0))  # of a free slot: any
    until = np.iinfo(np.int32).max if request.stops is None else int(state.step) + _CHECK_EVERY
    state, _, ended = advance(model, state, options, np.int32(until), np.int32(enough), do_sample=request.do_sample)
    ended = np.asarray(ended) | (working < 0)
    if request.stops is not None:
        at_work = np.flatnonzero(working >= 0)
        new = new_tokens(state)
        ended[at_work] |= request.stops.look(new.tokens[at_work], new.lengths[at_work], working[at_work].tolist())
    return state, ended


def _nothing(request: Request, state: DecodeState) -> NewTokens:
    def rows(x: Array) -> np.ndarray:
        return np.zeros((request.rows, *x.shape[1:]), x.dtype)

    tokens = rows(state.tokens[:, state.width :])
    return NewTokens(tokens, rows(state.lengths), rows(state.stopped), jax.tree.map(rows, state.logprobs))


def _collect(made: NewTokens, working: np.ndarray, ended: np.ndarray, new: NewTokens) -> None:
    slots = np.flatnonzero(ended & (working >= 0))
    for into, x in zip(jax.tree.leaves(vars(made)), jax.tree.leaves(vars(new)), strict=True):
        into[working[slots]] = x[slots]


def _refill(
    model: Model, request: Request, state: DecodeState, rows: np.ndarray, slots: np.ndarray, several: int
) -> DecodeState:
    spare = several - len(rows)  # copies of the last one, for no slot
    rows = np.pad(rows, (0, spare), mode="edge")
    slots = np.pad(slots, (0, spare), constant_values=len(state.lengths)).astype(np.int32)
    new, _, _ = _begin(model, request, rows, capacity=1)
    return _place(state, new, slots)


@partial(jax.jit, donate_argnames="state")
def _place(state: DecodeState, new: DecodeState, slots: Int[Array, " r"]) -> DecodeState:
    """The state with other rows in some slots; those outside [0, R) are dropped."""

    def put(x: Array, y: Array) -> Array:
        y = jnp.pad(y, [(0, a - b if axis else 0) for axis, (a, b) in enumerate(zip(x.shape, y.shape, strict=True))])
        return x.at[slots].set(y, mode="drop")

    names = ("tokens", "token", "prompt_lengths", "lengths", "stopped", "logprobs")
    changed = {name: jax.tree.map(put, getattr(state, name), getattr(new, name)) for name in names}
    return dataclasses.replace(state, cache=state.cache.replace_rows(slots, new.cache), **changed)


def _progress(wanted: bool | None) -> Progress:
    console = Console(stderr=True)
    shown = console.is_terminal if wanted is None else wanted
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not shown)
