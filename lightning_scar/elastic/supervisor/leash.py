"""Runs a command that does not outlive the process that asked for it: ``python -I leash.py <parent> command ...``.

The kernel kills a leashed process when its parent is gone, even by SIGKILL. A file of its own, run without the package:
importing that would take longer than all the rest.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent and becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return  # It died before the leash was on.
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"lightning-scar: cannot run {command[0]}: {error}")


if __name__ == "__main__":
    main()
