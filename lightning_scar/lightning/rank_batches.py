"""The batches of other ranks in a ``fit``: of one training loader or of several, in the user's structure."""

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_map

from lightning_scar.continuation.rank_orders import rank_batches
from lightning_scar.core.data_order import OwnGenerators


class CombinedRankBatches:
    """What :class:`~lightning_scar.core.rank_batches.RankBatches` is of a loader, for a combined one.

    Args:
        combined: The loader.
        orders: What follows each loader in it.
        rank: This rank in the complete group.
        size: The number of ranks in it.

    """

    def __init__(self, combined: CombinedLoader, orders: Sequence[OwnGenerators], rank: int, size: int) -> None:
        self._combined = combined
        self._parts = [rank_batches(order.loader, order, rank, size, i) for i, order in enumerate(orders)]

    def why_unknown(self, rank: int, position: int) -> str | None:
        """Return why the batches of other ranks cannot be known, and what would help; ``None`` if they can."""
        if self._combined._mode == "max_size_cycle" and len({sized_len(part.loader) for part in self._parts}) > 1:
            return "shorter loaders begin anew within an epoch; use CombinedLoader(..., mode='min_size')"
        return next(filter(None, (part.why_unknown(rank, position) for part in self._parts)), None)

    def batches(self, rank: int, positions: Sequence[int]) -> list[Any]:
        """Return batches of a rank, on the CPU; ``None`` in the place of one that it does not have."""
        by_loader = [part.batches(rank, positions) for part in self._parts]
        return [self._combine(batches) for batches in zip(*by_loader, strict=True)]

    def _combine(self, batches: Sequence[Any]) -> Any:
        is_over = any if self._combined._mode == "min_size" else all
        if is_over(batch is None for batch in batches):
            return None
        in_order = iter(batches)
        return tree_map(lambda _: next(in_order), self._combined.iterables)

    def close(self) -> None:
        """Forget the batches, and end the processes that load them."""
        for part in self._parts:
            part.close()
