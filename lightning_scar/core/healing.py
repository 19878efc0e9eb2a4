"""Restores blocks of a live run that turned NaN or Inf, on all ranks at the same step."""

from collections.abc import Sequence

import torch

from lightning_scar.core.blocks import BlockMap
from lightning_scar.core.live_state import LiveState
from lightning_scar.core.memory import is_finite
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.reader import Reader
from lightning_scar.core.recovery import RecoveryPlan
from lightning_scar.storage.store import DeltaStore


def non_finite_blocks(state: LiveState) -> set[str]:
    """Return the keys of the blocks that hold NaN or Inf on this rank, in the parameter or its optimizer state."""
    found = set()
    for group, tensors in zip(state.map.groups, state.of(state.map), strict=True):
        broken = [tensor for tensor in tensors if not is_finite(tensor)]
        for i in range(len(group)) if broken else ():
            span = slice(*group.span(i))
            if not all(is_finite(tensor[span]) for tensor in broken):
                found.add(group.key(i))
    return found


def survivors(block_map: BlockMap, lost: Sequence[set[str]]) -> dict[str, int]:
    """Return a rank that still has each block: its owner, or the first one if all ranks have the same.

    Args:
        block_map: The whole state.
        lost: The keys of the blocks that each rank has lost.

    """
    found = {}
    for group in block_map.groups:
        holders = range(len(lost)) if group.owner is None else [group.owner]
        for key in map(group.key, range(len(group))):
            rank = next((rank for rank in holders if key not in lost[rank]), None)
            if rank is not None:
                found[key] = rank
    return found


def heal(store: DeltaStore, state: LiveState, ranks: Ranks, lost: Sequence[set[str]]) -> RecoveryPlan:
    """Restore lost blocks in place, from a rank that still has them, else from disk. A collective.

    Args:
        store: The running checkpoint; all ranks must see the same files.
        state: The live state.
        ranks: All ranks.
        lost: The keys of the blocks that each rank has lost.

    Returns:
        The source of every block, including those that were not lost.

    Raises:
        IncompleteError: If a lost block is neither on another rank nor on disk.

    """
    # This may fail on one rank only, if it could not list the files of the others.
    plan = ranks.together(lambda: RecoveryPlan(state.map, store.index, alive=survivors(state.map, lost)))
    reader = Reader(store, state.map, plan, ranks, only=set().union(*lost))
    reader.read_refreshes()
    ranks.together(reader.read)
    reader.take(state.tensors)
    reader.exchange()
    reader.refresh()
    _put_back(state, reader, set().union(*lost))
    return plan


@torch.no_grad()
def _put_back(state: LiveState, reader: Reader, keys: set[str]) -> None:
    live = state.of(BlockMap(tuple(reader.groups), state.map.block_size))
    for group, tensors, healed in zip(reader.groups, live, reader.tensors(), strict=True):
        for i in range(len(group)):
            if group.key(i) in keys:
                span = slice(*group.span(i))
                for tensor, value in zip(tensors, healed, strict=True):
                    tensor[span] = group.of(value)[span]
