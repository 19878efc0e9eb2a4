"""Blocks and refreshes read from deltas, in parallel, with every checksum verified."""

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from lightning_scar.storage.delta import DamagedError, Delta, Entry, Refresh, StoredRefresh
from lightning_scar.storage.delta_file import read_blocks, read_refresh
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.index import Located
from lightning_scar.storage.source import Source

#: Threads that read.
READERS = max(2, min(8, os.cpu_count() or 2))
#: A reader gets at least this many blocks.
_SMALLEST_BATCH = 64
#: Bytes read before they are verified: many blocks in one request, and still in the CPU cache.
_AT_ONCE = 1 << 21

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Reading:
    """One version of a block to read.

    Attributes:
        located: Where it is.
        into: Returns memory for each of its slots; called when they are read.
        left_out: The slots that are not needed.

    """

    located: Located
    into: Callable[[], Mapping[str, memoryview]]
    left_out: Container[str] = ()

    @cached_property
    def entries(self) -> list[Entry]:
        """The places of the slots that are needed."""
        return [entry for slot, entry in self.located.block.slots.items() if slot not in self.left_out]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of these slots."""
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Damage:
    """Bytes on disk that differ from what was written.

    Attributes:
        file: Its full path.
        reason: What is wrong.
        block: The damaged block, if it is one.
        step: The step of its version.
        refresh: The group whose refresh is damaged, if it is one; this costs precision only.

    """

    file: str
    reason: str
    block: str | None = None
    step: int | None = None
    refresh: str | None = None

    def __str__(self) -> str:
        if self.refresh is not None:
            return f"refresh of {self.refresh} in {self.file}: {self.reason}, which costs precision only"
        what = f"block {self.block} of step {self.step} in {self.file}" if self.block else self.file
        return f"{what}: {self.reason}"


def fill(readings: Sequence[Reading]) -> list[tuple[Reading, Damage]]:
    """Read blocks into given memory in parallel, and verify every checksum.

    Args:
        readings: What to read and where to.

    Returns:
        The readings that found damage; their memory holds garbage.

    Raises:
        FileNotFoundError: If a compaction has replaced a file; refresh the store and ask again.

    """
    by_file: dict[str, list[Reading]] = {}
    for reading in readings:
        by_file.setdefault(reading.located.delta.name, []).append(reading)
    with ThreadPoolExecutor(READERS) as pool:
        batches = [
            pool.submit(_read_batch, batch)
            for found in by_file.values()
            for batch in _shared_out(sorted(found, key=_place))
        ]
        return [damage for batch in batches for damage in batch.result()]


def _read_batch(batch: list[Reading]) -> list[tuple[Reading, Damage]]:
    delta = batch[0].located.delta
    damages = _read_from(delta.directory, batch)
    if damages and (further := delta.directory.further(delta.name)) is not None:
        # What is damaged in the nearest place may be intact in the next.
        with suppress(FileNotFoundError):
            return _read_from(further, [reading for reading, _ in damages])
    return damages


def _read_from(directory: Directory, batch: Sequence[Reading]) -> list[tuple[Reading, Damage]]:
    with directory.source(batch[0].located.delta.name) as source:
        entries = (entry for reading in batch for entry in reading.entries)
        source.expect(sorted((entry.start, entry.stop) for entry in entries))
        return [damage for stretch in _stretches(batch) for damage in _read_stretch(source, stretch)]


def read_refreshes(wanted: Sequence[tuple[Delta, StoredRefresh]]) -> list[Refresh | Damage]:
    """Read refreshes of groups in parallel, and verify every checksum.

    Args:
        wanted: Which ones, in which deltas.

    Returns:
        Each refresh with its codes and scales in memory, or its damage, which costs precision only.

    Raises:
        FileNotFoundError: If a compaction has replaced a file; refresh the store and ask again.

    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_read_refresh, *zip(*wanted, strict=True))) if wanted else []


def _place(reading: Reading) -> int:
    return min((entry.start for entry in reading.entries), default=0)


def _read_refresh(delta: Delta, stored: StoredRefresh) -> Refresh | Damage:
    try:
        with delta.directory.source(delta.name) as source:
            return read_refresh(source, stored)
    except FileNotFoundError:
        raise
    except (DamagedError, OSError) as error:
        if (further := delta.directory.further(delta.name)) is not None:
            with suppress(FileNotFoundError):
                return _read_refresh(replace(delta, directory=further), stored)
        return Damage(delta.file, str(error), refresh=stored.group)


def _stretches(batch: Iterable[Reading]) -> Iterator[list[Reading]]:
    """Split a batch into stretches that are read before they are verified."""
    stretch: list[Reading] = []
    nbytes = 0
    for reading in batch:
        if stretch and nbytes + reading.nbytes > _AT_ONCE:
            yield stretch
            stretch, nbytes = [], 0
        stretch.append(reading)
        nbytes += reading.nbytes
    yield stretch


def _read_stretch(source: Source, stretch: Sequence[Reading]) -> list[tuple[Reading, Damage]]:
    """Read blocks of one file together, or one by one if any of them is damaged."""
    try:
        read_blocks(source, [(reading.located.block, reading.into(), reading.left_out) for reading in stretch])
    except FileNotFoundError:
        raise
    except (DamagedError, OSError) as error:
        if len(stretch) > 1:
            return [damage for reading in stretch for damage in _read_stretch(source, [reading])]
        return [(stretch[0], _damage(stretch[0], error))]
    return []


def _damage(reading: Reading, error: Exception) -> Damage:
    delta, block = reading.located
    return Damage(delta.file, str(error), block.key, block.version.step)


def _shared_out(items: list[T]) -> list[list[T]]:
    """Split a list, so that several readers share a large file."""
    size = max(_SMALLEST_BATCH, -(-len(items) // READERS))
    return [items[i : i + size] for i in range(0, len(items), size)]
