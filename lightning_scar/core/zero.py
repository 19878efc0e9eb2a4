"""This rank's shard of a ``ZeroRedundancyOptimizer``, read without a collective.

The optimizer gives a ``state_dict()`` only after all ranks have sent their states to one. Here every rank gets the
states of its own parameters, at their places in the whole, so that the shards of all ranks add up to the whole.

What of torch this leans on and is not documented stands behind a function each, at the end.
"""

import sys
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether this is a ``ZeroRedundancyOptimizer``: each rank has the states of some parameters only.

    Works without ``torch.distributed``, too.

    Args:
        optimizer: Any optimizer.

    Example::

        >>> import torch
        >>> is_sharded(torch.optim.SGD([torch.ones(2)]))
        False

    """
    # The import takes a quarter of a second and may fail; whoever has such an optimizer has imported it.
    module = sys.modules.get("torch.distributed.optim")
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def shard_state(optimizer: Optimizer) -> dict[str, Any]:
    """The part of ``optimizer.state_dict()`` that lies on this rank. Runs no collective and copies no tensor.

    Args:
        optimizer: One that :func:`is_sharded`.

    Returns:
        ``"state"``: by the index of the parameter among those of all ranks, the live states of this rank's parameters.
        ``"param_groups"``: the same as without sharding, with the indices of all parameters. The ``"state"`` of all
        ranks in one dict, with the groups of any, is what ``load_state_dict`` takes, on any number of ranks.

    Raises:
        ValueError: If the optimizer overlaps with DDP: such a one has no state dict.

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
    """The rank whose shard holds the state of each parameter; the same on every rank.

    Args:
        optimizer: One that :func:`is_sharded`.

    Returns:
        For every parameter a rank of the optimizer's process group, even where the parameter has no state yet.

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
    """The optimizer of this rank's own parameters."""
    # With `overlap_with_ddp` there is none before the third forward, and then it is no `Optimizer`.
    local = getattr(optimizer, "optim", None)
    if not isinstance(local, Optimizer):
        raise ValueError(
            "a ZeroRedundancyOptimizer with overlap_with_ddp=True has no state dict to save; set overlap_with_ddp=False"
        )
    return local


def _owners(optimizer: Any) -> dict[Tensor, int]:
    """The partition of the parameters, which every rank works out by itself."""
    return dict(optimizer._param_to_rank)
