"""Processes that tokenise, and that end with the process that started them. No jax."""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from opt_jax.data.tokenizers import tokenizer_from_bytes, tokenizer_to_bytes
from opt_jax.system.interrupts import WAITING, delayed
from opt_jax.text.tokenizer import OPTTokenizer


class Workers:
    """What `worker_processes` yields."""

    def __init__(self, submit: Callable[..., "Future[Any]"], characters: Any):
        self.submit, self._characters = submit, characters  # as `Executor.submit`

    def characters(self) -> int:
        """The number of characters that the processes have counted with `count`."""
        return self._characters.get_obj().value  # without the lock, which a process that died may hold


@contextmanager
def worker_processes(number: int, tokenizer: OPTTokenizer) -> Iterator[Workers]:
    """A context with processes that have the tokenizer (`tokenizer_here`).

    At the end of the block the processes are ended, whatever they do.

    (Not a `ProcessPoolExecutor`, which waits for ever if a process dies while it writes a result: all processes write
    to one pipe, and this process holds its end for writing open.)

    Raises (in the futures):
      ValueError: a process has died.
    """
    context = get_context("spawn")  # a fork of a process with threads (of the tokenizer and of JAX) may hang
    idle: SimpleQueue[Connection] = SimpleQueue()
    characters, content = context.Value("q", 0), tokenizer_to_bytes(tokenizer)

    def ask(*task: Any) -> Any:
        connection = idle.get()
        try:
            connection.send(task)
            error, result = connection.recv()
        except (EOFError, OSError):
            raise ValueError("a process that tokenised has died (out of memory?): try fewer --workers") from None
        finally:
            idle.put(connection)
        if error is not None:
            raise error
        return result

    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(number))
        for _ in range(number):
            with delayed():  # a signal while a process is started would truncate the data that it unpickles
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, content, characters), daemon=True)
                process.start()
                theirs.close()  # so that `recv` ends when the process does
                stack.callback(process.join)
                stack.callback(process.terminate)
            idle.put(ours)
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        yield Workers(lambda function, *arguments: threads.submit(ask, function, *arguments), characters)


# In a worker ----------------------------------------------------------------------------------------------------------

_worker: list[Any] = []


def tokenizer_here() -> OPTTokenizer:
    """The tokenizer, in a worker."""
    return _worker[0]


def count(characters: int) -> None:
    """Add to what `Workers.characters` returns, in a worker."""
    with _worker[1].get_lock():
        _worker[1].value += characters


def _serve(connection: Connection, tokenizer: bytes, characters: Any) -> None:
    # Ctrl-C reaches all processes. An idle worker would print its traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    _worker[:] = [tokenizer_from_bytes(tokenizer), characters]
    while True:
        function, *arguments = connection.recv()
        try:
            answer = pickle.dumps((None, function(*arguments)))
        except Exception as error:
            answer = pickle.dumps((error, None))
        connection.send_bytes(answer)


def _end_with_parent() -> None:
    """End this worker with its parent, also when it is computing."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
