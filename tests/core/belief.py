"""What a writer believes that a reader finds."""

from typing import Any, NamedTuple

import torch
from core_helpers import bits
from torch import Tensor

from lightning_scar.core.blocks import Group, rows
from lightning_scar.core.codec import decode
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.save import Part, Save


class Believed(NamedTuple):
    """The rows of one slot of a group that a rank owns, and which of them it knows."""

    group: Group
    slot: int
    values: Tensor
    is_known: Tensor


class Belief:
    """Watches the saves of one rank: its bases, the copies of the other slots, and its own codes.

    Args:
        running: The writer.

    """

    def __init__(self, running: RunningCheckpoint) -> None:
        self._running = running
        self._found: dict[tuple[str, int], list[Believed]] = {}
        #: How many blocks the last save refreshed.
        self.refreshed = 0
        self._parts: list[Part] = []
        commit = running._committer.commit

        def watched(save: Save, state_bytes: int) -> None:
            commit(save, state_bytes)
            self._note(save)

        running._committer.commit = watched  # type: ignore[method-assign]

    def _note(self, save: Save) -> None:
        self.refreshed, self._parts = sum(len(part.refreshed) for part in save.parts), save.parts
        places = {(part.group.name, part.group.first_row) for part in save.parts}
        self._found = {place: found for place, found in self._found.items() if place in places}
        for part in save.parts:
            group = part.group
            found = self._found.setdefault(
                (group.name, group.first_row),
                [
                    Believed(group, i, torch.empty_like(rows(live)), torch.zeros(group.rows, dtype=torch.bool))
                    for i, live in enumerate(part.live)
                ],
            )
            for number, copies in part.blocks():
                span = slice(*group.span(number))
                for believed, (slot, copy) in zip(found, copies.items(), strict=True):
                    values = copy.clone().view(slot.dtype).view(believed.values[span].shape)
                    believed.values[span], believed.is_known[span] = values, True

    def rows(self) -> list[Believed]:
        """All that the last save leaves: bases, and what is decoded of its refresh."""
        result = []
        for part in self._parts:
            group, found = part.group, self._found[part.group.name, part.group.first_row]
            found = [self._with_base(found[0]), *found[1:]]
            for believed in found:
                values, is_known = believed.values.clone(), believed.is_known.clone()
                name = group.slots[believed.slot].name
                if name in part.codes:
                    self._decode(part, name, values, is_known)
                result.append(Believed(group, believed.slot, values, is_known))
        return result

    def _with_base(self, believed: Believed) -> Believed:
        """The first slot; after a resume the writer has its bases only, which it did not write itself."""
        bases, group = self._running._stager.bases, believed.group
        base = bases.values(group)
        if base is None:
            return believed
        first = bases.map.numbers[group.key(0)]
        is_base = bases.is_known()[first : first + len(group)].repeat_interleave(group.rows_per_block)[: group.rows]
        both = believed.is_known & is_base
        assert torch.equal(bits(base[both]), bits(believed.values[both])), f"{group.name}: a base that was not written"
        values = believed.values.clone()
        values[is_base] = base[is_base]
        return Believed(group, 0, values, believed.is_known | is_base)

    def _decode(self, part: Part, slot: str, values: Tensor, is_known: Tensor) -> None:
        codes = [
            (own[i : i + 1], scales[i : i + 1])
            for own, scales in part.codes[slot].pieces(part.group)
            for i in range(len(own))
        ]
        for number in part.refreshed:
            span = slice(*part.group.span(number))
            n = values[span].numel()
            decoded = decode(part.codes[slot].codec, *codes[number], n).view(values[span].shape)
            if slot == part.group.slots[0].name:
                values[span] = (values[span].to(torch.promote_types(values.dtype, torch.float32)) + decoded).to(
                    values.dtype
                )
            else:
                values[span], is_known[span] = decoded.to(values.dtype), True


def assert_restored(checkpoint: dict[str, Any], believed: list[Believed]) -> None:
    """A restored checkpoint is what its writers believe, bit for bit."""
    assert believed
    for group, slot, values, is_known in believed:
        for path in group.slots[slot].paths:
            found: Any = checkpoint
            for key in path:
                found = found[key]
            own = rows(found)[group.first_row : group.first_row + group.rows]
            assert torch.equal(bits(own[is_known]), bits(values[is_known])), (group.name, group.slots[slot].name)
