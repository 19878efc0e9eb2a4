"""What the coordinator knows of its workers, and of the generation that they are in."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from lightning_scar.elastic.protocol.messages import Generation, Stranded, Waiting
from lightning_scar.elastic.supervisor.policy import Budget

#: Seconds that a worker has at least to notice that its generation is broken, before it counts as hanging.
_NOTICE_SECONDS = 2.0


@dataclass
class Worker:
    """A living process.

    Args:
        slot: Its slot.
        spawn: Its number.
        born: When it was started.
        is_member: Whether it is of the current generation; a replacement that has not joined yet is of none.
        registered: Whether it speaks the protocol.
        began: Whether it has a state worth keeping.
        can_take_in: Whether its training takes replacements in.
        ended: Whether its training is over.
        ready: Whether it waits to join.
        hung: Whether it was killed because the others waited for it.
        killed: Whether SIGKILL is on its way.
        left: How it left the current generation.

    """

    slot: int
    spawn: int
    born: float
    is_member: bool
    registered: bool = False
    began: bool = False
    can_take_in: bool = True
    ended: bool = False
    ready: bool = False
    hung: bool = False
    killed: bool = False
    left: Waiting | Stranded | None = None

    @property
    def has_state(self) -> bool:
        """Whether it has a state worth keeping, and can be told so."""
        return self.is_member and self.registered and self.began

    def is_at_fault(self, code: int, is_first_start: bool) -> bool:
        """Whether its own program ended it, outside of any training: to start it again would end the same.

        Args:
            code: Its exit code.
            is_first_start: Whether the workers of the job were started for the first time.

        """
        is_outside = self.ended or (is_first_start and not self.began)
        return code > 0 and self.registered and self.is_member and is_outside

    @property
    def steps(self) -> int:
        """How many steps it had completed when it left; -1 if it has not left, or has no state."""
        return -1 if self.left is None else self.left.step


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
    """What to do about a dead member of a generation.

    Args:
        survivors: Its living members.

    """
    if not survivors or not all(worker.has_state for worker in survivors):
        return Remedy.RESTART
    if any(worker.ended for worker in survivors):
        return Remedy.LATER
    return Remedy.REPLACEMENT if all(worker.can_take_in for worker in survivors) else Remedy.RESTART_OF_SHARDS


def furthest(members: Sequence[Worker]) -> tuple[int, int]:
    """The slot of the worker that has completed the most steps, and their number; -1 if there is none."""
    step, slot = max(((worker.steps, -worker.slot) for worker in members), default=(-1, 1))
    return -slot, step


class Present:
    """The present generation.

    Args:
        generation: Its members.

    Attributes:
        is_broken: Whether it is no more.
        deaths: Who of its members died, and how.

    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.is_broken = False
        self.deaths: list[str] = []
        self._is_counted = False
        self._leaving_since: float | None = None

    def is_left_by(self, worker: Worker, event: Waiting | Stranded) -> bool:
        """Whether a worker can leave it so: it may have left for good already, or speak of an older one."""
        is_this = event.generation == self.generation.number
        return is_this and worker.is_member and not isinstance(worker.left, Stranded)

    def leave(self, now: float) -> None:
        """A member leaves it."""
        if self._leaving_since is None:
            self._leaving_since = now

    def end(self, now: float) -> bool:
        """It breaks; returns whether that is news."""
        is_news, self.is_broken = not self.is_broken, True
        if is_news:
            self._leaving_since = now
        return is_news

    def is_within(self, budget: Budget, now: float, is_new: bool) -> bool:
        """Counts a failure; returns whether it may be made good.

        Args:
            budget: How many may be.
            now: The time.
            is_new: Whether it is one more, whatever else happened to this generation.

        """
        if self._is_counted and not is_new:
            return True
        self._is_counted = self._is_counted or not is_new
        return budget.spend(now)

    def hanging(self, members: Sequence[Worker], now: float, hang_timeout: float) -> list[Worker]:
        """The members for which the others have waited too long.

        Args:
            members: Those that live.
            now: The time.
            hang_timeout: Seconds that are not too long yet.

        """
        if self._leaving_since is None:
            return []
        since = now - self._leaving_since
        waited = max((worker.left.waited for worker in members if isinstance(worker.left, Waiting)), default=0.0)
        if since < _NOTICE_SECONDS or since + waited <= hang_timeout:
            return []
        return [worker for worker in members if worker.left is None and not worker.killed]
