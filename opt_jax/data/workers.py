"""Processes that tokenise, and that end with the process that started them. No jax."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from typing import Any

from opt_jax.data.tokenizers import tokenizer_from_bytes, tokenizer_to_bytes
from opt_jax.system.interrupts import WAITING, delayed
from opt_jax.text.tokenizer import OPTTokenizer


class Workers:
    """What `worker_processes` yields."""

    def __init__(self, pool: ProcessPoolExecutor, characters: Any):
        self._pool, self._characters = pool, characters

    def submit(self, work: Any, *args: Any) -> Future:
        """As `Executor.submit`."""
        with delayed():  # a signal while a process is started would truncate the data that it unpickles
            return self._pool.submit(work, *args)

    def characters(self) -> int:
        """The number of characters that the processes have counted with `count`."""
        return self._characters.get_obj().value  # without the lock, which a process that died may hold


@contextmanager
def worker_processes(number: int, tokenizer: OPTTokenizer) -> Iterator[Workers]:
    """A context with processes that have the tokenizer (`tokenizer_here`). They are ended if the block raises.

    Raises:
      ValueError: one of them has died.
    """
    before = active_children()
    context = get_context("spawn")  # a fork of a process with threads (of the tokenizer and of JAX) may hang
    characters = context.Value("q", 0)
    with ProcessPoolExecutor(
        number, mp_context=context, initializer=_begin, initargs=(tokenizer_to_bytes(tokenizer), characters)
    ) as pool:
        try:
            yield Workers(pool, characters)
        except BrokenProcessPool:
            raise ValueError("a process that tokenised has died (out of memory?): try fewer --workers") from None
        except BaseException:  # an error, a signal, or the caller's error: what the workers still do is for nothing
            for worker in active_children():
                if worker not in before:
                    worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


# In a worker ----------------------------------------------------------------------------------------------------------

_worker: list[Any] = []


def tokenizer_here() -> OPTTokenizer:
    """The tokenizer, in a worker."""
    return _worker[0]


def count(characters: int) -> None:
    """Add to what `Workers.characters` returns, in a worker."""
    with _worker[1].get_lock():
        _worker[1].value += characters


def _begin(tokenizer: bytes, characters: Any) -> None:
    # Ctrl-C reaches all processes. An idle worker would print its traceback, a busy one return it as a result.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    _worker[:] = [tokenizer_from_bytes(tokenizer), characters]


def _end_with_parent() -> None:
    """End this worker with its parent. Otherwise it would wait for ever at the queue, which it holds open itself."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
