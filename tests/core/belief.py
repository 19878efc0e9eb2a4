"""What a writer believes that a reader finds."""

from typing import Any, NamedTuple

import torch
from core_helpers import bits
from torch import Tensor

from lightning_scar.core.blocks import Group, rows
from lightning_scar.core.codec import decode
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.save import Part, Save

Base = tuple[int, int]


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
        self._groups: list[Group] = []
        self._exact: dict[tuple[str, int], list[Tensor]] = {}
        #: The version of each block that was written, and its newest refresh: of which base, and the values by slot.
        self._versions: dict[str, Base] = {}
        self._refreshes: dict[str, tuple[Base, dict[str, Tensor]]] = {}
        #: How many blocks the last save refreshed.
        self.refreshed = 0
        commit = running._committer.commit

        def watched(save: Save, state_bytes: int) -> None:
            commit(save, state_bytes)
            self._note(save)

        running._committer.commit = watched  # type: ignore[method-assign]

    def _note(self, save: Save) -> None:
        self.refreshed, self._groups = sum(len(part.refreshed) for part in save.parts), [p.group for p in save.parts]
        for part in save.parts:
            group = part.group
            mirror = [torch.zeros_like(rows(live)) for live in part.live]
            mirror = self._exact.setdefault((group.name, group.first_row), mirror)
            for number, copies in part.blocks():
                span = slice(*group.span(number))
                for values, (slot, copy) in zip(mirror, copies.items(), strict=True):
                    values[span] = copy.clone().view(slot.dtype).view(values[span].shape)
                self._versions[group.key(number)] = save.version[:2]
            # What was caught changing is left out, and its bases are still there.
            for number, base in zip(part.refreshed, part.table[:, 2:].tolist(), strict=False):
                self._refreshes[group.key(number)] = tuple(base), self._decoded(part, number)  # type: ignore[assignment]

    def _decoded(self, part: Part, number: int) -> dict[str, Tensor]:
        found, start, stop = {}, *part.group.span(number)
        for slot, own in part.codes.items():
            [codes], [scales] = own.encoded([(number, number + 1)])[1:]
            n = (stop - start) * part.group.row_numel
            matrix = torch.frombuffer(bytearray(codes), dtype=torch.uint8).view(1, -1)
            found[slot] = decode(
                own.codec, matrix, torch.frombuffer(bytearray(scales), dtype=torch.bfloat16).view(1, -1), n
            )
        return found

    def rows(self) -> list[Believed]:
        """All that the last save leaves: bases, and what is decoded of their refreshes."""
        bases, result = self._running._stager.bases, []
        for group in self._groups:
            mirror, first = self._exact[group.name, group.first_row], bases.map.numbers[group.key(0)]
            base, known = bases.values(group), bases.is_known()
            found = [Believed(group, i, v.clone(), torch.zeros(group.rows).bool()) for i, v in enumerate(mirror)]
            for i in range(len(group)):
                key, span = group.key(i), slice(*group.span(i))
                version = self._versions.get(key)
                for believed in found if version is not None else ():
                    believed.is_known[span] = True
                if base is not None and known[first + i]:
                    # After a resume it has bases that it did not write itself, and not the state that goes with them.
                    own = bases.incarnations[first + i].item(), bases.sequences[first + i].item()
                    assert version in (None, own), f"{key}: a base that was not written"
                    assert version is None or torch.equal(bits(base[span]), bits(mirror[0][span])), key
                    found[0].values[span], found[0].is_known[span], version = base[span], True, own
                against, decoded = self._refreshes.get(key, (None, {}))
                for believed in found if version == against else ():
                    if (values := decoded.get(group.slots[believed.slot].name)) is not None:
                        _add(believed, span, values)
            result += found
        return result


def _add(believed: Believed, span: slice, values: Tensor) -> None:
    """Brings some rows up to date: the first slot by a difference, the others as they are."""
    old = believed.values[span]
    new = values.view(old.shape)
    if believed.slot == 0:
        new = old.to(torch.promote_types(old.dtype, torch.float32)) + new
    believed.values[span], believed.is_known[span] = new.to(old.dtype), True


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
