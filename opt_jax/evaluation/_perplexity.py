"""Perplexity of a long text, in windows that fit into the context. Ids only, no text."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from opt_jax.model.heads import OPTForCausalLM
from opt_jax.model.ids import as_ids
from opt_jax.parallel.mesh import mesh_of, row_groups

PROTOCOLS = ("non-overlapping", "sliding")
DEFAULT_WINDOW = 2048  # as for the published numbers
DEFAULT_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`. Losses are in nats per scored token. `seconds` includes compilation.

    The standard errors are those of a mean over windows, weighted by their tokens. (Neighbouring tokens are correlated,
    so a standard error over tokens would be too small.) They are None for a single window.
    """

    protocol: str
    window: int
    stride: int
    windows: int
    tokens: int  # scored tokens; each is scored once
    left_out: int  # tokens that are not scored: without a token before them, or in a last window that is not full
    loss: float
    loss_stderr: float | None
    perplexity: float
    perplexity_stderr: float | None
    seconds: float


class NotFiniteError(ValueError):
    """The model gives a token a log-probability that is not finite."""


class Window(NamedTuple):
    """Tokens [begin, end) are read; the last `scored` of them are scored."""

    begin: int
    end: int
    scored: int


def perplexity(
    model: OPTForCausalLM,
    input_ids: Any,
    protocol: str = "non-overlapping",
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """The perplexity of a text: exp of the mean negative log-likelihood of its tokens.

    With the protocol "non-overlapping", each window starts where the one before ends. The first token of a window is
    not scored. A last window that is not full is left out, unless it is the only one. The published WikiText-2 numbers
    of OPT are computed in this way, with windows of 2048 (GPTQ, https://arxiv.org/abs/2210.17323).

    With the protocol "sliding", a window starts `stride` tokens after the one before, and scores the tokens that no
    earlier window contains. So each token, except in the first window, has at least `window - stride` tokens before it
    (https://huggingface.co/docs/transformers/perplexity). Every token but the first is scored, with the same weight.
    Deviation: the code on that page weighs each window after the first by one token less than it scores.

    Args:
      model: the model.
      input_ids: int [N], the ids of the complete text; documents are joined as in training.
      protocol: "non-overlapping" or "sliding".
      window: tokens of a window; default: 2048, or the model's context if that is less.
      stride: of "sliding" only; default: half the window.
      batch_size: windows at a time; default: 8. On a mesh it is a multiple of the parts that rows are sharded into; the
        default is then the least such number that is at least 8.
      progress: called with (windows done, windows) after each batch.

    Raises:
      ValueError: too few tokens, or an argument out of range.
      NotFiniteError: a log-probability is not finite.
    """
    ids = as_ids("input_ids", input_ids, 0, model.config.vocab_size - 1)
    if ids.ndim != 1:
        raise ValueError(f"input_ids must be the ids of one text, [tokens], not of shape {ids.shape}")
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens: perplexity needs at least 2, since nothing predicts the first")
    window, stride = _check(model, protocol, window, stride)
    size = check_batch_size(model, batch_size)
    windows = list(split(len(ids), window, stride))
    if protocol == "non-overlapping" and len(windows) > 1 and windows[-1].end - windows[-1].begin < window:
        windows.pop()

    parts = row_groups_of(model)
    size = min(size, -(-len(windows) // parts) * parts)

    start = time.perf_counter()
    sums = np.zeros(len(windows))
    for first in range(0, len(windows), size):
        batch = windows[first : first + size]
        # All batches have one shape: a last batch is filled with the first window, which is as long as any.
        sums[first : first + len(batch)] = _losses(model, ids, batch + windows[:1] * (size - len(batch)))[: len(batch)]
        if progress is not None:
            progress(first + len(batch), len(windows))
    seconds = time.perf_counter() - start

    counts = np.array([w.scored for w in windows])
    tokens, count = int(counts.sum()), len(windows)
    loss, error = float(sums.sum() / tokens), None
    if count > 1:  # the standard error of a ratio of two sums over windows
        error = float(np.sqrt(count / (count - 1) * ((sums - loss * counts) ** 2).sum()) / tokens)
    value = math.exp(loss) if loss < 700 else math.inf
    return Perplexity(
        protocol,
        window,
        stride,
        count,
        tokens,
        len(ids) - tokens,
        loss,
        error,
        value,
        None if error is None else value * error,
        seconds,
    )


def split(tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows that start `stride` tokens apart, until one reaches the end.

    Each scores the tokens that no earlier window has scored, but not its own first token, which has no token before it.
    """
    done = 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        if scored := end - max(done, begin + 1):
            yield Window(begin, end, scored)
        done = end
        if end == tokens:
            return


def row_groups_of(model: OPTForCausalLM) -> int:
    """The number of parts that the model's mesh shards rows into; 1 without a mesh."""
    mesh = mesh_of(model)
    return 1 if mesh is None else row_groups(mesh)


def check_batch_size(model: OPTForCausalLM, batch_size: int | None) -> int:
    """The batch size, or the default. Raises ValueError if it cannot be sharded over the model's mesh."""
    parts = row_groups_of(model)
    if batch_size is None:
        return -(-DEFAULT_BATCH_SIZE // parts) * parts
    if batch_size < 1 or batch_size % parts:
        raise ValueError(f"batch size {batch_size} must be a multiple of {parts}, the mesh's data x fsdp")
    return batch_size


def _check(model: OPTForCausalLM, protocol: str, window: int | None, stride: int | None) -> tuple[int, int]:
    """(window, stride), with defaults; raises ValueError for a bad one."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: use {' or '.join(map(repr, PROTOCOLS))}")
    limit = model.config.max_position_embeddings
    window = min(DEFAULT_WINDOW, limit) if window is None else window
    if not 2 <= window <= limit:
        raise ValueError(f"window {window}: it must be at least 2 and at most {limit}, the model's context")
    if protocol == "non-overlapping":
        if stride is not None:
            raise ValueError(f"stride {stride}: only for the sliding protocol; non-overlapping windows have none")
        return window, window
    stride = window // 2 if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride}: it must be at least 1 and at most the window, {window}")
    return window, stride


def _losses(model: OPTForCausalLM, ids: np.ndarray, windows: list[Window]) -> np.ndarray:
    """The sum of the negative log-likelihoods of each window's scored tokens, float64 [windows]."""
    width = max(w.end - w.begin for w in windows)
    rows, mask = np.zeros((len(windows), width), np.int32), np.zeros((len(windows), width), bool)
    for row, real, w in zip(rows, mask, windows, strict=True):
        row[w.begin - w.end :], real[w.begin - w.end :] = ids[w.begin : w.end], True
    logprobs = np.asarray(model.score(rows, mask), np.float64)
    for row, w in zip(logprobs, windows, strict=True):
        if not (finite := np.isfinite(row[-w.scored :])).all():
            token = w.end - w.scored + int(np.argmin(finite))
            raise NotFiniteError(f"the log-probability of token {token} is not finite: try another dtype")
    return np.array([-row[-w.scored :].sum() for row, w in zip(logprobs, windows, strict=True)])
