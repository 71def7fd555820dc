"""Forks the Python programs that tests start (see `processes.Popen`). Not a test.

This process has imported JAX, Flax and Orbax, which takes three seconds. A program imports only `opt_jax` itself.
Requests are pickled and come over a socket. ("start", words, environment, directory, new session?) comes with the
descriptors of standard input, output and error. The answer is the process id. The answer to ("wait", id) is the status
of the process, or None while it runs.
"""

import builtins
import importlib
import io
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

PALLAS = "jax.experimental.pallas.ops.tpu.splash_attention"
IMPORTED = ("jax.experimental.multihost_utils", PALLAS, "flax.nnx", "grain", "optax", "orbax.checkpoint", "tokenizers")


def serve(connection: socket.socket) -> list[str]:
    """Answer requests. Returns in forked processes only: the words of the program to run."""
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


def become(descriptors: list[int], environment: dict[str, str], directory: str, new_session: bool) -> None:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = stream(1, sys.stdout), stream(2, sys.stderr)
    if new_session:
        os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stream(number: int, like: Any) -> Any:
    """A new text stream for the descriptor. The old stream was set up for another file."""
    unbuffered, lines = like.write_through, number == 2 or os.isatty(number)
    binary = open(number, "wb", 0 if unbuffered else -1, closefd=False)
    return io.TextIOWrapper(binary, like.encoding, like.errors, line_buffering=lines, write_through=unbuffered)


def run(words: list[str]) -> Any:
    """Do what `python *words` does."""
    while words[0] == "-W":
        action, _, category = words[1].partition("::")
        simplefilter: Any = warnings.simplefilter
        simplefilter(action, getattr(builtins, category or "Warning"))
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
        main.__file__ = os.path.abspath(words[0])
        code = compile(Path(words[0]).read_bytes(), words[0], "exec")
    exec(code, main.__dict__)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with warnings.catch_warnings(action="ignore"):
        for name in IMPORTED:
            importlib.import_module(name)
        words = serve(socket.socket(fileno=int(sys.argv[1])))
    run(words)
