"""What the optimizer knows of how steep the loss is in each block."""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from lightning_scar.core.blocks import Group
from lightning_scar.core.rows import pieces

#: State that is a mean or a sum of squared gradients: of Adam and its kin, of RMSprop and Adadelta, of Adagrad.
_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
#: What moves without gradients, by weight decay, must not wait for ever.
_LEAST = 1e-3
#: Elements of a block that are looked at, in other rows at each step: to read all makes scoring half as long again.
_SAMPLE = 2048


def sampled_squares(group: Group, live: Sequence[Tensor], step: int) -> Tensor:
    """The mean squared gradient of every block, from a sample of its rows.

    Args:
        group: The group.
        live: Its tensors as rows, one a slot.
        step: The present optimizer step: which rows of a large block stand for all of it.

    Returns:
        float32, one element a block, on the tensors' device; NaN where the optimizer keeps no squared gradients.

    """
    squares = [tensor for slot, tensor in zip(group.slots, live, strict=True) if slot.name in _SECOND_MOMENTS]
    if not squares or not squares[0].is_floating_point():
        return torch.full((len(group),), torch.nan, device=live[0].device)
    return torch.cat([_sampled_mean(blocks, step) for _, blocks in pieces(squares[0], group)])


def preconditioners(groups: Sequence[Group], squares: Tensor) -> Tensor:
    r"""The preconditioner of every block, relative to the others: :math:`\sqrt{v}`, with the mean of :math:`v` over it.

    Adam's step is :math:`\delta = \eta P^{-1} m` with :math:`P = \operatorname{diag}(\sqrt{v})` (Kingma and Ba, ICLR
    2015, algorithm 1), so to first order it lowers the loss by :math:`m^T \delta = \delta^T P \delta / \eta`: of two
    blocks that moved equally far, the one with the larger gradients has more to lose. Adam moves all elements about
    alike, so that their distance alone tells little.

    Args:
        groups: The groups.
        squares: The mean squared gradient of every block, group after group, from :func:`sampled_squares`; float64.

    Returns:
        float64, one element a block, group after group. 1 in the mean over the blocks whose optimizers keep squared
        gradients in the same way, at least 0.001, and 1 where there are none. Learning rates are taken to be alike.

    Example::

        >>> from lightning_scar.core.blocks import Slot
        >>> slots = tuple(Slot(word, torch.float32, None, ()) for word in ("param", "exp_avg_sq"))
        >>> weight = Group("weight", (3, 2), slots, rows_per_block=1)
        >>> live = [torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [4.0, 4.0], [9.0, 9.0]])]
        >>> preconditioners([weight], sampled_squares(weight, live, step=1).double())
        tensor([0.5000, 1.0000, 1.5000], dtype=torch.float64)

    """
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64)
    kinds = torch.tensor([_kind(group) for group in groups], dtype=torch.int64).repeat_interleave(sizes)
    roots = squares.sqrt()
    found = torch.ones_like(roots)
    for kind in range(len(_SECOND_MOMENTS)):
        known = (kinds == kind) & roots.isfinite()
        mean = roots[known].mean()
        if mean > 0:
            found[known] = (roots[known] / mean).clamp(min=_LEAST)
    return found


def _kind(group: Group) -> int:
    """How the optimizer keeps the group's squared gradients; -1 if it does not."""
    words = [slot.name for slot in group.slots]
    return next((kind for kind, word in enumerate(_SECOND_MOMENTS) if word in words), -1)


def _sampled_mean(blocks: Tensor, step: int) -> Tensor:
    """The mean of each block, shape ``(blocks, rows, ...)``, over some of its rows."""
    wanted = -(-_SAMPLE // blocks[0, 0].numel())
    stride = max(1, blocks.shape[1] // wanted)
    # Not the step itself: saves come at multiples of their interval, which may be one of the stride.
    first = Random(step).randrange(stride)
    return blocks[:, first::stride].mean(tuple(range(1, blocks.dim())), dtype=torch.float32)
