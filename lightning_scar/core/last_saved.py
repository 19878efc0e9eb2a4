"""What the owner remembers of the blocks it saved: their values, and when."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_scar.core.blocks import BlockMap, Group, rows
from lightning_scar.core.staging import StagedGroup, scatter

NEVER = -1


class LastSaved:
    """The last saved values of every group's first slot, and the step of every block's last save.

    The values are one copy of the parameters; of optimizer state none is kept.
    """

    def __init__(self) -> None:
        self.map = BlockMap((), 0)
        self.steps = torch.zeros(0, dtype=torch.int64)
        self._values: dict[str, Tensor] = {}

    def adopt(self, block_map: BlockMap, values: dict[str, Tensor], steps: dict[str, int]) -> None:
        """Begins with what a running checkpoint held.

        Args:
            block_map: Its map.
            values: For each group the values of its first slot; copied, since a loader may hand its tensors on.
            steps: For each block, by key, the step of its version; none for a block that has none.

        """
        self.map = block_map
        self._values = {name: tensor.clone() for name, tensor in values.items()}
        self.steps = torch.tensor(
            [steps.get(group.key(i), NEVER) for group in block_map.groups for i in range(len(group))]
        )

    def fit(self, block_map: BlockMap, live: Sequence[Sequence[Tensor]]) -> None:
        """Follows a change of the state: what is known of unchanged groups stays, the rest counts as never saved.

        Args:
            block_map: The new map.
            live: The tensors of each of its groups, one a slot.

        """
        known = {group.name: g for g, group in enumerate(self.map.groups)}
        steps, values = [], {}
        for group, tensors in zip(block_map.groups, live, strict=True):
            old = known.get(group.name)
            if old is None or not _is_part(group, of=self.map.groups[old]):
                steps.append(torch.full((len(group),), NEVER))
                values[group.name] = torch.empty_like(tensors[0])
            else:
                row = group.first_row - self.map.groups[old].first_row
                first = self.map.offsets[old] + row // group.rows_per_block
                steps.append(self.steps[first : first + len(group)])
                part = rows(self._values.pop(group.name))[row : row + group.rows]
                values[group.name] = _laid_out_like(tensors[0], part)
        self.map, self._values = block_map, values
        self.steps = torch.cat(steps) if steps else torch.zeros(0, dtype=torch.int64)

    def values(self, group: Group) -> Tensor:
        """The last saved values of a group, as rows; those of blocks that were never saved mean nothing."""
        return rows(self._values[group.name])

    def record(self, staged: StagedGroup, step: int) -> None:
        """Notes a save of some blocks of one group."""
        group = staged.group
        values = self.values(group)
        scatter(values, group, staged.numbers, staged.copies[0].view(values.dtype).view(-1, *group.row_shape))
        first = self.map.numbers[group.key(0)]
        self.steps[[first + number for number in staged.numbers]] = step

    def forget(self, keys: Iterable[str]) -> None:
        """Makes blocks count as never saved."""
        for key in keys:
            if key in self.map.numbers:
                self.steps[self.map.numbers[key]] = NEVER


def _laid_out_like(live: Tensor, values: Tensor) -> Tensor:
    """The values in the layout of the live tensor, which makes scoring one straight read, in memory of their own."""
    is_all = values.untyped_storage().nbytes() == values.nbytes
    if is_all and values.stride() == live.stride() and values.device == live.device:
        return values
    return torch.empty_like(live).copy_(values)


def _is_part(group: Group, of: Group) -> bool:
    """Whether every block of a group is one of another group, too."""
    end, whole_end = group.first_row + group.rows, of.first_row + of.rows
    # A block shorter than the others is the last one of its parameter.
    same_blocks = end == whole_end or (end < whole_end and end % group.rows_per_block == 0)
    return group.first_row >= of.first_row and same_blocks and _likeness(group) == _likeness(of)


def _likeness(group: Group) -> tuple[object, ...]:
    slots = tuple((slot.name, slot.dtype) for slot in group.slots)
    return len(group.shape), group.row_shape, group.rows_per_block, slots
