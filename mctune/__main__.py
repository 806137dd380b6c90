"""``python -m mctune``, and the ``mctune`` command: the command line in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

from mctune.core.interrupt import leave

# A file that is opened while a standard stream is closed would take its number, and get what is meant for that.
for number in (0, 1, 2):
    try:
        os.fstat(number)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
# From here on Ctrl-C ends the process with one line, whatever it is importing.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
if __name__ == "__main__":
    # What lies about in the working directory, a queue.py or a folder called tvm, comes after what is installed.
    with suppress(OSError):
        if sys.path[:1] in ([""], [os.getcwd()]):
            sys.path.append(sys.path.pop(0))

from mctune.cli import main  # noqa: E402


def run() -> None:
    """Run a command and exit."""
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is Python's own end
    sys.exit(status)


if __name__ == "__main__":
    run()
