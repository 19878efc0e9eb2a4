"""How the user is told of a worker's end."""

import signal

from lightning_scar.elastic.supervisor.policy import Policy


def signal_name(number: int) -> str:
    """Return the name of a signal.

    Example::

        >>> signal_name(15), signal_name(64), signal_name(99)
        ('SIGTERM', 'SIGRTMAX', 'signal 99')

    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_exit(code: int) -> str:
    """Return an exit code in words.

    Example::

        >>> describe_exit(-9), describe_exit(1)
        ('was killed by SIGKILL', 'exited with code 1')

    """
    if code < 0:
        return f"was killed by {signal_name(-code)}"
    return f"exited with code {code}" + (" in the middle of the training" if code == 0 else "")


def describe_stderr(slot: int, code: int, tail: str) -> str:
    """Return what a dead worker wrote last, for the message that ends a job."""
    if tail.strip():
        indented = "".join(f"    {line}\n" for line in tail.strip("\n").splitlines())
        return f"The last lines that rank {slot} wrote to its standard error:\n{indented}"
    hint = "; the system may have run out of memory (see dmesg)" if code == -signal.SIGKILL else ""
    return f"Rank {slot} wrote nothing to its standard error{hint}.\n"


def out_of_restarts(policy: Policy) -> str:
    """Return why nothing was started again after a failure, and the remedy."""
    if policy.max_restarts == 0:
        return "It was not started again: --max-restarts is 0. Fix the cause, or allow restarts.\n"
    return (
        f"It was not started again: --max-restarts {policy.max_restarts} within {policy.restart_window:g} s is used "
        "up. Fix the cause, or allow more with --max-restarts and --restart-window.\n"
    )
