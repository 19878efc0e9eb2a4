"""The living workers of the job, and what is said to everybody."""

import signal

from lightning_scar.elastic.protocol.messages import Kill, Notice, Spawn
from lightning_scar.elastic.supervisor.homes import Homes
from lightning_scar.elastic.supervisor.roster import Worker


class Crew(dict[int, Worker]):
    """The living workers, by their slots.

    Args:
        homes: Where they run.

    Attributes:
        now: The time of the present decision.
        spawns: How many workers were ever started.

    Example::

        >>> crew = Crew(Homes(per_node=2))
        >>> crew.spawn(slot=1, generation=0, attempt=0)
        >>> crew.kill(crew[1], signal.SIGKILL)
        >>> crew.drain_notices()
        [Spawn(slot=1, spawn=0, generation=0, attempt=0, node=0), Kill(slot=1, spawn=0, signal=9)]

    """

    def __init__(self, homes: Homes) -> None:
        super().__init__()
        self._homes = homes
        self.now = 0.0
        self.spawns = 0
        self._notices: list[Notice] = []

    @property
    def members(self) -> list[Worker]:
        """Those in the present generation."""
        return [worker for _, worker in sorted(self.items()) if worker.is_member]

    @property
    def ready(self) -> list[Worker]:
        """Those that wait to be taken in."""
        return [worker for _, worker in sorted(self.items()) if worker.ready and not worker.killed]

    def say(self, notice: Notice) -> None:
        """Add a notice to those that everybody will read."""
        self._notices.append(notice)

    def drain_notices(self) -> list[Notice]:
        """Return what was said since the last call."""
        notices, self._notices = self._notices, []
        return notices

    def spawn(self, slot: int, generation: int, attempt: int) -> None:
        """Fill a slot.

        Args:
            slot: The slot.
            generation: The generation that the worker starts in; -1 for a replacement.
            attempt: How many times all workers have been started again.

        """
        self[slot] = Worker(slot, self.spawns, self.now, is_member=generation >= 0, is_replacement=generation < 0)
        self.say(Spawn(slot, self.spawns, generation, attempt, self._homes.node_of(slot)))
        self.spawns += 1

    def kill(self, worker: Worker, number: int) -> None:
        """Send a signal to a worker, unless SIGKILL is on its way."""
        if not worker.killed:
            worker.killed = number == signal.SIGKILL
            self.say(Kill(worker.slot, worker.spawn, int(number)))

    def kill_all(self) -> None:
        """Kill all that live."""
        for worker in self.values():
            self.kill(worker, signal.SIGKILL)
