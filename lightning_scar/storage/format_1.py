"""Format 1 of the delta, from before the refresh: an entry for each slot of each block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from lightning_scar.storage.delta import WHOLE, Entry, Span, StoredBlock, StoredRefresh
from lightning_scar.storage.head import Version


def contents(
    read: Callable[[int], bytes], metadata: dict[str, str], entries: dict[str, Any], data_start: int
) -> tuple[list[StoredBlock], list[StoredRefresh]]:
    """Return the contents of a delta; see :func:`lightning_scar.storage.format_2.contents`."""
    found = []
    for key, incarnation, sequence, step, checksums in orjson.loads(metadata["blocks"]):
        version = Version(incarnation, sequence, step)
        slots = partial(_slots, key, version, checksums, entries, data_start)
        found.append(StoredBlock(*_taken_apart(key), version, slots))
    return found, []


def _taken_apart(key: str) -> tuple[str, Span]:
    group, bracket, rows = key.rpartition("[")
    if not (bracket and key.endswith("]")):
        return key, WHOLE
    first, _, last = rows.removesuffix("]").partition(":")
    return group, (int(first), int(last))


def _slots(
    key: str, version: Version, checksums: dict[str, str], entries: dict[str, Any], data_start: int
) -> dict[str, Entry]:
    found = {}
    for slot, expected in checksums.items():
        raw = entries[f"{key}/{slot}@{version.incarnation}.{version.sequence}"]
        start, stop = raw["data_offsets"]
        row_shape = tuple(raw["shape"][1:])
        found[slot] = Entry(raw["dtype"], data_start + start, data_start + stop, int(expected, 16), row_shape)
    return found
