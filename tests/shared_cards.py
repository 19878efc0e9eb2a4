"""For a Trainer that has more workers than there are cards."""

from lightning.pytorch.accelerators import CUDAAccelerator
from scar_cards import card_of
from typing_extensions import override


class SharedCards(CUDAAccelerator):
    """As many devices as are asked for, on the cards that there are.

    Example::

        >>> SharedCards.get_parallel_devices([0, 0])
        [device(type='cuda', index=0), device(type='cuda', index=0)]

    """

    @staticmethod
    @override
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        assert isinstance(devices, int)
        return [card_of(slot) for slot in range(devices)]
