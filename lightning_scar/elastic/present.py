"""The present generation, and what has become of it so far."""

from collections.abc import Sequence

from lightning_scar.elastic.messages import Generation, Stranded, Waiting
from lightning_scar.elastic.restarts import Budget
from lightning_scar.elastic.roster import Worker

#: Seconds that a worker has at least to notice that its generation is broken, before it counts as hanging.
_NOTICE_SECONDS = 2.0


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
