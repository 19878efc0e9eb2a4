"""The recovery plan: the freshest source of every block."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lightning_scar.core.blocks import BlockMap
from lightning_scar.core.memory import readable
from lightning_scar.core.rework import Motion
from lightning_scar.storage.delta import Delta, StorageError
from lightning_scar.storage.directory import Tier
from lightning_scar.storage.head import Head, Mark, Version
from lightning_scar.storage.index import Index, Located
from lightning_scar.storage.reading import Damage


class IncompleteError(StorageError):
    """No intact version of some block is left."""


class Source(Enum):
    """The kinds of sources of a block, the nearest and freshest first."""

    SURVIVOR = "survivors"
    MEMORY = "this host's memory"
    NEIGHBOUR = "a neighbour's memory"
    NEWEST = "newest versions in storage"
    OLDER = "older versions"
    INITIAL = "initial values"


_OF_TIERS = {Tier.MEMORY: Source.MEMORY, Tier.NEIGHBOUR: Source.NEIGHBOUR, Tier.STORAGE: Source.NEWEST}


@dataclass
class Planned:
    """The source of one block.

    Attributes:
        source: The kind of source.
        nbytes: Bytes of the block.
        rank: The survivor, if the source is one.
        versions: The remaining versions, the one to read first.

    """

    source: Source
    nbytes: int
    rank: int | None = None
    versions: list[Located] = field(default_factory=list)


class RecoveryPlan:
    """The source of every block of a training state.

    A block that some rank still holds comes from that rank. Every other block comes from its newest version, in the
    nearest place that has it: this host's memory, or storage, where files that only another host's memory had have been
    copied. If all copies are damaged, :meth:`fall_back` switches to an older version, and finally to the initial value.
    In a fresh process every block is lost.

    Partial recovery is SCAR's (section 3.2): the less is lost, the smaller the perturbation.

    Args:
        block_map: The training state.
        index: The versions on disk.
        alive: The rank that still holds each block that is not lost, by key.
        initial: The names of groups that have an initial value.
        limit: Versions after this full save are ignored.

    Raises:
        IncompleteError: If a block has no source at all.

    Example::

        >>> import torch
        >>> from lightning_scar.core.blocks import Group, Slot
        >>> weight = Group("w", (4,), (Slot("param", torch.float32, None, (("w",),)),), rows_per_block=2)
        >>> print(RecoveryPlan(BlockMap((weight,), 8), Index(()), alive={"w[0:2]": 1}, initial={"w"}))
        1 block (8 B) from survivors, 1 block (8 B) from initial values.

    """

    def __init__(
        self,
        block_map: BlockMap,
        index: Index,
        *,
        alive: Mapping[str, int] | None = None,
        initial: Collection[str] = (),
        limit: Mark | None = None,
    ) -> None:
        self.damages: list[tuple[Located, Damage]] = []
        #: How many blocks a refresh was applied to.
        self.refreshed = 0
        self.heads = index.heads
        self._initial = {group.key(i) for group in block_map.groups if group.name in initial for i in range(len(group))}
        self._planned: dict[str, Planned] = {}
        self._newest: dict[str, Version | None] = {}
        for key, nbytes in zip(block_map.numbers, block_map.nbytes.tolist(), strict=True):
            rank = (alive or {}).get(key)
            if rank is not None:
                self._planned[key] = Planned(Source.SURVIVOR, nbytes, rank)
                continue
            versions = [at for at in index.versions(key) if limit is None or at.block.version.mark <= limit]
            self._planned[key] = Planned(Source.NEWEST, nbytes, versions=versions)
            self._newest[key] = versions[0].block.version if versions else None
            self._settle(key)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys of all blocks."""
        return iter(self._planned)

    def __getitem__(self, key: str) -> Planned:
        """Return the source of a block."""
        return self._planned[key]

    def fall_back(self, key: str, damage: Damage) -> None:
        """Switch to the next source of a block.

        Args:
            key: The block, whose source is on disk.
            damage: The damage found there.

        Raises:
            IncompleteError: If there is no other source.

        """
        planned = self._planned[key]
        self.damages.append((planned.versions[0], damage))
        del planned.versions[0]
        self._settle(key)

    def _settle(self, key: str) -> None:
        planned = self._planned[key]
        if planned.versions:
            delta, block = planned.versions[0]
            is_newest = block.version == self._newest[key]
            planned.source = _OF_TIERS[delta.directory.tier(delta.name)] if is_newest else Source.OLDER
            return
        if key not in self._initial:
            raise IncompleteError(
                f"there is no intact version of block {key} left; it is not filled with initial values. "
                "`lightning-scar verify` lists all damage; an older copy of the directory may hold what is missing."
            )
        planned.source = Source.INITIAL

    @property
    def versions(self) -> dict[str, Version]:
        """The version of every block that comes from disk."""
        return {key: planned.versions[0].block.version for key, planned in self._planned.items() if planned.versions}

    @property
    def deltas(self) -> list[Delta]:
        """The files that blocks come from."""
        return [planned.versions[0].delta for planned in self._planned.values() if planned.versions]

    @property
    def is_whole(self) -> bool:
        """Whether every block comes from a survivor or from its newest version."""
        return not any(planned.source in (Source.OLDER, Source.INITIAL) for planned in self._planned.values())

    @property
    def distance(self) -> float | None:
        """The distance by which this recovery moves the state: the paper's ``||d||``, at the step of the newest save.

        This is the distance of the live state to its newest versions on disk when each rank last saved. It is ``None``
        if a block comes from an older version or its initial value, or if a rank's deltas are lost. If some blocks
        survive, the state moves by no more than this (section 3.2).
        """
        return known_distance(self.heads) if self.is_whole else None

    @property
    def rework(self) -> float | None:
        """The estimated rework cost in steps; see :mod:`~lightning_scar.core.rework`."""
        return known_rework(self.heads) if self.is_whole else None

    def __str__(self) -> str:
        blocks: Counter[Source] = Counter()
        nbytes: Counter[Source] = Counter()
        for planned in self._planned.values():
            blocks[planned.source] += 1
            nbytes[planned.source] += planned.nbytes
        parts = [
            f"{blocks[source]} block{'s' * (blocks[source] != 1)} ({readable(nbytes[source])}) from {source.value}"
            for source in Source
            if blocks[source]
        ]
        refreshed = f"; {self.refreshed} of these refreshed" if self.refreshed else ""
        return f"{', '.join(parts)}{refreshed}.{self._outlook()}"

    def _outlook(self) -> str:
        if not self.heads or all(planned.source is Source.SURVIVOR for planned in self._planned.values()):
            return ""
        step = max(head.step for head in self.heads.values())
        late = "".join(
            f" Rank {rank} last saved at step {head.step}." for rank, head in self.heads.items() if head.step < step
        )
        if self.distance is None:
            return f"{late} The distance to the lost state is not known."
        rework = f", about {self.rework:.3g} steps of training" if self.rework is not None else ""
        when = "When the ranks last saved" if late else f"At step {step}"
        return f"{late} {when}, the lost state was {self.distance:.3g} away from this one{rework}."


def known_distance(heads: Mapping[int, Head]) -> float | None:
    """Return the distance between the live state and the running checkpoint when each rank last saved.

    Args:
        heads: The newest head of every rank.

    Returns:
        The L2 distance over all ranks' blocks; ``None`` if a rank has not saved or its deltas are lost.

    """
    parts = _told(heads, "distance")
    return math.hypot(*parts) if parts is not None else None


def known_rework(heads: Mapping[int, Head]) -> float | None:
    """Return the steps that a crash would have cost when each rank last saved; see :func:`known_distance`."""
    parts = _told(heads, "motion")
    return sum((Motion(*part) for part in parts), Motion()).rework_cost if parts is not None else None


def _told(heads: Mapping[int, Head], name: str) -> list[Any] | None:
    parts = [head.info[name] for head in heads.values() if name in head.info]
    is_complete = bool(heads) and len(parts) == next(iter(heads.values())).world_size
    return parts if is_complete else None
