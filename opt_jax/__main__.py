"""The program `opt-jax`, and `python -m opt_jax`."""

import signal
import sys

# Ctrl-C ends the process. A KeyboardInterrupt during the imports would print a traceback. (A shell starts a background
# job with Ctrl-C ignored, which stays so.)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from opt_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
