"""Who saves what: the blocks of a training state divided over the ranks."""

from dataclasses import replace

from lightning_scar.core.blocks import BlockMap, Group


def shares(block_map: BlockMap, world_size: int) -> list[BlockMap]:
    """Divides a map over the ranks by bytes, a map for each.

    It follows from the map and the number of ranks alone, so that ranks need not talk about it. A group that only one
    rank has as it should be is that rank's; every other is cut into one run of blocks a rank, so that all ranks see
    something of every parameter and their choices by distance come near to a common one.

    Args:
        block_map: The whole state. On ranks that hold different shards of the optimizer state only groups with an owner
            may differ: in their slots beyond the first, and those that are not lazy altogether.
        world_size: The number of ranks.

    Returns:
        The maps; together they have every block once.

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
    """How many blocks of each group each rank gets."""
    room = _room(block_map, world_size)
    counts = []
    for group in block_map.groups:
        if group.owner is not None:
            counts.append([len(group) * (rank == group.owner) for rank in range(world_size)])
            continue
        # Of what is left, not of the whole: what one group's blocks do not divide evenly the next ones make up for.
        wanted = [max(0, bytes_left) for bytes_left in room]
        block_bytes = group.rows_per_block * group.row_nbytes
        own = [len(group) * want // sum(wanted) if any(wanted) else 0 for want in wanted]
        room = [left - count * block_bytes for left, count in zip(room, own, strict=True)]
        for _ in range(len(group) - sum(own)):
            rank = room.index(max(room))
            own[rank] += 1
            room[rank] -= block_bytes
        # The last block is shorter than the others.
        last = max(rank for rank, count in enumerate(own) if count)
        room[last] += len(group) * block_bytes - group.rows * group.row_nbytes
        counts.append(own)
    return counts


def _room(block_map: BlockMap, world_size: int) -> list[int]:
    """An equal share of the bytes for every rank, less those of groups that are its own from the start."""
    taken, total = [0] * world_size, 0
    for group in block_map.groups:
        if group.owner is None:
            total += group.rows * group.row_nbytes
        elif group.lazy:
            # The first slot only: of the others only the owner knows. And of what is not lazy not even that.
            taken[group.owner] += group.rows * group.row_numel * group.slots[0].dtype.itemsize
    return [(total + sum(taken)) // world_size - own for own in taken]


def _part(group: Group, first: int, last: int) -> Group:
    if last - first == len(group):
        return group
    start, stop = first * group.rows_per_block, min(last * group.rows_per_block, group.rows)
    return replace(group, shape=(stop - start, *group.row_shape), first_row=group.first_row + start)
