"""What all collectives return, for groups that ought to be alike."""

from typing import Any

import torch
import torch.distributed as dist


def results(rank: int, n: int) -> list[Any]:
    """What all collectives of the default group return."""
    own = torch.arange(4.0) + 10 * rank
    every = [torch.zeros(4) for _ in range(n)]
    found: list[Any] = []
    for name in ("sum", "max"):
        dist.all_reduce(value := own.clone(), getattr(dist.ReduceOp, name.upper()))
        found.append(value)
    dist.broadcast(value := own.clone(), 1)
    dist.all_gather(every, own)
    dist.all_gather_into_tensor(together := torch.zeros(4 * n), own)
    dist.reduce(reduced := own.clone(), 0)
    found += [value, every, together, reduced if rank == 0 else None]
    gathered = [torch.zeros(4) for _ in range(n)] if rank == 0 else None
    dist.gather(own, gathered, 0)
    dist.scatter(part := torch.zeros(4), [own + i for i in range(n)] if rank == 0 else None, 0)
    objects: list[Any] = [None] * n
    dist.all_gather_object(objects, {"rank": rank})
    dist.barrier()
    if rank == 0:
        dist.send(own, 1)
    elif rank == 1:
        dist.recv(own, 0)
    return [*found, gathered, part, objects, own]
