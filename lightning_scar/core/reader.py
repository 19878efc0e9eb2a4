"""Reads blocks to where a recovery plan wants them, one rank's share from disk and the rest from the other ranks."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.memory import memory
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.recovery import RecoveryPlan, Source
from lightning_scar.core.shares import shares
from lightning_scar.core.skeleton import Path
from lightning_scar.storage.store import DeltaStore, Reading


class Reader:
    """The tensors of a state, to be filled.

    Args:
        store: Where the deltas lie.
        block_map: The state.
        plan: Where every block comes from; :meth:`read` changes it where it finds damage.
        into: Live tensors to fill in place, by their place in the checkpoint.
        initial: Initial values, by their place in the checkpoint.

    """

    def __init__(
        self,
        store: DeltaStore,
        block_map: BlockMap,
        plan: RecoveryPlan,
        into: Mapping[Path, Tensor],
        initial: Mapping[Path, Tensor],
    ) -> None:
        self._store = store
        self._map = block_map
        self._plan = plan
        self._targets = {group.name: [_target(group, slot, into) for slot in group.slots] for group in block_map.groups}
        self._initial = {group.name: initial_value(group, initial) for group in block_map.groups}

    def read(self, share: BlockMap) -> None:
        """Fills every block of a share, each from the freshest source that turns out to be intact.

        Raises:
            IncompleteError: If a block has no source left.

        """
        places = {group.key(i): (group, i) for group in share.groups for i in range(len(group))}
        slots = {group.name: self._memories(group) for group in share.groups}
        wanted = list(places)
        while wanted:
            readings = []
            for key in wanted:
                group, i = places[key]
                if self._plan[key].source is Source.INITIAL:
                    self._reset(group, i)
                else:
                    readings.append(Reading(self._plan[key].versions[0], partial(_block, slots[group.name], group, i)))
            found = self._store.read(readings)
            wanted = [reading.located.block.key for reading, _ in found]
            for key, (_, damage) in zip(wanted, found, strict=True):
                self._plan.fall_back(key, damage)

    def exchange(self, ranks: Ranks) -> None:
        """Gives every rank what each has read. A collective."""
        own = shares(self._map, ranks.world_size)
        ranks.share_out([[bytes_ for group in share.groups for bytes_ in self._bytes(group)] for share in own])
        for rank, damages in enumerate(ranks.gather([(at.block.key, damage) for at, damage in self._plan.damages])):
            for key, damage in damages if rank != ranks.rank else ():
                self._plan.fall_back(key, damage)

    def tensors(self) -> list[list[Tensor]]:
        """The tensors of each group, one a slot."""
        return [[target.filled() for target in self._targets[group.name]] for group in self._map.groups]

    def _memories(self, group: Group) -> list["_Memory"]:
        return [
            _Memory(slot.name, memory(group.of(target.dense)), group.row_numel * slot.dtype.itemsize)
            for slot, target in zip(group.slots, self._targets[group.name], strict=True)
        ]

    def _bytes(self, group: Group) -> Iterator[Tensor]:
        for target in self._targets[group.name]:
            yield group.of(target.dense).reshape(-1).view(torch.uint8)

    def _reset(self, group: Group, i: int) -> None:
        span = slice(*group.span(i))
        value, *state = (group.of(target.dense)[span] for target in self._targets[group.name])
        initial = self._initial[group.name]
        assert initial is not None
        value.copy_(group.of(initial)[span])
        for tensor in state:
            tensor.zero_()


def initial_value(group: Group, initial: Mapping[Path, Tensor]) -> Tensor | None:
    """The initial value of a group's first slot, if there is one of its shape."""
    found = next((initial[path] for path in group.slots[0].paths if path in initial), None)
    return found if found is not None and tuple(found.shape) == group.shape else None


class _Target(NamedTuple):
    """Where a slot is read to, and the tensor that it is for, if that is another one."""

    dense: Tensor
    tensor: Tensor | None

    def filled(self) -> Tensor:
        return self.dense if self.tensor is None else self.tensor.copy_(self.dense)


def _target(group: Group, slot: Slot, into: Mapping[Path, Tensor]) -> _Target:
    given = next((into[path] for path in slot.paths if path in into), None)
    if given is not None and (tuple(given.shape), given.dtype) == (group.shape, slot.dtype):
        direct = given.is_contiguous() and given.device.type == "cpu"
        return _Target(given, None) if direct else _Target(torch.empty(group.shape, dtype=slot.dtype), given)
    laid_out = torch.empty_strided(group.shape, slot.stride, dtype=slot.dtype) if slot.stride else None
    return _Target(torch.empty(group.shape, dtype=slot.dtype), laid_out)


class _Memory(NamedTuple):
    """The bytes of one slot of a group, and how many a row has."""

    slot: str
    whole: memoryview
    row_bytes: int


def _block(slots: Sequence[_Memory], group: Group, i: int) -> dict[str, memoryview]:
    """The bytes of one block, slot by slot."""
    start, stop = group.span(i)
    return {slot.slot: slot.whole[start * slot.row_bytes : stop * slot.row_bytes] for slot in slots}
