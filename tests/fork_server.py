"""The process that `processes.Popen` has fork Python programs: it has imported JAX, Flax and Orbax already, which takes
a new process three seconds. What is ours each program still imports itself. Not a test.

Requests come over a socket, pickled: ("start", words, environment, directory, new session?) with standard input,
output and error as descriptors is answered with the id of the process; ("wait", id) with its status, or None while it
runs.
"""

import importlib
import os
import pickle
import runpy
import signal
import socket
import sys
import types
import warnings
from pathlib import Path
from typing import Any

IMPORTED = (
    "jax", "jax.experimental.multihost_utils", "jax.experimental.pallas.ops.tpu.splash_attention", "flax.nnx", "grain",
    "optax", "orbax.checkpoint", "tensorstore", "tokenizers",
)  # fmt: skip


def serve(connection: socket.socket) -> list[str]:
    """Returns in the processes that are forked, with the words of their program."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)  # the tests have ended
        kind, *arguments = pickle.loads(message)
        if kind == "wait":
            ended, status = os.waitpid(arguments[0], os.WNOHANG)
            answer = status if ended else None
        elif answer := os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            connection.close()
            words, *place = arguments
            become(descriptors, *place)
            return words
        connection.send(pickle.dumps(answer))


def become(descriptors: list[int], environment: dict[str, str], directory: str | None, new_session: bool) -> None:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = stream(1, sys.stdout), stream(2, sys.stderr)
    if new_session:
        os.setsid()
    if directory is not None:
        os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stream(number: int, like: Any) -> Any:
    line = number == 2 or os.isatty(number)
    new = open(number, "w", 1 if line else -1, encoding=like.encoding, errors=like.errors, closefd=False)
    new.reconfigure(write_through=like.write_through)
    return new


def run(words: list[str]) -> Any:
    """As `python words` does."""
    while words[0] == "-W":
        action, _, category = words[1].partition("::")
        kind = getattr(__builtins__, category) if category else Warning
        warnings.simplefilter(action, kind)  # type: ignore[reportArgumentType]
        sys.warnoptions.append(words[1])
        words = words[2:]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        return runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        code = compile(words[1], "<string>", "exec")
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        main.__file__ = words[0]
        code = compile(Path(words[0]).read_bytes(), words[0], "exec")
    exec(code, main.__dict__)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with warnings.catch_warnings(action="ignore"):
        for name in IMPORTED:
            importlib.import_module(name)
        words = serve(socket.socket(fileno=int(sys.argv[1])))
    run(words)
