"""What one card cannot show, and what to run where there are more."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What needs more than one card.

    Attributes:
        what: It.
        command: What shows it. With as many cards as ranks each rank has one, and parts share none.

    """

    what: str
    command: str


MORE_CARDS = (
    Need(
        "NCCL between cards (NVLink, PCIe): a peer that dies or hangs while a kernel of another card waits for it",
        "CUDA_VISIBLE_DEVICES=0,1 python -m tests.gpu --parts machine trainer-nccl hang-nccl",
    ),
    Need(
        "the same in a loop, of three ranks",
        "CUDA_VISIBLE_DEVICES=0,1,2 python -m tests.gpu --parts machine loop-nccl",
    ),
    Need(
        "an error of one card while others compute, and replacements on that card",
        "CUDA_VISIBLE_DEVICES=0,1 python -m tests.gpu --parts machine broken-device",
    ),
)
