"""Reads this rank's shard of a ``ZeroRedundancyOptimizer`` without a collective.

The optimizer's own ``state_dict()`` works only after all ranks have sent their states to one. Here every rank gets the
states of its own parameters, under their global indices, so that the shards of all ranks add up to the whole.

Each undocumented part of torch that this uses is wrapped in a function at the end.
"""

import sys
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def is_sharded(optimizer: Optimizer) -> bool:
    """Return whether this is a ``ZeroRedundancyOptimizer``, with the states of some parameters on each rank.

    Works without ``torch.distributed``, too.

    Args:
        optimizer: Any optimizer.

    Example::

        >>> import torch
        >>> is_sharded(torch.optim.SGD([torch.ones(2)]))
        False

    """
    # Do not import it, which takes 0.25 s and may fail: if such an optimizer exists, it is imported already.
    module = sys.modules.get("torch.distributed.optim")
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def shard_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return this rank's part of ``optimizer.state_dict()``. Runs no collective and copies no tensor.

    Args:
        optimizer: One that :func:`is_sharded`.

    Returns:
        ``"state"``: the live states of this rank's parameters, by their indices among those of all ranks.
        ``"param_groups"``: the same as without sharding, with the indices of all parameters. ``load_state_dict``
        accepts the ``"state"`` of all ranks in one dict with any rank's groups, on any number of ranks.

    Raises:
        ValueError: If the optimizer overlaps with DDP, because it then has no state dict.

    Example::

        >>> import torch, torch.distributed as dist
        >>> from torch.distributed.optim import ZeroRedundancyOptimizer
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = ZeroRedundancyOptimizer([weight], torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> shard_state(optimizer)["state"]
        {0: {'momentum_buffer': tensor([1., 1.])}}
        >>> dist.destroy_process_group()

    """
    local = _local_optimizer(optimizer)
    state = local.state_dict()
    groups = Optimizer.state_dict(optimizer)["param_groups"]
    index = dict(zip(_parameters(optimizer), chain.from_iterable(group["params"] for group in groups), strict=True))
    local_ids = chain.from_iterable(group["params"] for group in state["param_groups"])
    owned = dict(zip(local_ids, _parameters(local), strict=True))
    by_index = {index[owned[i]]: values for i, values in state["state"].items()}
    return {"state": dict(sorted(by_index.items())), "param_groups": groups}


def shard_owner(optimizer: Optimizer) -> dict[Tensor, int]:
    """Return the rank whose shard holds the state of each parameter; the same on every rank.

    Args:
        optimizer: One that :func:`is_sharded`.

    Returns:
        A rank of the optimizer's process group for every parameter, even if it has no state yet.

    Raises:
        ValueError: If the optimizer overlaps with DDP.

    Example::

        >>> import torch, torch.distributed as dist
        >>> from torch.distributed.optim import ZeroRedundancyOptimizer
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> shard_owner(ZeroRedundancyOptimizer([weight], torch.optim.SGD, lr=0.1))[weight]
        0
        >>> dist.destroy_process_group()

    """
    _local_optimizer(optimizer)
    return _owners(optimizer)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _local_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer of this rank's own parameters."""
    # With `overlap_with_ddp` it does not exist before the third forward, and is no `Optimizer` after it.
    local = getattr(optimizer, "optim", None)
    if not isinstance(local, Optimizer):
        raise ValueError(
            "a ZeroRedundancyOptimizer with overlap_with_ddp=True has no state dict to save; set overlap_with_ddp=False"
        )
    return local


def _owners(optimizer: Any) -> dict[Tensor, int]:
    """Return the partition of the parameters, which every rank computes by itself."""
    return dict(optimizer._param_to_rank)
