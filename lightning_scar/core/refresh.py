"""What a refresh is made of: how many bits each slot of each group gets, within the share of the state of a save."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lightning_scar.core.blocks import Group
from lightning_scar.core.codec import Bits, Codec
from lightning_scar.core.save import code_bytes

#: What is encoded: other values are exact, or are no numbers at all.
_ENCODED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: The share of a save that exact blocks need at least, or bases would grow too old for their differences.
_LEAST_EXACT = 0.1


class _Split(NamedTuple):
    """Bits of a parameter, of optimizer state with a sign, and of state that is never negative; ``None`` for none."""

    parameter: Bits
    signed: Bits | None
    positive: Bits | None


#: Buffers that fit in this share of a save are always exact. What changes outside of the optimizer has no refresh.
ALWAYS_EXACT = 1 / 4

#: The best first. State is refreshed as a whole or not at all: a first moment of now over a second one of long ago
#: makes steps that are far too long.
_SPLITS = (_Split(8, 8, 8), _Split(4, 4, 4), _Split(4, 2, 4), _Split(2, 2, 4), _Split(2, None, None))


def plan(
    groups: Sequence[Group], state_bytes: int, negative: Mapping[tuple[str, str], bool], fraction: float
) -> dict[str, dict[str, Codec]]:
    """Divides what a save may write between exact blocks and a refresh of all others.

    It goes by data type, shape and sign, not by the name of the optimizer.

    Args:
        groups: Those that change.
        state_bytes: Bytes of this rank's share of the state.
        negative: For each slot by the names of its group and its own, whether it holds negative values; one that is not
            in it is not known yet, and its group's state is not refreshed.
        fraction: The share of the state's bytes that a save may write.

    Returns:
        The codecs, by group and slot; what is not in it is not refreshed. Empty where nothing fits, or all is exact.

    Example::

        >>> from lightning_scar.core.blocks import Slot
        >>> slots = tuple(Slot(name, torch.float32, None, ()) for name in ("param", "exp_avg", "exp_avg_sq"))
        >>> weight = Group("w", (1024, 1024), slots, rows_per_block=8, lazy=True)
        >>> signs = {("w", "exp_avg"): True, ("w", "exp_avg_sq"): False}
        >>> {slot: codec.name for slot, codec in plan([weight], 12 << 20, signs, fraction=1 / 8)["w"].items()}
        {'param': 'linear4', 'exp_avg': 'linear2', 'exp_avg_sq': 'log4'}

    """
    whole, restless = fraction * state_bytes, sum(group.rows * group.row_nbytes for group in groups if not group.lazy)
    budget = whole * (1 - _LEAST_EXACT) - (restless if restless <= whole * ALWAYS_EXACT else 0)
    for split in _SPLITS if fraction < 1 else ():
        found = {group.name: _codecs(group, negative, split) for group in groups if group.lazy}
        if sum(_nbytes(group, found.get(group.name, {})) for group in groups) <= budget:
            return {name: codecs for name, codecs in found.items() if codecs}
    return {}


def _codecs(group: Group, negative: Mapping[tuple[str, str], bool], split: _Split) -> dict[str, Codec]:
    parameter, *state = group.slots
    if parameter.dtype not in _ENCODED:
        return {}
    codecs = {parameter.name: Codec("linear", split.parameter)}
    signs = [negative.get((group.name, slot.name)) for slot in state]
    if split.signed is None or split.positive is None or None in signs:
        return codecs
    kinds = [Codec("linear", split.signed) if sign else Codec("log", split.positive) for sign in signs]
    return codecs | {slot.name: codec for slot, codec in zip(state, kinds, strict=True) if slot.dtype in _ENCODED}


def _nbytes(group: Group, codecs: Mapping[str, Codec]) -> int:
    return sum(sum(sizes) for codec in codecs.values() for sizes in code_bytes(codec, group))
