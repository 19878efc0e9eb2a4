"""Stale gradients: what workers compute while their group is broken, kept in bounded memory until it is whole again.

The worker-side continuation of 'Training Through Failure' (arXiv 2406.05546), without its unbounded list of gradients
and without its sum of them, whose length grows with the outage.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_scar.core.discounts import Discount
from lightning_scar.core.gradient_sum import TOTALS, GradientSum, are_finite, as_real, dense_grad, set_grad, wide_zeros
from lightning_scar.core.threads import batches

Mode = Literal["mean", "replay"]

#: Bytes of gradients that are averaged at once.
_BUCKET = 25 << 20
#: Discounts below count as 0: divided by such a weight a gradient would leave the range of float32.
_LEAST_DISCOUNT = 1e-20


@dataclass(frozen=True)
class StaleStep:
    """An optimizer step that is to be made of stale gradients.

    Attributes:
        contributions: How many it is made of, over all ranks.
        samples: How many samples these saw.

    """

    contributions: int
    samples: int


class StaleGradientBuffer:
    r"""Adds up the gradients of an outage, to be averaged over all contributors and applied after it.

    The i-th contribution of an outage (0, 1, ...) has staleness i: the number of optimizer steps that the run would
    have made since the weights it was computed on. It weighs :math:`w = n\,d(i)` for :math:`n` samples and the
    discount :math:`d`. Contributions with NaN or Inf are dropped; they count as a step all the same.

    - ``mean`` makes one step of all gradients, :math:`\sum w g / \sum w` over all contributions of all ranks: the step
      of one large batch, if the loss is a mean over samples. A discount shifts the weights, not the length of the step.
    - ``replay`` makes the steps one after the other, each averaged over the ranks. From the second on their gradients
      really are stale, so the discount shortens them, :math:`\sum w g / \sum n`, as Zhang et al. (2016) divide the
      learning rate. (Optimizers that do not heed the length of gradients, like Adam, hardly heed this discount.)

    Memory: one set of gradients in ``mean``, at most ``slots`` in ``replay``, where consecutive contributions share a
    slot. When all slots are in use neighbours are merged, and each then holds twice as many. Half-precision gradients
    are added up in float32, others in their own dtype, on their own device. Memory comes with the first contributions
    and is used again after :meth:`clear`.

    With a ``GradScaler`` the gradients go in and come out scaled, on all ranks by the same scale.

    Args:
        parameters: Those of the model, in the same order on all ranks; any shape, real or complex floating point.
        mode: How to apply the gradients, ``"mean"`` or ``"replay"``.
        discount: Gives the weight of a staleness, in [0, 1]: :func:`~lightning_scar.core.discounts.inverse_discount`,
            :func:`~lightning_scar.core.discounts.exponential_discount` or
            any other; ``None`` for 1.
        max_staleness: Contributions that are staler, in steps, are dropped; ``None`` for no limit.
        slots: Sets of gradients that ``replay`` may hold, and so the most steps that it makes.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> buffer = StaleGradientBuffer(model.parameters(), max_staleness=2)
        >>> batches = iter([torch.full((2, 1), 3.0), torch.full((6, 1), 7.0), torch.full((4, 1), float("nan"))])
        >>> while not buffer.is_full:  # the others are away
        ...     batch = next(batches)
        ...     optimizer.zero_grad()
        ...     model(batch).mean().backward()
        ...     print(buffer.add(samples=len(batch)))
        True
        True
        False
        >>> for step in buffer.steps():  # buffer.steps(torch.distributed.group.WORLD): with the others
        ...     optimizer.step()
        ...     print(step, f"{model.weight.item():.3f}")  # -(2 * 3 + 6 * 7) / 8
        StaleStep(contributions=2, samples=8) -6.000
        >>> len(buffer)
        0

    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        mode: Mode = "mean",
        discount: Discount | None = None,
        max_staleness: int | None = None,
        slots: int = 8,
    ) -> None:
        self._parameters = list(parameters)
        if not self._parameters:
            raise ValueError("parameters is empty: give those of the model (an iterator can be used only once)")
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} must be one of {get_args(Mode)}")
        if max_staleness is not None and not max_staleness >= 0:
            raise ValueError(f"max_staleness={max_staleness!r} must be at least 0, or None for no limit")
        if not slots >= 1:
            raise ValueError(f"slots={slots!r} must be at least 1: replay needs memory for one set of gradients")
        self._replays = mode == "replay"
        self._discount = discount
        self._max_staleness = max_staleness
        self._max_slots = slots if self._replays else 1
        self._slots: list[GradientSum] = []
        self.clear()

    def clear(self) -> None:
        """Forgets all contributions and counts; keeps the memory."""
        self._offered = self._dropped = 0
        # How many of those offered share a slot.
        self._span = 1
        for slot in self._slots:
            slot.clear()

    def __len__(self) -> int:
        """The number of contributions held."""
        return self.contributions

    @property
    def contributions(self) -> int:
        """How many contributions this rank holds."""
        return sum(int(slot.tally[2]) for slot in self._slots)

    @property
    def samples(self) -> int:
        """How many samples these saw."""
        return sum(int(slot.tally[1]) for slot in self._slots)

    @property
    def dropped(self) -> int:
        """How many contributions were dropped since the buffer was last clear."""
        return self._dropped

    @property
    def staleness(self) -> int:
        """The greatest staleness held, in steps; 0 if the buffer is empty."""
        return max((slot.staleness for slot in self._slots), default=0)

    @property
    def is_full(self) -> bool:
        """Whether the next contribution would be dropped for its staleness, unless another is stated for it."""
        return self._max_staleness is not None and self._offered > self._max_staleness

    @torch.no_grad()
    def add(self, samples: int, staleness: int | None = None) -> bool:
        """Takes the present gradients of the parameters as one contribution and leaves them as they are.

        Args:
            samples: How many samples the gradients are a mean over, at least 1.
            staleness: Optimizer steps since the weights that they were computed on, at least 0. Only for those whose
                weights move meanwhile (stale synchronous SGD); ``None`` for the number of contributions before it.

        Returns:
            Whether it is held; ``False`` if it was dropped, for NaN or Inf or for its staleness. A gradient that is
            ``None`` counts as zeros.

        Raises:
            ValueError: If an argument is out of range, the discount is, or a gradient is sparse.

        """
        if not samples >= 1:
            raise ValueError(f"samples={samples!r} must be at least 1: how many samples the gradients are a mean over")
        if staleness is not None and not staleness >= 0:
            raise ValueError(f"staleness={staleness!r} must be at least 0, or None for the number of earlier ones")
        grads = [dense_grad(i, parameter) for i, parameter in enumerate(self._parameters)]
        number = self._offered
        staleness = number if staleness is None else staleness
        weight = samples * self._worth(staleness)
        self._offered += 1
        is_fresh = self._max_staleness is None or staleness <= self._max_staleness
        if not (is_fresh and are_finite([grad for grad in grads if grad is not None])):
            self._dropped += 1
            return False
        self._slot_of(number).add(grads, weight, samples, staleness)
        return True

    def steps(self, group: "dist.ProcessGroup | None" = None) -> Iterator[StaleStep]:
        """Empties the buffer: writes the gradients of one optimizer step after the other. With a group, a collective.

        A parameter that no contribution to a step had a gradient for gets ``None``, so optimizers skip it as usual. A
        step whose weights are all 0 is left out.

        Gradients are held until their step is made: if the group breaks on the way, :meth:`steps` with the next one
        goes on from there. A member that had made fewer steps than another and took its state must :meth:`clear` first:
        its gradients are in that state.

        Args:
            group: All its members iterate together, each with a buffer for the same parameters, mode and slots and with
                any number of contributions, or none. Step j is of the same span of contributions on all of them: the
                widest that one needs. ``torch.distributed.group.WORLD`` is the default group, if there is one;
                ``None`` stands for this process alone.

        Yields:
            What the step is made of. Call ``optimizer.step()`` before the next.

        Raises:
            ValueError: If the buffers of the members do not match; raised on all.

        """
        for index, tally in enumerate(self._agree(group)):
            weight, samples, contributions = tally[:TOTALS].tolist()
            if weight > 0:
                self._write(index, samples if self._replays else weight, tally[TOTALS:] > 0, group)
                yield StaleStep(round(contributions), round(samples))
            if index < len(self._slots):
                self._slots[index].clear()
        self.clear()

    def _worth(self, staleness: int) -> float:
        if self._discount is None:
            return 1.0
        worth = self._discount(staleness)
        if not 0 <= worth <= 1:
            raise ValueError(f"discount({staleness}) returned {worth!r} and must return a weight in [0, 1]")
        return worth if worth >= _LEAST_DISCOUNT else 0.0

    def _slot_of(self, number: int) -> GradientSum:
        while number // self._span >= self._max_slots:
            self._merge()
        index = number // self._span
        self._slots += [GradientSum(len(self._parameters)) for _ in range(len(self._slots), index + 1)]
        return self._slots[index]

    def _merge(self) -> None:
        """Puts neighbours together; the slots that become free go to the end."""
        self._span *= 2
        firsts, seconds = self._slots[::2], self._slots[1::2]
        for first, second in zip(firsts, seconds, strict=False):
            first.take(second)
        self._slots = firsts + seconds

    def _agree(self, group: "dist.ProcessGroup | None") -> Tensor:
        """The tallies of all slots over all ranks, shape ``(slots, 3 + parameters)``."""
        if group is not None:
            form = [self._replays, self._max_slots, len(self._parameters), sum(p.numel() for p in self._parameters)]
            greatest = torch.tensor([self._span, *form, *(-n for n in form)])
            span, *bounds = self._all_reduce(greatest, dist.ReduceOp.MAX, group).tolist()
            if bounds[: len(form)] != [-n for n in bounds[len(form) :]]:
                raise ValueError(
                    "the ranks' buffers do not match: give all the same parameters, mode and slots (replays, slots, "
                    f"parameters, elements: here {form}, at most {bounds[: len(form)]})"
                )
            while self._span < span:
                self._merge()
        tallies = torch.zeros(self._max_slots, TOTALS + len(self._parameters), dtype=torch.float64)
        for tally, slot in zip(tallies, self._slots, strict=False):
            tally.copy_(slot.tally)
        return tallies if group is None else self._all_reduce(tallies, dist.ReduceOp.SUM, group)

    def _all_reduce(self, values: Tensor, op: "dist.ReduceOp.RedOpType", group: "dist.ProcessGroup") -> Tensor:
        # Where gradients are, for NCCL carries no CPU tensors.
        values = values.to(self._parameters[0].device)
        dist.all_reduce(values, op, group=group)
        return values.cpu()

    @torch.no_grad()
    def _write(self, index: int, divisor: float, seen: Tensor, group: "dist.ProcessGroup | None") -> None:
        sums = self._slots[index].sums if index < len(self._slots) else [None] * len(self._parameters)
        for i in (~seen).nonzero().flatten().tolist():
            self._parameters[i].grad = None
        for bucket in self._buckets(seen.nonzero().flatten().tolist()):
            parts = [wide_zeros(as_real(self._parameters[i])) if (total := sums[i]) is None else total for i in bucket]
            # A copy: a collective that fails leaves garbage.
            mean = torch.cat([part.flatten() for part in parts]).div_(divisor)
            if group is not None:
                dist.all_reduce(mean, group=group)
            for i, values in zip(bucket, torch.split(mean, [part.numel() for part in parts]), strict=True):
                set_grad(self._parameters[i], values)

    def _buckets(self, indices: list[int]) -> Iterator[list[int]]:
        """The parameters that are averaged together: of one device, the same on all ranks."""
        by_device: dict[torch.device, list[int]] = {}
        for i in indices:
            by_device.setdefault(self._parameters[i].device, []).append(i)
        for members in by_device.values():
            yield from batches(members, lambda i: self._parameters[i].nbytes, _BUCKET)
