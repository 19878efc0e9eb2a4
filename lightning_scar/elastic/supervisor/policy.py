"""How often and how soon workers are started again."""

from collections import deque
from dataclasses import dataclass

#: A worker that lived for so many seconds was healthy.
HEALTHY_SECONDS = 60.0
#: The longest pause before a worker is started again.
LONGEST_PAUSE = 30.0


@dataclass(frozen=True)
class Policy:
    """What the user can choose.

    Args:
        max_restarts: How many failures within the window lead to a restart. All deaths in one outage count once, until
            its survivors are together again. The death of a replacement that has not joined counts, too.
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
    """Counts failures: whether one more may lead to a restart."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._times: deque[float] = deque()

    def spend(self, now: float, forgets: bool = True) -> bool:
        """Count a failure. Return whether it is within ``max_restarts``.

        Args:
            now: The time.
            forgets: Whether failures before the window no longer count. They do if nothing has succeeded since.

        """
        self._times.append(now)
        while forgets and now - self._times[0] > self._policy.restart_window:
            self._times.popleft()
        return len(self._times) <= self._policy.max_restarts


class BackOff:
    """How long to wait before a slot is filled again: not at all at first, longer if its workers keep dying young.

    The same holds for the group, which counts as the slot -1.

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
        """Return the seconds to wait.

        Args:
            slot: Whose worker died.
            lived: How long it had lived, in seconds.

        """
        times = self._died_young.get(slot, 0) + 1 if lived < HEALTHY_SECONDS else 0
        self._died_young[slot] = times
        return 0.0 if times < 2 else min(LONGEST_PAUSE, 2.0 ** (times - 2))
