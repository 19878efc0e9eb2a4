"""Plans a refresh: how many bits each slot of each group gets, within the byte budget of a save."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lightning_scar.core.blocks import Group
from lightning_scar.core.codec import Bits, Codec

#: The data types that a refresh encodes.
_ENCODED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: The least share of a save for exact blocks; otherwise bases become too old and differences to them too large.
_LEAST_EXACT = 0.1


class _Split(NamedTuple):
    """Bits of a parameter, of optimizer state with a sign, and of state that is never negative; ``None`` for none."""

    parameter: Bits
    signed: Bits | None
    positive: Bits | None


#: Buffers that fit in this share of a save are always exact. What changes outside of optimizer steps has no refresh.
ALWAYS_EXACT = 1 / 4

#: The best first. Either all optimizer state is refreshed or none: a recent first moment over an old second moment
#: would make steps far too long.
_SPLITS = (_Split(8, 8, 8), _Split(4, 4, 4), _Split(4, 2, 4), _Split(2, 2, 4), _Split(2, None, None))


def plan(
    groups: Sequence[Group], state_bytes: int, negative: Mapping[tuple[str, str], bool], fraction: float
) -> dict[str, dict[str, Codec]]:
    """Divide the budget of a save between exact blocks and a refresh of all others.

    Depends on data types, shapes and signs, not on the name of the optimizer.

    Args:
        groups: The groups that change.
        state_bytes: Bytes of this rank's share of the state.
        negative: Whether a slot holds negative values, by the names of group and slot. If one is missing, it is not
            known yet, and its group's optimizer state is not refreshed.
        fraction: The share of the state's bytes that a save may write.

    Returns:
        The codecs, by group and slot; other slots are not refreshed. Empty if nothing fits or everything is exact.

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
    return sum(
        count * (codec.code_bytes(n) + 2 * codec.scale_count(n))
        for codec in codecs.values()
        for count, n in group.sizes
    )
