"""Divides the blocks of a training state over the ranks."""

from dataclasses import replace

from lightning_scar.core.blocks import BlockMap, Group


def shares(block_map: BlockMap, world_size: int) -> list[BlockMap]:
    """Divide a map over the ranks by bytes.

    The result depends only on the map and the number of ranks, so ranks need not communicate. A group with an owner
    goes to that rank. Every other group is cut into one run of blocks per rank, so that each rank has a part of every
    parameter, and the ranks' separate choices by distance come close to a global one.

    Args:
        block_map: The whole state. If ranks hold different shards of the optimizer state, their maps may differ only in
            groups with an owner: lazy ones in the slots after the first, others in any way.
        world_size: The number of ranks.

    Returns:
        One map per rank; each block is in exactly one of them.

    Example::

        >>> import torch
        >>> from lightning_scar.core.blocks import Slot
        >>> whole = BlockMap((Group("w", (6, 2), (Slot("param", torch.float32, None, (("w",),)),), 1),), 8)
        >>> [[group.key(i) for group in own.groups for i in range(len(group))] for own in shares(whole, 2)]
        [['w[0:1]', 'w[1:2]', 'w[2:3]'], ['w[3:4]', 'w[4:5]', 'w[5:6]']]

    """
    if world_size == 1:
        return [block_map]
    parts: list[list[Group]] = [[] for _ in range(world_size)]
    for group, counts in zip(block_map.groups, _counts(block_map, world_size), strict=True):
        first = 0
        for rank, count in enumerate(counts):
            if count:
                parts[rank].append(_part(group, first, first + count))
            first += count
    return [BlockMap(tuple(groups), block_map.block_size) for groups in parts]


def _counts(block_map: BlockMap, world_size: int) -> list[list[int]]:
    """Return how many blocks of each group each rank gets."""
    room = _room(block_map, world_size)
    counts = []
    for group in block_map.groups:
        if group.owner is not None:
            counts.append([len(group) * (rank == group.owner) for rank in range(world_size)])
            continue
        # By what each rank has left, so that later groups even out the rounding of earlier ones.
        wanted = [max(0, bytes_left) for bytes_left in room]
        block_bytes = group.rows_per_block * group.row_nbytes
        own = [len(group) * want // sum(wanted) if any(wanted) else 0 for want in wanted]
        room = [left - count * block_bytes for left, count in zip(room, own, strict=True)]
        for _ in range(len(group) - sum(own)):
            rank = room.index(max(room))
            own[rank] += 1
            room[rank] -= block_bytes
        # The last block may be shorter than the others.
        last = max(rank for rank, count in enumerate(own) if count)
        room[last] += len(group) * block_bytes - group.rows * group.row_nbytes
        counts.append(own)
    return counts


def _room(block_map: BlockMap, world_size: int) -> list[int]:
    """Return an equal share of the bytes for every rank, minus those of the groups that it owns."""
    taken, total = [0] * world_size, 0
    for group in block_map.groups:
        if group.owner is None:
            total += group.rows * group.row_nbytes
        elif group.lazy:
            # Only the first slot, because only the owner knows the others; groups that are not lazy may be unknown.
            taken[group.owner] += group.rows * group.row_numel * group.slots[0].dtype.itemsize
    return [(total + sum(taken)) // world_size - own for own in taken]


def _part(group: Group, first: int, last: int) -> Group:
    if last - first == len(group):
        return group
    start, stop = first * group.rows_per_block, min(last * group.rows_per_block, group.rows)
    return replace(group, shape=(stop - start, *group.row_shape), first_row=group.first_row + start)
