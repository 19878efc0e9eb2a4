"""How often and how soon workers are started again, and how a worker's end is put in words."""

import signal
from collections import deque
from dataclasses import dataclass

#: A worker that lived for so many seconds was healthy.
HEALTHY_SECONDS = 60.0
#: The longest pause before a worker is started again.
LONGEST_PAUSE = 30.0


@dataclass(frozen=True)
class Policy:
    """What the user may choose.

    Args:
        max_restarts: How many failures within the window are made good. All workers that die in one outage, until
            its survivors are together again, count once; so does a replacement that dies on its way in.
        restart_window: Seconds.
        hang_timeout: A worker hangs when others have waited for it for longer; seconds.
        stop_timeout: Seconds that workers have to save and exit.
        kill_grace: Seconds between SIGTERM and SIGKILL for a worker that has nothing to save.
        node_timeout: How long a node that is lost may stay away; seconds.

    """

    max_restarts: int = 3
    restart_window: float = 3600.0
    hang_timeout: float = 1800.0
    stop_timeout: float = 60.0
    kill_grace: float = 5.0
    node_timeout: float = 600.0


class Budget:
    """Counts failures: whether one more may be made good."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._times: deque[float] = deque()

    def spend(self, now: float) -> bool:
        """Counts a failure; returns whether it is within ``max_restarts``."""
        self._times.append(now)
        while now - self._times[0] > self._policy.restart_window:
            self._times.popleft()
        return len(self._times) <= self._policy.max_restarts


class BackOff:
    """How long to wait before a slot is filled again: not at all, then longer for one that keeps dying young.

    Example::

        >>> back_off = BackOff()
        >>> [back_off.pause(slot=2, lived=5.0) for _ in range(5)]
        [0.0, 1.0, 2.0, 4.0, 8.0]
        >>> back_off.pause(slot=2, lived=3600.0)
        0.0

    """

    def __init__(self) -> None:
        self._died_young: dict[int, int] = {}

    def pause(self, slot: int, lived: float) -> float:
        """Seconds to wait.

        Args:
            slot: Whose worker died.
            lived: How long it had lived, in seconds.

        """
        times = self._died_young.get(slot, 0) + 1 if lived < HEALTHY_SECONDS else 0
        self._died_young[slot] = times
        return 0.0 if times < 2 else min(LONGEST_PAUSE, 2.0 ** (times - 2))


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15.

    Example::

        >>> signal_name(15), signal_name(64), signal_name(99)
        ('SIGTERM', 'SIGRTMAX', 'signal 99')

    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def ending(code: int) -> str:
    """An exit code in words.

    Example::

        >>> ending(-9), ending(1)
        ('was killed by SIGKILL', 'exited with code 1')

    """
    if code < 0:
        return f"was killed by {signal_name(-code)}"
    return f"exited with code {code}" + (" in the middle of the training" if code == 0 else "")


def last_words(slot: int, code: int, tail: str) -> str:
    """What a dead worker left, for the message that ends a job."""
    if tail.strip():
        indented = "".join(f"    {line}\n" for line in tail.strip("\n").splitlines())
        return f"The last lines that rank {slot} wrote to its standard error:\n{indented}"
    hint = "; the system may have run out of memory (see dmesg)" if code == -signal.SIGKILL else ""
    return f"Rank {slot} wrote nothing to its standard error{hint}.\n"


def exhausted(policy: Policy) -> str:
    """Why a failure was not made good, and the remedy."""
    if policy.max_restarts == 0:
        return "It was not started again: --max-restarts is 0. Mend the cause, or allow restarts.\n"
    return (
        f"It was not started again: --max-restarts {policy.max_restarts} within {policy.restart_window:g} s is used "
        "up. Mend the cause, or allow more with --max-restarts and --restart-window.\n"
    )
