"""What a refresh is made of: how many bits each slot of each group gets, within the share of the state of a save."""

from collections.abc import Mapping, Sequence

import torch

from lightning_scar.core.blocks import Group
from lightning_scar.core.codec import Codec

#: What is encoded: other values are exact, or are no numbers at all.
_ENCODED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def plan(
    groups: Sequence[Group], state_bytes: int, negative: Mapping[tuple[str, str], bool], fraction: float
) -> dict[str, dict[str, Codec]]:
    """Divides what a save may write between exact blocks and a refresh of all others.

    Args:
        groups: Those that change.
        state_bytes: Bytes of the whole share of the state.
        negative: For each slot by the names of its group and its own, whether it has held negative values.
        fraction: The share of the state's bytes that a save may write.

    Returns:
        The codecs, by group and slot. A slot that is not in it is not refreshed.

    """
    if fraction >= 1:
        return {}
    found = {}
    for group in groups:
        if not group.lazy or group.row_nbytes * group.rows < 512:
            continue
        codecs = {}
        for slot in group.slots:
            if slot.dtype not in _ENCODED:
                continue
            if slot is group.slots[0]:
                codecs[slot.name] = Codec("linear", 4 if len(group.slots) > 1 else 2)
            elif (group.name, slot.name) in negative:
                codecs[slot.name] = Codec(
                    "linear" if negative[group.name, slot.name] else "log", 4 if negative[group.name, slot.name] else 2
                )
        if group.slots[0].name in codecs:
            found[group.name] = codecs
    return found
