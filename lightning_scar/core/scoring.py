"""Scores blocks and chooses which of them a save writes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_scar.core.blocks import BlockMap
from lightning_scar.core.distance import Compared, block_distances
from lightning_scar.core.last_saved import NEVER, LastSaved
from lightning_scar.core.memory import memory
from lightning_scar.core.preconditioner import preconditioners
from lightning_scar.core.rework import Motion, motion
from lightning_scar.core.selection import Candidates, select
from lightning_scar.core.settings import Settings
from lightning_scar.core.threads import Run, in_turn
from lightning_scar.storage.delta import checksum
from lightning_scar.storage.store import Store


@dataclass
class Choice:
    """What a save writes of some groups, and how far behind the rest stays.

    Attributes:
        blocks: Numbers of the chosen blocks in the map, ascending.
        nbytes: Their bytes.
        non_finite: Blocks left out because they hold NaN or Inf and have a good version.
        squared_rest: Squared distance between the blocks left out and their last saved values.
        oldest_age: Steps since the oldest block left out, of those that have changed, was saved.
        motion: How fast the blocks move, and what of that the save leaves out.

    """

    blocks: Tensor
    nbytes: int
    non_finite: int
    squared_rest: float
    oldest_age: int
    motion: Motion

    def by_group(self, block_map: BlockMap) -> dict[int, list[int]]:
        """The chosen blocks' numbers within each group, ascending."""
        found: dict[int, list[int]] = {}
        for block in self.blocks.tolist():
            group, number = block_map.locate(block)
            found.setdefault(group, []).append(number)
        return found


class Scorer:
    """Chooses blocks by the settings.

    Args:
        settings: Fraction, policy and ``max_age``.
        store: Knows the checksums of what is on disk.

    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store

    def choose(
        self,
        last: LastSaved,
        live: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        step: int,
        budget: int | None,
        failed: Collection[str],
        run: Run = in_turn,
    ) -> Choice:
        """Chooses among the blocks of some groups, within a byte budget.

        Args:
            last: What was saved before.
            live: The present tensors of every group, one a slot.
            groups: Which groups.
            step: The present optimizer step.
            budget: Bytes to spend, but never less than one block; ``None`` takes every block that has changed.
            failed: Keys of blocks whose last write failed: they have moved infinitely far.
            run: Shares the work out.

        Returns:
            The choice. Blocks that were never saved are always in it, whatever the budget.

        """
        block_map = last.map
        blocks = torch.cat([torch.arange(*block_map.offsets[g : g + 2]) for g in groups])
        never = last.steps[blocks] == NEVER
        distance = self._distances(last, live, groups, never, run)
        non_finite = distance.isnan() & ~never
        unchanged = self._unchanged(last, live, blocks, (distance == 0) & ~never, full=budget is None)
        if failed:
            distance[self._among(block_map, blocks, failed) & ~non_finite] = torch.inf
            unchanged &= distance != torch.inf
        age = step - last.steps[blocks]
        eligible = ~(never | non_finite | unchanged)
        chosen = never.clone()
        preconditioner = preconditioners([block_map.groups[g] for g in groups], [live[g] for g in groups], step)
        nbytes = block_map.nbytes[blocks]
        candidates = Candidates(distance[eligible], nbytes[eligible], age[eligible], step, preconditioner[eligible])
        chosen[eligible.nonzero().flatten()[self._selected(candidates, budget)]] = True
        rest = eligible & ~chosen
        return Choice(
            blocks=blocks[chosen],
            nbytes=int(nbytes[chosen].sum()),
            non_finite=int(non_finite.sum()),
            squared_rest=float(distance[rest & distance.isfinite()].square().sum()),
            oldest_age=int(age[rest].max()) if bool(rest.any()) else 0,
            motion=motion(distance * preconditioner.sqrt(), age.masked_fill(never, 0), rest),
        )

    def _selected(self, candidates: Candidates, budget: int | None) -> Tensor:
        if budget is None or not len(candidates):
            return torch.arange(len(candidates))
        # A row larger than the budget must not wait for ever.
        budget = max(budget, int(candidates.nbytes.max()))
        return select(candidates, self._settings.policy_function, budget, self._settings.max_age)

    def _distances(
        self, last: LastSaved, live: Sequence[Sequence[Tensor]], groups: Sequence[int], never: Tensor, run: Run
    ) -> Tensor:
        """The distance of every block of some groups; infinite in a group of which nothing was saved."""
        sizes = torch.tensor([len(last.map.groups[g]) for g in groups])
        saved = ~torch.stack([blocks.all() for blocks in torch.split(never, sizes.tolist())])
        known = [last.map.groups[g] for g, is_saved in zip(groups, saved.tolist(), strict=True) if is_saved]
        values = {last.map.groups[g].name: live[g][0] for g in groups}
        distance = torch.full((len(never),), torch.inf, dtype=torch.float64)
        distance[saved.repeat_interleave(sizes)] = block_distances(
            [Compared(values[group.name], last.values(group), group.rows_per_block) for group in known], run
        )
        return distance

    def _unchanged(
        self, last: LastSaved, live: Sequence[Sequence[Tensor]], blocks: Tensor, resting: Tensor, full: bool
    ) -> Tensor:
        """Which of the blocks at distance 0 are on disk as they are now: frozen ones, mostly.

        Distance 0 is not enough: state may move while the parameter rests (a warm-up that begins at rate 0), and
        -0.0 equals 0.0. So what did not move is compared with the checksums on disk. Where the last version is still
        on its way there, a partial save compares the bits of the parameter, and leaves the rest to the next save.
        """
        unchanged = torch.zeros_like(resting)
        for i in resting.nonzero().flatten().tolist():
            g, number = last.map.locate(int(blocks[i]))
            group = last.map.groups[g]
            stored = self._store.index.newest(group.key(number))
            if stored is None or stored.version.step != last.steps[blocks[i]]:
                span, values = group.span(number), last.values(group)
                unchanged[i] = not full and _checksum(live[g][0], *span) == _checksum(values, *span)
                continue
            unchanged[i] = all(
                slot.name in stored.slots and stored.slots[slot.name].checksum == _checksum(tensor, *group.span(number))
                for slot, tensor in zip(group.slots, live[g], strict=True)
            )
        return unchanged

    def _among(self, block_map: BlockMap, blocks: Tensor, keys: Collection[str]) -> Tensor:
        located = (block_map.locate(block) for block in blocks.tolist())
        return torch.tensor([block_map.groups[g].key(number) in keys for g, number in located])


def _checksum(tensor: Tensor, start: int, stop: int) -> str:
    return checksum(memory(tensor[start:stop].cpu().contiguous()))
