"""Stale gradients: what workers compute while their group is broken, held in bounded memory until it is complete again.

The worker-side continuation of 'Training Through Failure' (arXiv 2406.05546), but without its unbounded list of
gradients, and with their mean instead of their sum, whose length grows with the outage.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_scar.core.gradient_sum import TOTALS, GradientSum, are_finite, as_real, dense_grad, set_grad, wide_zeros
from lightning_scar.core.threads import batches

Mode = Literal["mean", "replay"]

#: How many sets of gradients ``replay`` holds at most, and so the most steps that it makes.
_REPLAY_STEPS = 8

#: Bytes of gradients that are averaged in one collective.
_BUCKET = 25 << 20


@dataclass(frozen=True)
class StaleStep:
    """An optimizer step that is made of stale gradients.

    Attributes:
        contributions: The number of contributions in it, over all ranks.
        samples: The number of samples in these.

    """

    contributions: int
    samples: int


class StaleGradientBuffer:
    r"""Sums the gradients of an outage, to average them over all contributors and apply them after it.

    The i-th contribution of an outage (0, 1, ...) has staleness i: the number of optimizer steps that the run would
    have made since the weights were updated last. Its weight :math:`w` is its number of samples :math:`n`.
    Contributions with NaN or Inf are dropped, but count as a step.

    - ``mean`` makes one step of all gradients, :math:`\sum w g / \sum w` over all contributions of all ranks. This is
      the step of one large batch, if the loss is a mean over samples.
    - ``replay`` makes one step per contribution, each averaged over the ranks. The eighth and all later contributions
      share one step.

    Memory: one set of gradients in ``mean``, at most eight in ``replay``. Half-precision gradients are summed in
    float32, others in their own dtype, on their own device. The memory is allocated with the first contributions and
    reused after :meth:`clear`.

    With a ``GradScaler``, gradients go in and come out scaled. All ranks must use the same scale.

    Args:
        parameters: The model's parameters, in the same order on all ranks; real or complex floating point.
        mode: How to apply the gradients, ``"mean"`` or ``"replay"``.
        discount: Whether to multiply the weight by ``1 / (1 + staleness)`` (Zhang et al. 2016, arXiv 1511.05950). In
            ``mean`` this shifts the weights and keeps the length of the step. In ``replay`` it shortens the later
            steps, :math:`\sum w g / \sum n`; optimizers that normalize gradients, like Adam, hardly react to this.
        max_staleness: The greatest staleness that is held; ``None`` for no limit.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> buffer = StaleGradientBuffer(model.parameters(), max_staleness=2)
        >>> batches = iter([torch.full((2, 1), 3.0), torch.full((6, 1), 7.0), torch.full((4, 1), float("nan"))])
        >>> while not buffer.is_full:  # the other workers are missing
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
        >>> buffer.contributions
        0

    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        mode: Mode = "mean",
        discount: bool = False,
        max_staleness: int | None = None,
    ) -> None:
        self._parameters = list(parameters)
        if not self._parameters:
            raise ValueError("parameters is empty: pass the model's parameters (an iterator can be used only once)")
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} must be one of {get_args(Mode)}")
        if max_staleness is not None and not max_staleness >= 0:
            raise ValueError(f"max_staleness={max_staleness!r} must be at least 0, or None for no limit")
        self._replays = mode == "replay"
        self._discount = discount
        self._max_staleness = max_staleness
        self._offered = 0
        self._sums: list[GradientSum] = []

    def clear(self) -> None:
        """Drop all contributions and reset the counters; keep the memory."""
        self._offered = 0
        for each in self._sums:
            each.clear()

    @property
    def contributions(self) -> int:
        """The number of contributions that this rank holds."""
        return sum(int(each.tally[2]) for each in self._sums)

    @property
    def is_full(self) -> bool:
        """Whether the next contribution would exceed ``max_staleness``."""
        return self._max_staleness is not None and self._offered > self._max_staleness

    @torch.no_grad()
    def add(self, samples: int) -> bool:
        """Add the present gradients of the parameters as one contribution. They are not changed.

        Args:
            samples: The number of samples that the gradients are a mean over, at least 1.

        Returns:
            Whether the contribution is held; ``False`` if it was dropped, for NaN or Inf or because the buffer is full.
            A gradient that is ``None`` counts as zeros.

        Raises:
            ValueError: If ``samples`` is out of range, or a gradient is sparse.

        """
        if not samples >= 1:
            raise ValueError(f"samples={samples!r} must be at least 1: the number that the gradients are a mean over")
        grads = [dense_grad(i, parameter) for i, parameter in enumerate(self._parameters)]
        is_full, staleness = self.is_full, self._offered
        self._offered += 1
        if is_full or not are_finite([grad for grad in grads if grad is not None]):
            return False
        weight = samples / (1 + staleness) if self._discount else float(samples)
        self._sum_for(staleness).add(grads, weight, samples)
        return True

    def steps(self, group: "dist.ProcessGroup | None" = None) -> Iterator[StaleStep]:
        """Empty the buffer: write the gradients of one optimizer step after the other. With a group, a collective.

        If no contribution to a step has a gradient for a parameter, its gradient is ``None``, so optimizers skip it.

        Gradients are held until their step is made: if the group breaks in between, call :meth:`steps` with the next
        group to continue. A member that took the state of another one, which had made more steps, must :meth:`clear`
        first: that state includes its gradients.

        Args:
            group: All its members iterate together, each with a buffer for the same parameters and mode, and with any
                number of contributions, or none. ``torch.distributed.group.WORLD`` is the default group, if there is
                one; ``None`` stands for this process alone.

        Yields:
            What the step is made of. Call ``optimizer.step()`` before the next.

        Raises:
            ValueError: If the buffers of the members do not match; raised on all.

        """
        self._check_match(group)
        for index, tally in enumerate(self._tallies(group)):
            weight, samples, contributions = tally[:TOTALS].tolist()
            if contributions:
                self._write(index, samples if self._replays else weight, tally[TOTALS:] > 0, group)
                yield StaleStep(round(contributions), round(samples))
            if index < len(self._sums):
                self._sums[index].clear()
        self.clear()

    def _sum_for(self, staleness: int) -> GradientSum:
        index = min(staleness, _REPLAY_STEPS - 1) if self._replays else 0
        while len(self._sums) <= index:
            self._sums.append(GradientSum(len(self._parameters)))
        return self._sums[index]

    def _check_match(self, group: "dist.ProcessGroup | None") -> None:
        if group is None:
            return
        own = [int(self._replays), len(self._parameters), sum(p.numel() for p in self._parameters)]
        # One collective gives both bounds: the least is the greatest of the negatives.
        bounds = torch.tensor([*own, *(-n for n in own)], device="cpu")
        *greatest, a, b, c = self._all_reduce(bounds, dist.ReduceOp.MAX, group).tolist()
        if greatest != [-a, -b, -c]:
            raise ValueError(
                "the ranks' buffers do not match: use the same parameters and mode on all ranks (replay, parameters, "
                f"elements: {own} on this rank, at most {greatest})"
            )

    def _tallies(self, group: "dist.ProcessGroup | None") -> Tensor:
        """Return the tallies of all sums over all ranks, in shape ``(steps, TOTALS + parameters)``."""
        n_steps = _REPLAY_STEPS if self._replays else 1
        tallies = torch.zeros(n_steps, TOTALS + len(self._parameters), dtype=torch.float64, device="cpu")
        for tally, each in zip(tallies, self._sums, strict=False):
            tally.copy_(each.tally)
        return tallies if group is None else self._all_reduce(tallies, dist.ReduceOp.SUM, group)

    def _all_reduce(self, values: Tensor, op: "dist.ReduceOp.RedOpType", group: "dist.ProcessGroup") -> Tensor:
        # On the device of the gradients, because NCCL does not support CPU tensors.
        values = values.to(self._parameters[0].device)
        dist.all_reduce(values, op, group=group)
        return values.cpu()

    @torch.no_grad()
    def _write(self, index: int, divisor: float, seen: Tensor, group: "dist.ProcessGroup | None") -> None:
        sums = self._sums[index].sums if index < len(self._sums) else [None] * len(self._parameters)
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
        """Group the parameters that are averaged together: of one device, and the same on all ranks."""
        by_device: dict[torch.device, list[int]] = {}
        for i in indices:
            by_device.setdefault(self._parameters[i].device, []).append(i)
        for members in by_device.values():
            yield from batches(members, lambda i: self._parameters[i].nbytes, _BUCKET)
