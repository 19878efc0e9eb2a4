"""Reads blocks as a recovery plan says: this rank's share from disk, the rest from the other ranks."""

from collections.abc import Container, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.decoding import decode_into
from lightning_scar.core.memory import memory
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.recovery import RecoveryPlan, Source
from lightning_scar.core.shares import shares
from lightning_scar.core.skeleton import Path
from lightning_scar.storage.delta import Delta, Encoded, Refresh, StoredRefresh
from lightning_scar.storage.reading import Damage, Reading, fill, read_refreshes
from lightning_scar.storage.store import DeltaStore


class Reader:
    """Fills the tensors of a state.

    Args:
        store: The store to read from.
        block_map: The state.
        plan: The source of every block; :meth:`read` changes it when it finds damage.
        ranks: The ranks that each read a share.
        into: Live tensors to fill in place, by their place in the checkpoint.
        initial: Initial values, by their :func:`uncompiled` place in the checkpoint.
        only: The keys of the blocks to fill; ``None`` for all.

    """

    def __init__(
        self,
        store: DeltaStore,
        block_map: BlockMap,
        plan: RecoveryPlan,
        ranks: Ranks,
        *,
        into: Mapping[Path, Tensor] | None = None,
        initial: Mapping[Path, Tensor] | None = None,
        only: Container[str] | None = None,
    ) -> None:
        self._store = store
        self._plan = plan
        self._ranks = ranks
        self._parts = [
            [part for part in map(partial(_chosen, only), share.groups) if part.numbers]
            for share in shares(block_map, ranks.world_size)
        ]
        names = {part.group.name for parts in self._parts for part in parts}
        self.groups = [group for group in block_map.groups if group.name in names]
        self._targets = {
            group.name: [_target(group, slot, into or {}) for slot in group.slots] for group in self.groups
        }
        self._initial = {group.name: initial_value(group, initial or {}) for group in self.groups}
        self._wanted: dict[_Place, _Wanted] = {}
        #: Refreshes that were read, ``None`` for damaged ones.
        self._refreshes: dict[_Place, Refresh | None] = {}
        #: Refreshes that could not be read.
        self.unrefreshed: list[Damage] = []
        #: For each slot of a group, by name, whether its refresh can hold negative values.
        self.negative: dict[tuple[str, str], bool] = {}

    def read_refreshes(self) -> None:
        """Read the refreshes of all blocks, so that :meth:`read` can skip what they replace. A collective."""
        self._wanted = self._wanted_refreshes()
        new = {place: wanted for place, wanted in self._wanted.items() if place not in self._refreshes}
        self._refreshes |= zip(new, self._read_refreshes(list(new.values())), strict=True)

    def read(self) -> None:
        """Fill every block of this rank's share from its freshest intact source.

        Raises:
            IncompleteError: If a block has no source left.

        """
        replaced = self._replaced()
        own = self._parts[self._ranks.rank]
        places = {part.group.key(i): (part.group, i) for part in own for i in part.numbers}
        slots = {part.group.name: self._memories(part.group) for part in own}
        wanted = [key for key in places if self._plan[key].source is not Source.SURVIVOR]
        while wanted:
            readings = []
            for key in wanted:
                group, i = places[key]
                if self._plan[key].source is Source.INITIAL:
                    self._reset(group, i)
                else:
                    into = partial(_block, slots[group.name], group, i)
                    readings.append(Reading(self._plan[key].versions[0], into, replaced.get(key, ())))
            found = fill(readings)
            wanted = [reading.located.block.key for reading, _ in found]
            for key, (_, damage) in zip(wanted, found, strict=True):
                self._plan.fall_back(key, damage)
                # An older version may have no refresh.
                replaced.pop(key, None)

    def take(self, live: Mapping[Path, Tensor]) -> None:
        """Fill every block that this rank still holds.

        Args:
            live: The live tensors, by their place in the checkpoint.

        """
        for part in (part for parts in self._parts for part in parts):
            for i in part.numbers:
                planned = self._plan[part.group.key(i)]
                if planned.source is Source.SURVIVOR and planned.rank == self._ranks.rank:
                    span = slice(*part.group.span(i))
                    for slot, target in zip(part.group.slots, self._targets[part.group.name], strict=True):
                        part.group.of(target.dense)[span] = part.group.of(live[slot.paths[0]])[span]

    def exchange(self) -> None:
        """Send every rank what the others have filled. A collective."""
        pieces: list[list[Tensor]] = [[] for _ in self._parts]
        for rank, parts in enumerate(self._parts):
            for part in parts:
                for start, stop, survivor in self._stretches(part):
                    pieces[rank if survivor is None else survivor] += self._bytes(part.group, start, stop)
        self._ranks.share_out(pieces)
        found = self._ranks.gather([(at.block.key, damage) for at, damage in self._plan.damages])
        for rank, damages in enumerate(found):
            for key, damage in damages if rank != self._ranks.rank else ():
                self._plan.fall_back(key, damage)

    def bases(self) -> dict[str, Tensor]:
        """Return copies of each group's first slot; before :meth:`refresh` these are the bases."""
        return {group.name: self._targets[group.name][0].dense.clone() for group in self.groups}

    def refresh(self) -> None:
        """Apply the refresh of every block that comes from disk. A collective."""
        if self._plan.damages:
            # Blocks that fell back to an older version may have another refresh.
            self.read_refreshes()
        found = [(w, refresh) for place, w in self._wanted.items() if (refresh := self._refreshes[place])]
        targets = {name: [target.dense for target in slots] for name, slots in self._targets.items()}
        decode_into([(w.group, refresh, sorted(w.places)) for w, refresh in found], targets)
        self._plan.refreshed = sum(len(w.places) for w, _ in found)
        for w, refresh in found:
            codecs = {slot: encoded.codec for slot, encoded in refresh.slots.items() if slot != w.group.slots[0].name}
            self.negative |= {(w.group.name, slot): codec.startswith("linear") for slot, codec in codecs.items()}

    def _wanted_refreshes(self) -> "dict[_Place, _Wanted]":
        """Return the newest refresh of each block's base, by file and group, in the same order on all ranks."""
        whole = {group.name: group for group in self.groups}
        found: dict[_Place, _Wanted] = {}
        for part in (part for parts in self._parts for part in parts):
            for key in map(part.group.key, part.numbers):
                for at in self._plan[key].versions[:1]:
                    for newest in self._store.index.refreshes(at.block)[:1]:
                        group = whole[part.group.name]
                        place = newest.delta.name, group.name
                        wanted = found.setdefault(place, _Wanted(newest.delta, newest.refresh, group, {}))
                        wanted.places[newest.position] = key
        return {place: found[place] for place in sorted(found)}

    def _read_refreshes(self, wanted: "Sequence[_Wanted]") -> list[Refresh | None]:
        """Read a share of the refreshes and receive the rest from the others; ``None`` for damaged ones."""
        rank, size = self._ranks.rank, self._ranks.world_size
        share = [(w.delta, w.refresh) for w in wanted[rank::size]]
        own = self._ranks.together(lambda: read_refreshes(share))
        found = {rank + i * size: refresh for i, refresh in enumerate(own)}
        damages = {i: damage for i, damage in found.items() if isinstance(damage, Damage)}
        damaged = {i: damage for each in self._ranks.gather(damages) for i, damage in each.items()}
        self.unrefreshed += damaged.values()
        intact = {i: refresh for i, refresh in found.items() if isinstance(refresh, Refresh)}
        read = [None if i in damaged else intact.get(i) or _unread(w.refresh) for i, w in enumerate(wanted)]
        self._ranks.share_out(
            [[m for refresh in read[source::size] if refresh for m in _memories(refresh)] for source in range(size)]
        )
        return read

    def _replaced(self) -> dict[str, Set[str]]:
        """Return the slots of each block, by key, that its refresh replaces: optimizer state."""
        found: dict[str, Set[str]] = {}
        for place, wanted in self._wanted.items():
            if refresh := self._refreshes[place]:
                slots = refresh.slots.keys() - {wanted.group.slots[0].name}
                found |= dict.fromkeys(wanted.places.values(), slots)
        return found

    def tensors(self) -> list[list[Tensor]]:
        """Return the tensors of each of ``groups``, one per slot."""
        return [[target.filled() for target in self._targets[group.name]] for group in self.groups]

    def _stretches(self, part: "_Part") -> Iterator[tuple[int, int, int | None]]:
        """Yield first row, last row + 1 and survivor of adjacent blocks with the same sender."""
        start = stop = 0
        sender: int | None = None
        for i in part.numbers:
            first, last = part.group.span(i)
            survivor = self._plan[part.group.key(i)].rank
            if first != stop or survivor != sender:
                if stop > start:
                    yield start, stop, sender
                start, sender = first, survivor
            stop = last
        yield start, stop, sender

    def _memories(self, group: Group) -> list["_Memory"]:
        return [
            _Memory(slot.name, memory(group.of(target.dense)), group.row_numel * slot.dtype.itemsize)
            for slot, target in zip(group.slots, self._targets[group.name], strict=True)
        ]

    def _bytes(self, group: Group, start: int, stop: int) -> Iterator[Tensor]:
        # If only one rank owns the group, the others have its first slot only.
        for target in self._targets[group.name][: None if group.owner is None else 1]:
            yield group.of(target.dense)[start:stop].reshape(-1).view(torch.uint8)

    def _reset(self, group: Group, i: int) -> None:
        span = slice(*group.span(i))
        value, *state = (group.of(target.dense)[span] for target in self._targets[group.name])
        initial = self._initial[group.name]
        assert initial is not None
        value.copy_(group.of(initial)[span])
        for tensor in state:
            tensor.zero_()


