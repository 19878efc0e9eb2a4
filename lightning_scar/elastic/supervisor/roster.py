"""Who is in the job, as the coordinator knows it: workers, their present generation, and nodes that are lost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from lightning_scar.elastic.protocol.messages import Generation, Lost, Stranded, Waiting
from lightning_scar.elastic.supervisor.policy import Budget

#: Seconds that a worker has at least to notice that another one has left, before it counts as hanging.
_NOTICE_SECONDS = 2.0


@dataclass
class Worker:
    """A living process."""

    slot: int
    spawn: int
    #: When it was started.
    born: float
    #: Whether it is in the present generation; a replacement that has not joined yet is in none.
    is_member: bool
    #: Whether it speaks the protocol.
    registered: bool = False
    #: Whether it has a state worth keeping.
    began: bool = False
    #: Whether it took the place of one that died.
    is_replacement: bool = False
    #: Whether its training takes replacements in.
    can_take_in: bool = True
    #: Whether its training is over.
    ended: bool = False
    #: Whether it waits to join.
    ready: bool = False
    #: What it did that it was killed for, if it was, e.g. ``"hung"``.
    fault: str = ""
    #: Whether SIGKILL is on its way.
    killed: bool = False
    #: How it left the present generation, if it has.
    left: Waiting | Stranded | None = None
    #: When it did.
    left_at: float = 0.0

    @property
    def has_state(self) -> bool:
        """Whether it has a state worth keeping, and can be told so."""
        return self.is_member and self.registered and self.began

    @property
    def steps(self) -> int:
        """How many steps it had completed when it left; -1 if it has not left, or has no state."""
        return -1 if self.left is None else self.left.step

    def is_at_fault(self, code: int, is_first_start: bool) -> bool:
        """Return whether its own program ended it outside of any training, and would do so again.

        Args:
            code: Its exit code.
            is_first_start: Whether the workers of the job were started for the first time.

        """
        is_outside = self.ended or (is_first_start and not self.began)
        return code > 0 and self.registered and self.is_member and self.left is None and is_outside


@dataclass
class Present:
    """The present generation, until the next one forms."""

    generation: Generation
    #: When it failed, if it has.
    broken_at: float | None = None
    #: Whether the user was told that nobody has left it for long.
    is_silence_told: bool = False
    #: Which of its members died, and how.
    deaths: list[str] = field(default_factory=list)
    #: Whether one of its failures was counted; all of them count once.
    is_counted: bool = False
    #: When it formed.
    formed: float = 0.0
    #: What each member that has left it told of its failure.
    failures: dict[int, str] = field(default_factory=dict)
    #: Whether a member has left it as planned.
    is_planned: bool = False
    #: When the next one may form, after a failure of this one by itself.
    due: float | None = None

    def count_failure(self, budget: Budget, now: float, is_new: bool, forgets: bool = True) -> bool:
        """Count a failure, unless it is one more of this generation. Return whether a restart is within the budget.

        Args:
            budget: How many restarts are allowed.
            now: The time.
            is_new: Whether it counts in any case.
            forgets: Whether failures long ago no longer count.

        """
        if self.is_counted and not is_new:
            return True
        self.is_counted = self.is_counted or not is_new
        return budget.spend(now, forgets)

    @property
    def is_broken(self) -> bool:
        """Whether it has failed."""
        return self.broken_at is not None

    @property
    def failed_by_itself(self) -> bool:
        """Whether it failed though none of its members died."""
        return self.is_broken and not self.deaths and not self.is_planned


def hanging(members: Sequence[Worker], now: float, hang_timeout: float) -> list[Worker]:
    """Return the members of a generation for which those that have left it wait longer than ``hang_timeout``.

    A member is not waited for where none has left: it may be in a long validation of its own.

    Args:
        members: Its living members.
        now: The time.
        hang_timeout: Seconds.

    """
    waits = [
        (now - worker.left_at, worker.left.waited if isinstance(worker.left, Waiting) else 0.0)
        for worker in members
        if worker.left is not None
    ]
    if not any(since >= _NOTICE_SECONDS and since + waited > hang_timeout for since, waited in waits):
        return []
    return [worker for worker in members if worker.left is None and not worker.killed]


class Phase(Enum):
    """What the job is doing."""

    RUNNING = auto()
    #: All workers are on their way out, to be started again.
    RESTARTING = auto()
    #: All workers are on their way out for good.
    STOPPING = auto()
    OVER = auto()


class Remedy(Enum):
    """What fills the slot of a worker that died."""

    REPLACEMENT = "starting a replacement"
    RESTART = "starting all workers again"
    #: As soon as they have saved what each of them alone holds.
    RESTART_OF_SHARDS = "starting all workers again, since each holds a part of the state"
    #: The training is over: the survivors end well, or are stranded and all start again.
    LATER = "waiting for the others, whose training is over"


def remedy_for(survivors: Sequence[Worker]) -> Remedy:
    """Return what to do about a dead member of a generation, given its living ones."""
    if not survivors or not all(worker.has_state for worker in survivors):
        return Remedy.RESTART
    if any(worker.ended for worker in survivors):
        return Remedy.LATER
    return Remedy.REPLACEMENT if all(worker.can_take_in for worker in survivors) else Remedy.RESTART_OF_SHARDS


def furthest(members: Sequence[Worker]) -> tuple[int, int]:
    """Return the slot of the worker that has completed the most steps, and their number; -1 if there is none."""
    step, slot = max(((worker.steps, -worker.slot) for worker in members), default=(-1, 1))
    return -slot, step


class LostNodes(dict[int, Lost]):
    """The nodes that are lost, by their numbers.

    Example::

        >>> nodes = LostNodes()
        >>> nodes[1] = Lost(1, (2, 3))
        >>> nodes.news(Remedy.RESTART, patience=600)  # doctest: +ELLIPSIS
        ['node 1 was lost; all workers are started again when it is back. Start its supervisor again within 600 s, ...']
        >>> nodes.news(Remedy.RESTART, patience=600), sorted(nodes.slots), nodes.end(1)
        ([], [2, 3], True)

    """

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[int, str] = {}

    @property
    def slots(self) -> set[int]:
        """Those that nobody fills."""
        return {slot for lost in self.values() for slot in lost.slots}

    @property
    def for_good(self) -> Lost | None:
        """One that nobody waits for any more."""
        return next((lost for lost in self.values() if lost.for_good), None)

    def news(self, remedy: Remedy, patience: float) -> list[str]:
        """Return what the user was not told yet: what becomes of the job without each node, and what to do about it.

        Args:
            remedy: What is done about the workers.
            patience: How long a node may stay away; seconds.

        """
        waits = remedy in (Remedy.RESTART, Remedy.RESTART_OF_SHARDS)
        what = "all workers are started again when it is back" if waits else "the job goes on without it"
        how = f"Start its supervisor again within {patience:g} s, there or on another host, with --node-rank"
        news = {node: f"{lost.reason}; {what}. {how} {node}" for node, lost in self.items()}
        told, self._told = self._told, self._told | news
        return [text for node, text in news.items() if told.get(node) != text]

    def end(self, node: int) -> bool:
        """Note that a node is back. Return whether the user was told that it was lost."""
        self.pop(node, None)
        return self._told.pop(node, None) is not None
