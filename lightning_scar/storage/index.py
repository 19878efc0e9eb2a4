"""Which version of each block counts, and which bytes of which delta are still needed."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lightning_scar.storage.delta import Delta, Span, StoredBlock, StoredRefresh
from lightning_scar.storage.head import Head, Mark, Version, newest_consistent, newest_heads


class Located(NamedTuple):
    """One version of a block, and the delta that holds it."""

    delta: Delta
    block: StoredBlock


class Refreshed(NamedTuple):
    """The refresh of one block: its delta, its group's refresh, and its position there."""

    delta: Delta
    refresh: StoredRefresh
    position: int


#: A block by group and rows, and the base that its refresh was made against: incarnation, sequence.
_Base = tuple[str, Span, tuple[int, int]]


class _Live:
    """The blocks that a file is kept for."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, Version], StoredBlock] = {}
        self.newest = 0
        self._nbytes: int | None = None

    @property
    def nbytes(self) -> int:
        if self._nbytes is None:
            self._nbytes = sum(block.nbytes for block in self.blocks.values())
        return self._nbytes

    def add(self, block: StoredBlock, is_newest: bool) -> None:
        self.blocks[block.key, block.version] = block
        self._note(block, is_newest, 1)

    def remove(self, block: StoredBlock, is_newest: bool) -> None:
        del self.blocks[block.key, block.version]
        self._note(block, is_newest, -1)

    def _note(self, block: StoredBlock, is_newest: bool, sign: int) -> None:
        self.newest += sign * is_newest
        # Only if it was needed before: at a start it would look up every block of every file.
        if self._nbytes is not None:
            self._nbytes += sign * block.nbytes


def newest_lineage(deltas: Iterable[Delta]) -> tuple[int, ...]:
    """Return the incarnations whose blocks make up the running checkpoint; empty if there is none.

    A fresh incarnation counts when every rank has finished its first save, so that two trainings never mix; it still
    counts if a rank's deltas are lost later. A resumed one counts at once, because it continues the blocks that it
    restored.

    Args:
        deltas: All intact deltas of the directory.

    """
    heads: dict[tuple[int, ...], list[Head]] = {}
    for delta in deltas:
        heads.setdefault(delta.head.lineage, []).append(delta.head)
    return max(filter(lambda lineage: _counts(heads[lineage]), heads), key=lambda lineage: lineage[-1], default=())


def _counts(heads: Sequence[Head]) -> bool:
    is_resumed = len(heads[0].lineage) > 1
    seen = {head.rank for head in heads}
    return is_resumed or len(seen) == heads[0].world_size or any(head.whole for head in heads)


class Index:
    """The versions of every block that are kept: the newest, and an older one to fall back to.

    The older one is the version of the newest full save if there is one, so that a state of a single step can be read
    at any time; otherwise the version before the newest. Until every rank has finished the newest full save, the
    versions of the previous full save are kept too.

    Args:
        lineage: The incarnations that count.
        deltas: Intact deltas, in any order.

    """

    def __init__(self, lineage: Sequence[int], deltas: Iterable[Delta] = ()) -> None:
        self._lineage = tuple(lineage)
        self._heads: dict[int, Head] = {}
        self._marks: list[Mark] = []
        self._versions: dict[str, list[Located]] = {}
        self._live: dict[str, _Live] = {}
        self._refreshing: dict[str, Delta] = {}
        self._refreshes: dict[_Base, list[Refreshed]] | None = None
        self._take(deltas)

    @property
    def lineage(self) -> tuple[int, ...]:
        """The incarnations that count."""
        return self._lineage

    @property
    def heads(self) -> dict[int, Head]:
        """The newest head of every rank of the newest incarnation."""
        return self._heads

    @property
    def consistent(self) -> Mark | None:
        """The newest full save that every rank has finished."""
        return newest_consistent(self.heads)

    def add(self, delta: Delta) -> None:
        """Add a delta; of equal versions the one added last is kept."""
        self._take([delta])

    def _take(self, deltas: Iterable[Delta]) -> None:
        counting = [delta for delta in deltas if delta.head.incarnation in self._lineage]
        found: dict[str, dict[Version, Located]] = {}
        for delta in sorted(counting, key=lambda delta: delta.head.recency):
            for block in delta.blocks:
                if block.version.incarnation in self._lineage:
                    found.setdefault(block.key, {})[block.version] = Located(delta, block)
            if delta.refreshes:
                self._refreshing[delta.name], self._refreshes = delta, None
        self._heads = newest_heads([*self._heads.values(), *(delta.head for delta in counting)])
        marks = sorted({mark for head in self._heads.values() for mark in head.consistent}, reverse=True)
        if marks != self._marks:
            self._marks = marks
            found = {key: {} for key in self._versions} | found
        for key, by_version in found.items():
            known = {at.block.version: at for at in self._versions.get(key, ())}
            self._settle(key, sorted((known | by_version).values(), key=recency, reverse=True))

    def remove(self, delta: Delta) -> None:
        """Remove a delta whose file was deleted."""
        for block in self.live(delta):
            self._settle(block.key, [at for at in self._versions[block.key] if at.delta.name != delta.name])
        if self._refreshing.pop(delta.name, None):
            self._refreshes = None

    def discard(self, located: Located) -> None:
        """Drop a damaged version, so that it does not displace a good one."""
        key, version = located.block.key, located.block.version
        remaining = [
            at for at in self.versions(key) if (at.delta.name, at.block.version) != (located.delta.name, version)
        ]
        if remaining:
            self._settle(key, remaining)

    def _settle(self, key: str, located: list[Located]) -> None:
        for i, (delta, block) in enumerate(self._versions.get(key, [])):
            live = self._live[delta.name]
            live.remove(block, i == 0)
            if not live.blocks:
                del self._live[delta.name]
        if not located:
            self._versions.pop(key, None)
            return
        # Replaced in one step: the training thread looks up blocks meanwhile.
        self._versions[key] = kept = self._kept(located)
        for i, (delta, block) in enumerate(kept):
            self._live.setdefault(delta.name, _Live()).add(block, i == 0)

    def _kept(self, located: list[Located]) -> list[Located]:
        newest, *older = located
        marks = [mark for mark in self._marks if mark < newest.block.version.mark]
        served = [next((at for at in older if at.block.version.mark <= mark), newest) for mark in marks]
        kept = [newest, *(at for at in older if at in served)]
        return kept if len(kept) > 1 else [newest, *older[:1]]

    def keys(self) -> Iterator[str]:
        """Return the keys of the blocks that have a version."""
        return iter(self._versions)

    def versions(self, key: str) -> list[Located]:
        """Return the kept versions of a block, newest first; empty for an unknown block."""
        return self._versions.get(key, [])

    def newest(self, key: str) -> StoredBlock | None:
        """Return the newest version of a block, or ``None`` for an unknown block."""
        located = self._versions.get(key)
        return located[0].block if located else None

    def live(self, delta: Delta) -> list[StoredBlock]:
        """Return the blocks that a delta is still needed for."""
        live = self._live.get(delta.name)
        return list(live.blocks.values()) if live is not None else []

    def is_live(self, delta: Delta) -> bool:
        """Return whether a delta is still needed for any block."""
        return delta.name in self._live

    def live_bytes(self, delta: Delta) -> int:
        """Return the bytes of a delta's live blocks."""
        live = self._live.get(delta.name)
        return live.nbytes if live is not None else 0

    def newest_share(self, delta: Delta) -> float:
        """Return the share of a delta's live blocks that are the newest version."""
        live = self._live.get(delta.name)
        return live.newest / len(live.blocks) if live is not None else 0.0

    def refreshes(self, block: StoredBlock) -> list[Refreshed]:
        """Return the refreshes that were made against exactly this version of a block, newest first.

        The first call after a change indexes all of them; a save never calls this.
        """
        # Another thread may add a delta meanwhile.
        by_base = self._refreshes
        if by_base is None:
            by_base = self._refreshes = _by_base(self._refreshing.copy().values())
        return by_base.get((block.group, block.span, block.version[:2]), [])


def _by_base(deltas: Iterable[Delta]) -> dict[_Base, list[Refreshed]]:
    found: dict[_Base, list[Refreshed]] = {}
    for delta in sorted(deltas, key=lambda delta: delta.head.recency, reverse=True):
        for refresh in delta.refreshes:
            for i, (first, last, *base) in enumerate(refresh.rows.tolist()):
                key = (refresh.group, (first, last), (base[0], base[1]))
                found.setdefault(key, []).append(Refreshed(delta, refresh, i))
    return found


def recency(located: Located) -> tuple[int, int]:
    """Return the sort key of versions."""
    version = located.block.version
    return version.incarnation, version.sequence
