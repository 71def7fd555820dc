"""The program `opt-jax`, which is `python -m opt_jax` as well."""

import signal
import sys

# Ctrl-C ends the process: a KeyboardInterrupt amid the imports is a traceback. (A job in the background may ignore it.)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from opt_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
