"""A toy training state: blocks whose bytes follow from their name and version, so that any process can check them."""

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from lightning_scar.storage.delta import WHOLE, Column, Encoded, Refresh, Section, Span, block_key, checksum
from lightning_scar.storage.head import Head, Mark, Version
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.reading import Reading, fill
from lightning_scar.storage.store import DeltaStore, Located, retry_vanished

Spawn = Callable[..., BaseProcess]


def in_environment(environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> None:
    """What a child process runs: a fork server's children do not know what the environment has become since."""
    os.environ.update(environment)
    function(*arguments)


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Does something again and again in another thread, until the end of the ``with`` block."""
    is_over = threading.Event()

    def act_on() -> None:
        while not is_over.is_set():
            act()

    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act_on)
        try:
            yield
        finally:
            is_over.set()
        acting.result()


FIRST = Version(1, 0, 0)


def head(version: Version = FIRST, consistent: Version | tuple[Mark, ...] | None = None, **changes: Any) -> Head:
    fields = {
        "incarnation": version.incarnation,
        "lineage": tuple(range(1, version.incarnation + 1)),
        "sequence": version.sequence,
        "step": version.step,
        "rank": 0,
        "world_size": 1,
        "kind": "partial",
        "whole": False,
        "consistent": (consistent.mark,) if isinstance(consistent, Version) else consistent or (),
        "state_bytes": 1 << 40,
        "info": {},
    }
    return Head(**{**fields, **changes})


def column(*rows: bytes, row_shape: tuple[int, ...] = (), dtype: str = "U8") -> Column:
    return Column(dtype, row_shape, sum(map(len, rows)), [checksum(r) for r in rows], lambda: map(memoryview, rows))


def content(key: str, version: Version, size: int = 64) -> bytes:
    return random.Random(f"{key} {version.incarnation} {version.sequence}").randbytes(size)


def block(key: str, version: Version, size: int = 64) -> Section:
    """One block that is not cut into rows, so that its key is the name of its group."""
    return Section(key, [WHOLE], [version], {"param": column(content(key, version, size))})


def rows(group: str, spans: Sequence[Span], version: Version, row_nbytes: int = 16, slots: str = "param") -> Section:
    """Some blocks of a group that is cut into rows; with more slots, each has the bytes of a block of that name."""
    columns = {}
    for slot in slots.split():
        found = [content(f"{block_key(group, s)}/{slot}", version, (s[1] - s[0]) * row_nbytes) for s in spans]
        columns[slot] = column(*found, row_shape=(row_nbytes,))
    return Section(group, list(spans), [version] * len(spans), columns)


def refresh(group: str, bases: Mapping[Span, Version], at: Version, codes: int = 8, scales: int = 2) -> Refresh:
    """The refresh of blocks as of a save, with so many bytes for each."""
    pieces = [
        [memoryview(content(f"{kind} {block_key(group, span)}", at, size)) for span in bases]
        for kind, size in (("codes", codes), ("scales", scales))
    ]
    slots = {"param": Encoded("linear4", *pieces)}
    return Refresh(group, refreshed(bases), slots)


def refreshed(bases: Mapping[Span, Version]) -> Any:
    """The table of the blocks that have a refresh."""
    return np.array([(*span, *version[:2]) for span, version in bases.items()])


def save(
    store: RankStore,
    keys: Iterable[str],
    version: Version,
    size: int = 64,
    refreshes: Sequence[Refresh] = (),
    **changes: Any,
) -> int:
    return store.commit(head(version, **changes), [block(key, version, size) for key in keys], refreshes)


def read(store: DeltaStore, located: Located) -> bytes:
    """The bytes of one version of a block; fails on damage."""
    into = memoryview(bytearray(located.block.nbytes))
    damage = fill([Reading(located, lambda: {"param": into})])
    assert not damage, damage
    return bytes(into)


def newest(store: DeltaStore) -> dict[str, Version]:
    return {key: store.index.versions(key)[0].block.version for key in sorted(store.index.keys())}


def check(store: DeltaStore) -> dict[str, Version]:
    """Reads the newest version of every block as a fresh reader does, checks it, and returns the versions."""

    def attempt() -> dict[str, Version]:
        store.refresh()
        located = [store.index.versions(key)[0] for key in sorted(store.index.keys())]
        memories = [at.block.new_memory() for at in located]
        assert not store.damaged, store.damaged
        damage = fill([Reading(at, lambda m=m: m) for at, m in zip(located, memories, strict=True)])
        assert not damage, damage
        for (_, block), memory in zip(located, memories, strict=True):
            assert memory["param"] == content(block.key, block.version, block.nbytes), block.key
        return newest(store)

    return retry_vanished(attempt)


def at_least(versions: Mapping[str, Version], acknowledged: Mapping[str, Version]) -> bool:
    """Whether nothing is older than what was acknowledged before."""
    return all(versions[key] >= version for key, version in acknowledged.items())
