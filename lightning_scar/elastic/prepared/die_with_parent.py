"""Run a command that dies with its parent, even by SIGKILL: ``python -I die_with_parent.py <parent> command ...``.

The file is run by itself: to import the package would take longer than all the rest.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel to kill this process when its parent dies, and become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return  # The parent died before the kernel was asked.
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"lightning-scar: cannot run {command[0]}: {error}")


if __name__ == "__main__":
    main()
