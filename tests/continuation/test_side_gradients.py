"""Gradients of other batches come into a step's one reduction, whatever kind of DDP makes it."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from lightning_scar.continuation.side_gradients import SideGradients


class Net(nn.Module):
    """Uses a layer or not, and has one that nothing uses."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        if unused:
            self.d = nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor, uses_b: bool = True) -> Tensor:
        hidden = self.a(x)
        return self.c(hidden + self.b(x) if uses_b else hidden).square().mean()


def train(rank: int, options: dict[str, Any], hook: bool) -> float:
    """Two of three workers; the first computes the third one's batch. Returns the largest error of a gradient."""
    unused = bool(options.get("find_unused_parameters"))
    net, twin = Net(unused), Net(unused)
    ddp = DistributedDataParallel(net, **options)
    if hook:
        ddp.register_comm_hook(None, fp16_compress_hook)
    side, error = SideGradients(net), 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):
        x = torch.randn(3, 2, 5, 4, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        with ddp.no_sync():
            ddp(x[rank, 0], not unused).backward()
        # Not the first time, because the wrapper of a static graph would learn it.
        if rank == 0:
            for batch in x[2]:
                with side.collecting(weight=0.5):
                    net(batch).div(0.5).backward()
                    clip_grad_norm_(net.parameters(), 1e-9)
        with side.added(scale=2 / 3):
            ddp(x[rank, 1], not unused).backward()
        twin.load_state_dict(net.state_dict())
        twin.zero_grad()
        own = [twin(batch, not unused) for batches in x[:2] for batch in batches]
        ((sum(own) + twin(x[2, 0]) + twin(x[2, 1])) / 3).backward()
        for (name, parameter), expected in zip(net.named_parameters(), twin.parameters(), strict=True):
            assert (parameter.grad is None) == (expected.grad is None), name
            if parameter.grad is not None and expected.grad is not None:
                error = max(error, float((parameter.grad - expected.grad).abs().max()))
        optimizer.step()
    return error


@pytest.mark.parametrize(
    ("options", "hook"),
    [
        ({}, False),
        ({"find_unused_parameters": True}, False),
        ({"gradient_as_bucket_view": True}, False),
        ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, False),
        ({}, True),
    ],
)
def test_the_gradient_is_the_mean_over_all_workers(options: dict[str, Any], hook: bool) -> None:
    errors = run_ranks(train, 2, options, hook)
    # Half precision on the way rounds.
    assert max(errors) <= (1e-2 if hook else 1e-14)


def test_sparse_gradients_and_several_passes() -> None:
    def loss(embedding: nn.Embedding, *ids: int) -> Tensor:
        return embedding(torch.tensor(ids)).square().sum()

    embedding = nn.Embedding(5, 2, sparse=True)
    expected = nn.Embedding(5, 2)
    expected.load_state_dict(embedding.state_dict())
    side = SideGradients(embedding)
    embedding.weight.grad = before = torch.sparse_coo_tensor(torch.tensor([[4]]), torch.ones(1, 2), (5, 2))
    with side.collecting(weight=0.5):
        loss(embedding, 1, 2).backward()
        loss(embedding, 2).backward()
    assert embedding.weight.grad is before
    with side.collecting(weight=0):
        loss(embedding, 3).backward()
    with side.added(scale=2):
        loss(embedding, 0, 1).backward()
    (loss(expected, 1, 2, 2) + 2 * loss(expected, 0, 1)).backward()
    assert embedding.weight.grad is not None
    assert expected.weight.grad is not None
    expected.weight.grad[4] += 2
    assert torch.allclose(embedding.weight.grad.to_dense(), expected.weight.grad)
