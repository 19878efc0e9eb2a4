"""How steep the loss is in each block, as far as the optimizer's state tells."""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from lightning_scar.core.blocks import Group

#: Means or sums of squared gradients: of Adam and its variants, of RMSprop and Adadelta, of Adagrad.
_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
#: A lower bound, so that blocks that move only by weight decay are saved eventually.
_LEAST = 1e-3
#: Elements sampled per block, from other rows at each step: reading all would make scoring take 50 % longer.
_SAMPLE = 2048


def squares_slot(group: Group) -> int | None:
    """Return the number of the slot with squared gradients; ``None`` if the optimizer keeps none."""
    found = (i for i, slot in enumerate(group.slots) if slot.name in _SECOND_MOMENTS and slot.dtype.is_floating_point)
    return next(found, None)


def sampled_squares(blocks: Tensor, step: int) -> Tensor:
    """Return the mean squared gradient of every block, from a sample of its rows.

    Args:
        blocks: Squared gradients, shape ``(blocks, rows, ...)``.
        step: The current optimizer step; it seeds the choice of rows.

    Returns:
        float32, one element per block, on the tensor's device.

    """
    wanted = -(-_SAMPLE // blocks[0, 0].numel())
    stride = max(1, blocks.shape[1] // wanted)
    # Not `step % stride`: steps of saves are multiples of the interval, which may itself be a multiple of the stride.
    first = Random(step).randrange(stride)
    return blocks[:, first::stride].mean(tuple(range(1, blocks.dim())), dtype=torch.float32)


def preconditioners(groups: Sequence[Group], squares: Tensor) -> Tensor:
    r"""Return the relative preconditioner of every block: :math:`\sqrt{v}`, where :math:`v` is its mean over the block.

    Adam's step is :math:`\delta = \eta P^{-1} m` with :math:`P = \operatorname{diag}(\sqrt{v})` (Kingma and Ba, ICLR
    2015, algorithm 1), so to first order it lowers the loss by :math:`m^T \delta = \delta^T P \delta / \eta`: of two
    blocks that moved equally far, the one with the larger gradients loses more. Adam moves all elements by about the
    same amount, so their distance alone says little.

    Args:
        groups: The groups.
        squares: The mean squared gradient of every block, group after group, from :func:`sampled_squares`; float64,
            NaN where there are none.

    Returns:
        float64, one element per block, group after group; at least 0.001. The mean is 1 over the blocks whose
        optimizers keep the same kind of squared gradients; blocks without any get 1. Assumes equal learning rates.

    Example::

        >>> from lightning_scar.core.blocks import Slot
        >>> slots = tuple(Slot(word, torch.float32, None, ()) for word in ("param", "exp_avg_sq"))
        >>> weight = Group("weight", (3, 2), slots, rows_per_block=1)
        >>> live = [torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [4.0, 4.0], [9.0, 9.0]])]
        >>> preconditioners([weight], sampled_squares(live[1], step=1).double())
        tensor([0.5000, 1.0000, 1.5000], dtype=torch.float64)

    """
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64, device="cpu")
    kinds = torch.tensor([_kind(group) for group in groups], dtype=torch.int64, device="cpu").repeat_interleave(sizes)
    roots = squares.sqrt()
    found = torch.ones_like(roots)
    for kind in range(len(_SECOND_MOMENTS)):
        known = (kinds == kind) & roots.isfinite()
        mean = roots[known].mean()
        if mean > 0:
            found[known] = (roots[known] / mean).clamp(min=_LEAST)
    return found


def _kind(group: Group) -> int:
    """Return the kind of squared gradients that the optimizer keeps for the group; -1 for none."""
    slot = squares_slot(group)
    return -1 if slot is None else _SECOND_MOMENTS.index(group.slots[slot].name)
