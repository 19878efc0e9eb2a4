"""The metadata of a delta."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import orjson


class Mark(NamedTuple):
    """A step at which every rank saved all that it owns.

    Attributes:
        incarnation: Which start of the training.
        step: The optimizer step.

    """

    incarnation: int
    step: int


class Version(NamedTuple):
    """When a block was saved. Ordered by incarnation and sequence; the step is for people.

    Attributes:
        incarnation: The start of the training that wrote it; grows by one at every start.
        sequence: The save of that incarnation. Saves that a rank skips count too, so that all ranks agree.
        step: The optimizer step of that save.

    """

    incarnation: int
    sequence: int
    step: int

    @property
    def mark(self) -> Mark:
        """The version without its sequence, in which ranks may differ."""
        return Mark(self.incarnation, self.step)


@dataclass(frozen=True)
class Head:
    """The metadata of a delta.

    Attributes:
        incarnation: The incarnation that wrote the file.
        lineage: That incarnation and those it resumed from, oldest first.
        sequence: The save that wrote the file.
        step: The optimizer step of that save.
        rank: The rank that wrote the file.
        world_size: The number of ranks that write.
        kind: ``"full"``, ``"partial"`` or ``"compacted"``.
        whole: Whether every rank had finished its first save, as far as the writer knew.
        consistent: The full saves for which the rank still has every block that it owns.
        state_bytes: Bytes of the training state that the rank owns.
        info: Further values of the writer, e.g. ``{"finished": True}``.

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
        """The sort key of saves."""
        return self.incarnation, self.sequence

    def to_json(self) -> str:
        """Return it as JSON, for the header."""
        return orjson.dumps({**asdict(self), "consistent": [list(mark) for mark in self.consistent]}).decode()

    @classmethod
    def from_json(cls, text: str) -> "Head":
        """Parse the result of :meth:`to_json`.

        Raises:
            ValueError: If the text is not JSON.
            TypeError: If something is missing.
            KeyError: If something is missing.

        """
        fields = orjson.loads(text)
        lineage = tuple(fields.pop("lineage"))
        return cls(lineage=lineage, consistent=tuple(Mark(*mark) for mark in fields.pop("consistent")), **fields)


def newest_heads(heads: Iterable[Head]) -> dict[int, Head]:
    """Return the newest head of every rank that has written in the newest incarnation, by rank."""
    newest: dict[int, Head] = {}
    for head in sorted(heads, key=lambda head: head.recency):
        if newest and next(iter(newest.values())).incarnation < head.incarnation:
            newest = {}
        newest[head.rank] = head
    return dict(sorted(newest.items()))


def newest_consistent(heads: Mapping[int, Head]) -> Mark | None:
    """Return the newest full save that all ranks have finished; ``None`` if there is none.

    Args:
        heads: From :func:`newest_heads`.

    """
    if not heads:
        return None
    common = set.intersection(*(set(head.consistent) for head in heads.values()))
    any_head = next(iter(heads.values()))
    if len(heads) < any_head.world_size:
        # A rank that has written nothing since the start has what was there at the start.
        common = {mark for mark in common if mark.incarnation < any_head.incarnation}
    return max(common, default=None)
