"""What a training has frozen is not forgotten by the wrapper, nor unknown to a replacement."""

import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_scar.continuation.model_modes import modes, set_modes
from lightning_scar.continuation.wrappers import Wrappers


def gradient_after_thaw(rank: int) -> float:
    """A layer is frozen while the wrapper is made anew. Returns its gradient afterwards."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    wrappers = Wrappers([ddp])
    net[0].requires_grad_(False)
    wrappers.unwrap()
    wrappers.wrap()
    assert not net[0].weight.requires_grad
    net[0].requires_grad_(True)
    ddp(torch.full((1, 1), float(rank))).sum().backward()
    return float(net[0].weight.grad)


def test_what_was_frozen_for_a_while_is_reduced_again() -> None:
    assert run_ranks(gradient_after_thaw, 2) == [0.5, 0.5]


def test_modes() -> None:
    net, twin = (nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)) for _ in range(2))
    net[0].requires_grad_(False)
    net[1].eval()
    set_modes(twin, modes(net))
    assert [parameter.requires_grad for parameter in twin.parameters()] == [False, False, True, True]
    assert [each.training for each in twin.modules()] == [True, True, False]
