"""Which blocks are measured and encoded together: models have hundreds of small tensors with few block sizes."""

from collections.abc import Mapping, Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.bases import Base
from lightning_scar.core.blocks import BlockMap, rows
from lightning_scar.core.codec import Codec
from lightning_scar.core.devices import HostBuffer
from lightning_scar.core.preconditioner import squares_slot
from lightning_scar.core.rows import pieces
from lightning_scar.core.save import Codes, Part
from lightning_scar.core.threads import batches

#: The codes and scales of a pass in host memory: shapes ``(blocks, bytes)`` and ``(blocks, scales)``.
CodeMemory = tuple[Tensor, Tensor]
#: Tensors up to this size in bytes share a pass, until it has this size; a larger one gets its own.
_SMALL = 1 << 20


class Kind(NamedTuple):
    """What blocks must share to be in one pass.

    Attributes:
        codec: How to encode them, if at all.
        is_compared: Whether to measure how far they are from their bases.
        has_squares: Whether they are squared gradients.
        n: The number of values in a block.
        dtype: Their data type.
        device: Where they are.
        is_small: Whether a pass of their own would mostly be overhead.

    """

    codec: Codec | None
    is_compared: bool
    has_squares: bool
    n: int
    dtype: torch.dtype
    device: torch.device
    is_small: bool


class Member(NamedTuple):
    """Blocks of one size in one slot of a group.

    Attributes:
        group: The number of the group.
        slot: The number of the slot.
        piece: The number of the block size in the group.
        first: The number of the first block in the map.
        blocks: How many there are.

    """

    group: int
    slot: int
    piece: int
    first: int
    blocks: int


class Pass(NamedTuple):
    """Blocks that are measured and encoded together.

    Attributes:
        kind: What they have in common.
        members: Where they come from.
        numbers: Their numbers in the map: int64, on their device.

    """

    kind: Kind
    members: list[Member]
    numbers: Tensor

    def live(self, parts: Sequence[tuple[Part, Base]]) -> Tensor:
        """Return the present values, with a block per item of the first dimension."""
        return self._joined(parts, [parts[each.group][0].live[each.slot] for each in self.members])

    def bases(self, parts: Sequence[tuple[Part, Base]]) -> Tensor | None:
        """Return the values of the bases in the same form; ``None`` if they are not compared."""
        values = [parts[each.group][1].values for each in self.members] if self.kind.is_compared else []
        return self._joined(parts, [rows(each) for each in values if each is not None]) if values else None

    def _joined(self, parts: Sequence[tuple[Part, Base]], tensors: Sequence[Tensor]) -> Tensor:
        found = [
            next(islice(pieces(tensor, parts[each.group][0].group), each.piece, None)).blocks
            for each, tensor in zip(self.members, tensors, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat([blocks.flatten(1) for blocks in found])


def plan_passes(
    block_map: BlockMap,
    parts: Sequence[tuple[Part, Base]],
    codecs: Mapping[str, Mapping[str, Codec]],
    full: bool = False,
) -> list[Pass]:
    """Plan the passes over all groups. They stay the same while the map, the codecs and the kinds of bases do.

    Args:
        block_map: The map.
        parts: Its groups, each with its base.
        codecs: The codecs, by group and slot.
        full: Whether to check only for non-finite values and changes of frozen groups; other distances are infinite.

    """
    alike: dict[Kind, list[Member]] = {}
    for g, ((part, base), start) in enumerate(zip(parts, block_map.offsets, strict=False)):
        group, own, squares = part.group, codecs.get(part.group.name, {}), None if full else squares_slot(part.group)
        for i, (slot, live) in enumerate(zip(group.slots, part.live, strict=True)):
            codec, is_looked_at = own.get(slot.name), i == 0 and base.values is not None
            if codec is None and i != squares and not is_looked_at:
                continue
            first, is_compared = start, is_looked_at and (group.frozen or not full)
            for piece, (count, n) in enumerate(group.sizes):
                is_small = count * n * live.dtype.itemsize <= _SMALL
                kind = Kind(codec, is_compared, i == squares, n, live.dtype, live.device, is_small)
                alike.setdefault(kind, []).append(Member(g, i, piece, first, count))
                first += count
    return [
        Pass(kind, members, _numbers(members, kind.device))
        for kind, found in alike.items()
        for members in batches(found, attrgetter("blocks"), -(-_SMALL // (kind.n * kind.dtype.itemsize)))
    ]


def _numbers(members: Sequence[Member], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(each.first, each.first + each.blocks, device=device) for each in members])


def provide_codes(passes: Sequence[Pass], parts: Sequence[Part], buffer: HostBuffer) -> list[CodeMemory | None]:
    """Take memory for the codes of each pass, ``None`` without a codec, and tell the parts where theirs will be."""
    found: list[CodeMemory | None] = []
    for kind, members, numbers in passes:
        if kind.codec is None:
            found.append(None)
            continue
        count = len(numbers)
        codes = buffer.take(count * kind.codec.code_bytes(kind.n)).view(count, -1)
        scales = buffer.take(2 * count * kind.codec.scale_count(kind.n)).view(torch.bfloat16).view(count, -1)
        found.append((codes, scales))
        done = 0
        for member in members:
            own, span = parts[member.group], slice(done, done := done + member.blocks)
            slot = own.group.slots[member.slot].name
            own.codes.setdefault(slot, Codes(kind.codec)).pieces[member.piece] = codes[span], scales[span]
    return found
