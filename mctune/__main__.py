"""``python -m mctune``, and the ``mctune`` command: the command line in a process of its own."""

from __future__ import annotations

import os
import signal
import sys

from mctune.core.interrupt import leave


def run() -> None:
    """Run a command and exit. Ctrl-C ends the process with one line from here on, whatever it is importing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    if __name__ == "__main__" and sys.path and sys.path[0] in ("", os.getcwd() if os.path.isdir(".") else ""):
        sys.path.append(sys.path.pop(0))  # else a queue.py in the working directory comes before Python's own
    from mctune.cli import main

    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is Python's own end
    sys.exit(status)


if __name__ == "__main__":
    run()