#: The names of a refresh's delta and group.
_Place = tuple[str, str]


class _Wanted(NamedTuple):
    """The refresh of a group, and the keys of the wanted blocks by their position in it."""

    delta: Delta
    refresh: StoredRefresh
    group: Group
    places: dict[int, str]


def _unread(stored: StoredRefresh) -> Refresh:
    """Allocate a refresh that another rank will fill."""
    memory = stored.new_memory().items()
    slots = {slot: Encoded(stored.slots[slot].codec, [codes], [scales]) for slot, (codes, scales) in memory}
    return Refresh(stored.group, stored.rows, slots)


def _memories(refresh: Refresh) -> Iterator[Tensor]:
    for slot in refresh.slots.values():
        yield from (torch.frombuffer(part, dtype=torch.uint8) for part in (*slot.codes, *slot.scales) if part)


class _Part(NamedTuple):
    """Some blocks of a group."""

    group: Group
    numbers: list[int]


def _chosen(only: Container[str] | None, group: Group) -> _Part:
    return _Part(group, [i for i in range(len(group)) if only is None or group.key(i) in only])


def initial_value(group: Group, initial: Mapping[Path, Tensor]) -> Tensor | None:
    """Return the initial value of a group's first slot, if there is one of its shape.

    Args:
        group: The group.
        initial: Initial values, by their :func:`uncompiled` places.

    """
    found = next((initial[place] for place in map(uncompiled, group.slots[0].paths) if place in initial), None)
    return found if found is not None and tuple(found.shape) == group.shape else None


