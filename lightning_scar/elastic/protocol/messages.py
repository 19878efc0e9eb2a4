"""The messages between the supervisor's coordinator, its agents and the workers.

They go through one ``TCPStore``, which lives in the supervisor, since any worker may die. Workers and agents append
*events* to one log. The coordinator reads them, decides, and answers with *notices*, a second log that everybody reads
from its beginning. So all see the same history in the same order.

A *slot* is the place of a worker in the job, from 0 to ``world_size - 1``: its ``RANK``. It outlives the processes that
fill it. Every start of a process has a *spawn* number that is never used again. So has every *generation*.
"""

from dataclasses import dataclass
from typing import TypeAlias

#: The exit code of a worker after which the supervisor starts all workers again.
RESTART_EXIT_CODE = 75


@dataclass(frozen=True)
class Generation:
    """One membership of the process group.

    Args:
        number: Its number; greater than that of any earlier generation.
        spawns: The spawn number of each member by its slot.
        source: The slot of the member with the most completed steps: the others take its state.
        step: How many steps the source has completed.
        joiners: The slots of those members that have no state yet.
        deaths: Which members of the one before died and how, for the user, e.g. ``"rank 2 was killed by SIGKILL"``.

    """

    number: int
    spawns: dict[int, int]
    source: int
    step: int = 0
    joiners: tuple[int, ...] = ()
    deaths: str = ""

    @property
    def members(self) -> list[int]:
        """The slots of its members, in the order of their group ranks."""
        return sorted(self.spawns)


# -- events: from workers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registered:
    """A worker speaks this protocol: it reports when its group fails."""

    slot: int
    spawn: int


@dataclass(frozen=True)
class Began:
    """A worker has begun a training: it has a state worth keeping.

    Args:
        slot: Its slot.
        spawn: Its spawn number.
        can_take_in: Whether replacements can be taken in. Not if each worker alone holds a part of the state.

    """

    slot: int
    spawn: int
    can_take_in: bool = True


@dataclass(frozen=True)
class Stepped:
    """A worker has completed its first step: its start is over."""

    slot: int
    spawn: int


@dataclass(frozen=True)
class Waiting:
    """A worker has left its generation and waits for the next one.

    Args:
        slot: Its slot.
        spawn: Its spawn number.
        generation: The generation that it has left.
        step: How many steps it has completed.
        boundary: Whether it is between two steps, where a joiner can be taken in, rather than within a step.
        waited: Seconds for which it had been blocked when it gave up.
        failure: What failed in its generation, for the user; "" if it left as all its members do.

    """

    slot: int
    spawn: int
    generation: int
    step: int
    boundary: bool
    waited: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Stranded:
    """A worker's group failed where it cannot form again. The worker waits to learn who saves the state."""

    slot: int
    spawn: int
    generation: int
    step: int


@dataclass(frozen=True)
class Ready:
    """A replacement has finished its set-up and waits to be taken in."""

    slot: int
    spawn: int


@dataclass(frozen=True)
class Ended:
    """A worker's training is over; it may go on with something else, e.g. a test."""

    slot: int
    spawn: int


@dataclass(frozen=True)
class GaveUp:
    """A survivor reports that the job cannot go on, and why."""

    slot: int
    spawn: int
    reason: str


# -- events: from agents --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """An agent has started a worker."""

    slot: int
    spawn: int
    pid: int


@dataclass(frozen=True)
class SparesWaiting:
    """An agent reports how many spares wait on its node."""

    node: int
    count: int


@dataclass(frozen=True)
class Exited:
    """A worker's process is gone.

    Args:
        slot: Its slot.
        spawn: Its spawn number.
        code: Its exit code; negative for the signal that ended it.
        tail: The last lines of its standard error.

    """

    slot: int
    spawn: int
    code: int
    tail: str = ""


@dataclass(frozen=True)
class StopAsked:
    """A process of the job got a signal that asks for the end of the job.

    Args:
        signal: Its number.
        node: The node whose agent got it; -1 if a worker did.
        slot: That worker's slot.
        spawn: Its spawn number.

    """

    signal: int
    node: int = -1
    slot: int = -1
    spawn: int = -1


@dataclass(frozen=True)
class Arrived:
    """An agent waits to be admitted.

    For :class:`~lightning_scar.elastic.supervisor.nodes.Nodes`, not for the coordinator.

    Args:
        node: The number of its node.
        agent: Which of the agents that the node ever had; 1 for the first.

    """

    node: int
    agent: int


# -- changes of nodes, which node 0 detects by itself ----------------------------------------------------------------


@dataclass(frozen=True)
class Lost:
    """A node's agent is gone, and its workers with it.

    Args:
        node: Its number.
        slots: Its slots.
        how: What happened to it, for the user, e.g. ``"was lost"``.
        for_good: Whether nobody waits for another one any more.

    """

    node: int
    slots: tuple[int, ...]
    how: str = "was lost"
    for_good: bool = False

    @property
    def reason(self) -> str:
        """What happened, for the user."""
        return f"node {self.node} {self.how}"


@dataclass(frozen=True)
class Back:
    """A node that was lost has another agent.

    Args:
        node: Its number.
        slots: Its slots.

    """

    node: int
    slots: tuple[int, ...]


WorkerEvent: TypeAlias = (
    Registered | Began | Stepped | Waiting | Stranded | Ready | Ended | GaveUp | Started | Exited | StopAsked
)

Event: TypeAlias = WorkerEvent | SparesWaiting

Change: TypeAlias = Lost | Back


# -- notices: to workers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Formed:
    """The next generation."""

    generation: Generation


@dataclass(frozen=True)
class Broken:
    """A generation has failed. A worker that is blocked in one of its collectives gives up.

    Args:
        generation: Its number.
        reason: The first sign of it, for the user, e.g. ``"rank 1 lost the connection"``.

    """

    generation: int
    reason: str


@dataclass(frozen=True)
class Joining:
    """Replacements are ready, and wait to be taken into the next generation.

    Args:
        generation: The number of the present one.
        slots: The slots of the replacements.

    """

    generation: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Restart:
    """All workers will be started again: those that left this generation exit with :data:`RESTART_EXIT_CODE`.

    Args:
        generation: The last generation.
        keeper: The slot of the worker that saves its state for the next start; -1 for none.
        deaths: Which workers died and how, for the user.

    """

    generation: int
    keeper: int
    deaths: str = ""


@dataclass(frozen=True)
class Stop:
    """The job ends: workers save once, all after the same step, and exit.

    Args:
        reason: Why, for the user.
        disbands: Whether no more generations form: whoever waits for the next one saves what it has.

    """

    reason: str
    disbands: bool = False


# -- notices: to agents ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spawn:
    """Tells an agent to start a worker.

    Args:
        slot: Its slot.
        spawn: Its spawn number.
        generation: The generation that it starts in; -1 for a replacement, which joins later.
        attempt: How many times all workers have been started again.
        node: The node whose agent starts it.

    """

    slot: int
    spawn: int
    generation: int
    attempt: int
    node: int = 0


@dataclass(frozen=True)
class Kill:
    """Tells an agent to send a worker a signal."""

    slot: int
    spawn: int
    signal: int


@dataclass(frozen=True)
class Finish:
    """The job is over: agents end the workers that are left and exit with this code."""

    code: int


Notice: TypeAlias = Formed | Broken | Joining | Restart | Stop | Spawn | Kill | Finish
