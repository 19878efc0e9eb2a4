"""The nodes that are lost: which slots stay empty for it, and what the user is told."""

from collections.abc import Callable

from lightning_scar.elastic.protocol.messages import Back, Lost
from lightning_scar.elastic.supervisor.policy import Policy
from lightning_scar.elastic.supervisor.workers import Remedy

_WAITING = "all workers are started again when it is back"
_GOING_ON = "the job goes on without it"


class Absences:
    """The nodes that are lost.

    Args:
        policy: How long they may stay away.
        say: Tells the user a line.

    Example::

        >>> absences = Absences(Policy(), say=print)
        >>> absences.begin(Lost(1, (2, 3)))
        >>> absences.tell(Remedy.RESTART)  # doctest: +ELLIPSIS
        node 1 was lost; all workers are started again when it is back. Start its supervisor again within 600 s, ...
        >>> sorted(absences.slots)
        [2, 3]

    """

    def __init__(self, policy: Policy, say: Callable[[str], None]) -> None:
        self._policy = policy
        self._say = say
        self._lost: dict[int, Lost] = {}
        self._told: dict[int, str] = {}

    @property
    def slots(self) -> set[int]:
        """Those that nobody fills."""
        return {slot for lost in self._lost.values() for slot in lost.slots}

    @property
    def final(self) -> Lost | None:
        """One that nobody waits for any more."""
        return next((lost for lost in self._lost.values() if lost.for_good), None)

    def begin(self, lost: Lost) -> None:
        """A node is lost; or one that is has been given up."""
        self._lost[lost.node] = lost

    def end(self, back: Back) -> None:
        """A node is there again."""
        self._lost.pop(back.node, None)
        # Who never heard that it was missed need not hear that it is back.
        if self._told.pop(back.node, None) is not None:
            self._say(f"node {back.node} is back")

    def tell(self, remedy: Remedy) -> None:
        """Tells what becomes of the job without them, and what to do about it; nothing twice.

        Args:
            remedy: What is to be done about their workers.

        """
        what = _WAITING if remedy in (Remedy.RESTART, Remedy.RESTART_OF_SHARDS) else _GOING_ON
        for node, lost in self._lost.items():
            if self._told.get(node) != what:
                self._told[node] = what
                limit = f"within {self._policy.node_timeout:g} s"
                self._say(
                    f"{lost.reason}; {what}. Start its supervisor again {limit}, there or on another host, with "
                    f"--node-rank {node}"
                )