def uncompiled(path: Path) -> Path:
    """Return a place without what ``torch.compile`` adds to names; a model may load what it saved when compiled."""
    return tuple(part.replace("_orig_mod.", "") if isinstance(part, str) else part for part in path)


class _Target(NamedTuple):
    """The tensor that a slot is read into, and the tensor to copy it to, if that is another one."""

    dense: Tensor
    tensor: Tensor | None

    def filled(self) -> Tensor:
        return self.dense if self.tensor is None else self.tensor.copy_(self.dense)


def _target(group: Group, slot: Slot, into: Mapping[Path, Tensor]) -> _Target:
    given = next((into[path] for path in slot.paths if path in into), None)
    if given is not None and (tuple(given.shape), given.dtype) == (group.shape, slot.dtype):
        direct = given.is_contiguous() and given.device.type == "cpu"
        return (
            _Target(given, None) if direct else _Target(torch.empty(group.shape, dtype=slot.dtype, device="cpu"), given)
        )
    laid_out = torch.empty_strided(group.shape, slot.stride, dtype=slot.dtype) if slot.stride else None
    return _Target(torch.empty(group.shape, dtype=slot.dtype, device="cpu"), laid_out)


class _Memory(NamedTuple):
    """The bytes of one slot of a group, and the bytes of one row."""

    slot: str
    whole: memoryview
    row_bytes: int


def _block(slots: Sequence[_Memory], group: Group, i: int) -> dict[str, memoryview]:
    """Return the bytes of one block, by slot."""
    start, stop = group.span(i)
    return {slot.slot: slot.whole[start * slot.row_bytes : stop * slot.row_bytes] for slot in slots}
