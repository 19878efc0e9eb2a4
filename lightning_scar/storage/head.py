"""What a delta says about itself, and the words that it says it in."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import orjson


class Mark(NamedTuple):
    """A moment of a training at which every rank saved all that it owns.

    Attributes:
        incarnation: Which start of the training.
        step: The optimizer step.

    """

    incarnation: int
    step: int


class Version(NamedTuple):
    """When a block was saved. Ordered by incarnation and sequence; the step is for people.

    Attributes:
        incarnation: Which start of the training wrote it; grows by one at every start.
        sequence: Which save of that incarnation; those count that a rank skips, so that all count alike.
        step: The optimizer step of that save.

    """

    incarnation: int
    sequence: int
    step: int

    @property
    def mark(self) -> Mark:
        """The same without the sequence, in which ranks may differ."""
        return Mark(self.incarnation, self.step)


@dataclass(frozen=True)
class Head:
    """What a delta says about itself.

    Attributes:
        incarnation: The incarnation that wrote the file.
        lineage: That incarnation and those it resumed from, oldest first.
        sequence: The save that wrote the file.
        step: The optimizer step of that save.
        rank: The rank that wrote the file.
        world_size: The number of ranks that write.
        kind: ``"full"``, ``"partial"`` or ``"compacted"``.
        whole: Whether every rank had finished its first save, as far as the writer knew.
        consistent: The full saves of which the rank can serve every block that it owns.
        state_bytes: Bytes of the training state that the rank owns, of which the delta holds a part.
        info: Small facts of the writer's, e.g. ``{"finished": True}``.

    """

    incarnation: int
    lineage: tuple[int, ...]
    sequence: int
    step: int
    rank: int
    world_size: int
    kind: str
    whole: bool
    consistent: tuple[Mark, ...]
    state_bytes: int
    info: Mapping[str, Any]

    @property
    def recency(self) -> tuple[int, int]:
        """What saves are ordered by."""
        return self.incarnation, self.sequence

    def to_json(self) -> str:
        """As text, for the header."""
        return orjson.dumps({**asdict(self), "consistent": [list(mark) for mark in self.consistent]}).decode()

    @classmethod
    def from_json(cls, text: str) -> "Head":
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: If it is none.
            TypeError: If something is missing.
            KeyError: If something is missing.

        """
        fields = orjson.loads(text)
        lineage = tuple(fields.pop("lineage"))
        return cls(lineage=lineage, consistent=tuple(Mark(*mark) for mark in fields.pop("consistent")), **fields)


def newest_heads(heads: Iterable[Head]) -> dict[int, Head]:
    """The newest head of every rank that has written in the newest incarnation, by rank."""
    newest: dict[int, Head] = {}
    for head in sorted(heads, key=lambda head: head.recency):
        if newest and next(iter(newest.values())).incarnation < head.incarnation:
            newest = {}
        newest[head.rank] = head
    return dict(sorted(newest.items()))


def newest_consistent(heads: Mapping[int, Head]) -> Mark | None:
    """The newest full save that all ranks have finished; ``None`` where there is none.

    Args:
        heads: From :func:`newest_heads`.

    """
    if not heads:
        return None
    common = set.intersection(*(set(head.consistent) for head in heads.values()))
    any_head = next(iter(heads.values()))
    if len(heads) < any_head.world_size:
        # Who has written nothing yet since the start serves what was there at the start.
        common = {mark for mark in common if mark.incarnation < any_head.incarnation}
    return max(common, default=None)
