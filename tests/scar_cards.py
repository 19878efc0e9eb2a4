"""Where the scripts of ``scar_ddp_runs`` train: on the CPU, or on cards, which they share where there are too few."""

import os
from typing import Any

import torch

#: ``cpu`` or ``cuda``.
DEVICE = os.environ.get("SCAR_TESTS_DEVICE", "cpu")
#: The first NCCL that lets ranks share a card.
_SHARES_CARDS = (2, 30)


def card_of(slot: int) -> int:
    """The card of a worker."""
    return slot % torch.cuda.device_count()


def accelerator() -> Any:
    """What the Trainer gets."""
    if DEVICE == "cpu":
        return "cpu"
    from shared_cards import SharedCards

    return SharedCards()


def share_cards(slot: int, ranks: int) -> None:
    """Lets workers that have one card form a group over NCCL, too; to be called before there is one."""
    if DEVICE == "cpu" or ranks <= torch.cuda.device_count():
        return
    if torch.cuda.nccl.version()[:2] >= _SHARES_CARDS:  # type: ignore[no-untyped-call]
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    else:
        # To NCCL each is on a host of its own.
        os.environ["NCCL_HOSTID"] = f"slot-{slot}"


def take_a_card(slot: int) -> None:
    """Makes a card that is there that of a loop, which takes the one of its local rank."""
    if DEVICE != "cpu":
        os.environ["LOCAL_RANK"] = str(card_of(slot))


def break_device() -> None:
    """An error of the device that stays: whatever this process asks of it fails from now on."""
    if DEVICE == "cpu":
        raise RuntimeError("CUDA error: device-side assert triggered")
    values = torch.zeros(1, device="cuda")
    values[torch.tensor([7], device="cuda")] += 1
    torch.cuda.synchronize()
