"""Decodes refreshes into the tensors that hold their bases."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.blocks import Group, rows
from lightning_scar.core.codec import Codec, decode
from lightning_scar.storage.delta import Refresh

#: Values decoded at once: enough for torch operations to use all cores. Python threads would wait for the GIL.
_AT_ONCE = 1 << 20


def decode_into(found: Sequence[tuple[Group, Refresh, Sequence[int]]], targets: Mapping[str, Sequence[Tensor]]) -> None:
    """Decode refreshes.

    The first slot is a difference to the base, added in the wider of its data type and float32. The others replace the
    present values.

    Args:
        found: The whole group, its refresh, and the positions in the refresh of the wanted blocks, ascending.
        targets: The tensors of each group, by name: on the CPU, contiguous, one per slot. They hold the bases.

    """
    for group, refresh, places in found:
        stretches = list(_stretches(refresh, places, group.row_numel))
        for i, (slot, target) in enumerate(zip(group.slots, targets[group.name], strict=True)):
            for stretch in stretches if slot.name in refresh.slots else ():
                _decode(refresh, slot.name, rows(target), stretch, is_difference=i == 0)


class _Stretch(NamedTuple):
    """Blocks of one size, adjacent in the refresh and in the tensor: first position, count, first row, last row + 1."""

    place: int
    blocks: int
    start: int
    stop: int


def _stretches(refresh: Refresh, places: Sequence[int], row_numel: int) -> Iterator[_Stretch]:
    at: _Stretch | None = None
    for place in places:
        start, stop = refresh.spans[place]
        if at is not None:
            size = (at.stop - at.start) // at.blocks
            follows = (place, start, stop - start) == (at.place + at.blocks, at.stop, size)
            if follows and (stop - at.start) * row_numel <= _AT_ONCE:
                at = at._replace(blocks=at.blocks + 1, stop=stop)
                continue
            yield at
        at = _Stretch(place, 1, start, stop)
    if at is not None:
        yield at


@torch.no_grad()
def _decode(refresh: Refresh, slot: str, target: Tensor, stretch: _Stretch, is_difference: bool) -> None:
    encoded, into = refresh.slots[slot], target[stretch.start : stretch.stop].view(stretch.blocks, -1)
    codec, n = Codec.parse(encoded.codec), into.shape[1]
    # Only the last block of a refresh may be shorter than the others.
    whole = (refresh.spans[0][1] - refresh.spans[0][0]) * target[0].numel()
    codes = _rows(encoded.codes[0], stretch, codec.code_bytes(whole), codec.code_bytes(n))
    scales = _rows(encoded.scales[0], stretch, 2 * codec.scale_count(whole), 2 * codec.scale_count(n))
    is_direct = into.dtype == torch.float32 and not is_difference
    values = decode(codec, codes, scales.view(torch.bfloat16), n, out=into if is_direct else None)
    if is_difference:
        into.copy_(into.to(torch.promote_types(into.dtype, torch.float32)).add_(values))
    elif not is_direct:
        into.copy_(values)


def _rows(data: memoryview, stretch: _Stretch, of_whole: int, of_each: int) -> Tensor:
    start = stretch.place * of_whole
    return torch.frombuffer(data[start : start + stretch.blocks * of_each], dtype=torch.uint8).view(stretch.blocks, -1)
