"""How the user is told of a worker's end."""

import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress

from lightning_scar.elastic.supervisor.policy import Policy

#: Why a generation failed whose members all live.
FAILED_BY_ITSELF = "the group failed, though no worker died"
#: How many different failures are told.
_FAILURES = 3


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


def distinct_failures(failures: Mapping[int, str]) -> list[str]:
    """Return what members told of their group's failure, those first of which there are fewest: one is the cause.

    Example::

        >>> distinct_failures({0: "closed by peer [::1]:77", 1: "CUDA error", 2: "closed by peer [::1]:79"})
        ['rank 1: CUDA error', 'rank 0: closed by peer [::1]:77']

    """
    ranks: dict[str, list[int]] = {}
    for rank, failure in failures.items():
        # They differ in addresses.
        ranks.setdefault(re.sub(r"\d+", "", failure), []).append(rank)
    return [f"rank {same[0]}: {failures[same[0]]}" for same in sorted(ranks.values(), key=len)]


def no_group(failures: Mapping[int, str], policy: Policy) -> str:
    """Return what it means that the group failed again and again though no worker died, and the remedy."""
    told = "".join(f"    {failure}\n" for failure in distinct_failures(failures)[:_FAILURES])
    return (
        "All workers live, but cannot work together: a device fails again and again, or some cannot reach each other. "
        f"They told at last:\n{told}{out_of_restarts(policy)}"
    )


def out_of_restarts(policy: Policy) -> str:
    """Return why nothing was started again after a failure, and the remedy."""
    if policy.max_restarts == 0:
        return "It was not started again: --max-restarts is 0. Fix the cause, or allow restarts.\n"
    return (
        f"It was not started again: --max-restarts {policy.max_restarts} within {policy.restart_window:g} s is used "
        "up. Fix the cause, or allow more with --max-restarts and --restart-window.\n"
    )


def tell_user(line: str) -> None:
    """Print a line for the user."""
    with suppress(OSError, ValueError):
        print(f"lightning-scar: {line}", file=sys.stderr, flush=True)
