"""Which blocks to save under a byte budget. Pure functions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The blocks that may be saved; each tensor has one element per block.

    Attributes:
        distance: L2 distance to the base, float64; ``inf`` where the last write failed.
        nbytes: Bytes of the block over all slots, int64.
        age: Steps since the block was last saved, int64.
        step: The current optimizer step.
        preconditioner: How steep the loss is in the block, relative to the others, float64; see
            :func:`~lightning_scar.core.preconditioner.preconditioners`.

    """

    distance: Tensor
    nbytes: Tensor
    age: Tensor
    step: int
    preconditioner: Tensor

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.distance)

    def of(self, blocks: Tensor) -> "Candidates":
        """Return some of the candidates, by number."""
        nbytes, age, steep = self.nbytes[blocks], self.age[blocks], self.preconditioner[blocks]
        return Candidates(self.distance[blocks], nbytes, age, self.step, steep)


#: Gives every block a priority (any real dtype, shape ``(blocks,)``); the highest is saved first.
Policy = Callable[[Candidates], Tensor]


def distance(candidates: Candidates) -> Tensor:
    """Prefer blocks that moved furthest: squared distance per byte, in the metric of the optimizer's preconditioner.

    This greedily minimizes the distance that is left between the live state and the running checkpoint. If all blocks
    have the same size and the optimizer has no preconditioner (SGD), it is the paper's priority (SCAR, section 4.2).
    Plain distance per byte would always favor small blocks: a block four times the size that moves alike is only twice
    as far away.

    Example::

        >>> moved, nbytes, age = torch.tensor([2.0, 4.0]), torch.tensor([1, 4]), torch.tensor([5, 5])
        >>> distance(Candidates(moved, nbytes, age, step=9, preconditioner=torch.tensor([1.0, 0.5])))
        tensor([4., 2.])

    """
    return candidates.preconditioner * candidates.distance.square() / candidates.nbytes


def round_robin(candidates: Candidates) -> Tensor:
    """Prefer blocks that waited longest (the paper's baseline).

    Example::

        >>> waited = Candidates(torch.zeros(2), torch.ones(2), torch.tensor([5, 8]), 9, torch.ones(2))
        >>> round_robin(waited)
        tensor([5, 8])

    """
    return candidates.age


def random(candidates: Candidates) -> Tensor:
    """Prefer random blocks, the same for the same step (the paper's baseline)."""
    # A separate generator: drawing from the global one would change the training.
    generator = torch.Generator("cpu").manual_seed(candidates.step)
    return torch.rand(len(candidates), dtype=torch.float32, device="cpu", generator=generator)


POLICIES: dict[str, Policy] = {"distance": distance, "round_robin": round_robin, "random": random}


def select(
    candidates: Candidates, policy: Policy, budget: int, max_age: int | None = None, patient: bool = False
) -> Tensor:
    """Choose blocks greedily, highest priority first, as long as they fit in the budget.

    Blocks older than ``max_age`` come before all others, the oldest first. Ties go to the older block.

    Args:
        candidates: The blocks that may be saved.
        policy: Gives the priorities.
        budget: Bytes to spend.
        max_age: Steps after which a block is due whatever its priority; ``None`` for never.
        patient: Whether to choose nothing while the first block does not fit, so that it does not wait forever.

    Returns:
        Indices of the chosen blocks, int64, best first. Their bytes never exceed the budget.

    Raises:
        ValueError: If the policy does not return one priority per block.

    Example::

        >>> moved, nbytes, age = torch.tensor([[1.0, 9.0, 5.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]])
        >>> select(Candidates(moved, nbytes, age, 7, torch.ones(3)), distance, budget=8)
        tensor([1, 2])

    """
    priority = policy(candidates)
    if tuple(priority.shape) != (len(candidates),):
        raise ValueError(
            f"the policy {policy!r} returned shape {tuple(priority.shape)} for {len(candidates)} blocks; "
            "it must return one priority per block"
        )
    age = candidates.age.to(torch.float64)
    overdue = age > max_age if max_age is not None else torch.zeros_like(age, dtype=torch.bool)
    order = age.argsort(descending=True, stable=True)
    for key in (torch.where(overdue, age, priority.to(torch.float64)), overdue.to(torch.int8)):
        order = order[key[order].argsort(descending=True, stable=True)]
    if patient and len(order) and int(candidates.nbytes[order[0]]) > budget:
        return order[:0]
    return _fill(order, candidates.nbytes, budget)


def _fill(order: Tensor, nbytes: Tensor, budget: int) -> Tensor:
    if not len(order):
        return order
    smallest = int(nbytes.min())
    chosen = []
    for block, size in zip(order.tolist(), nbytes[order].tolist(), strict=True):
        if size <= budget:
            chosen.append(block)
            budget -= size
            if budget < smallest:
                break
    return torch.tensor(chosen, dtype=torch.int64, device="cpu")
