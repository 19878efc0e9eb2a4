"""Whether batches of missing workers can be computed, and whether slices of them do as well as whole ones."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_scar.continuation.alone import alone
from lightning_scar.continuation.buffers import SharedBuffers
from lightning_scar.continuation.metric_states import MetricStates
from lightning_scar.continuation.outages import Finding
from lightning_scar.continuation.parts import NotSliceableError, part_of
from lightning_scar.continuation.protocol import Training
from lightning_scar.continuation.side_gradients import SideGradients
from lightning_scar.core.random_generators import random_generators, same_state, set_random_generators

#: By dtype of a loss, how much it may differ, relatively, if the same samples are computed in other pieces.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
_TOLERANCE_OF_OTHERS = 1e-2


def examine(training: Training, batch: Any, own: Any) -> tuple[Finding, str]:
    """Compute this worker's present batch several times, with and without a group, whole and in slices. A collective.

    Slices may be used where they change nothing: no random numbers are drawn, of which each sample would get others; no
    buffers change; and the loss is the mean over samples. Nothing of the training is different afterwards.

    Args:
        training: The training.
        batch: The batch, as the training step gets it.
        own: The same batch, loaded as those of missing workers are.

    Returns:
        The finding, and why it is not a better one: a clause for the user.

    """
    buffers, random, gradients = SharedBuffers(training), random_generators(), SideGradients(training.module)
    metrics = MetricStates(training.module)
    metrics.save()

    def loss(piece: Any, has_group: bool = False) -> Any:
        with alone(training, share=0, has_group=has_group), gradients.collecting(weight=0):
            value = training.compute_gradient(piece)
        return value.detach() if isinstance(value, Tensor) else value

    def restored(compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        finally:
            buffers.restore()
            metrics.restore()
            set_random_generators(random)

    def effects() -> tuple[Any, bool, bool]:
        value = loss(batch)
        return value, not same_state(random, random_generators()), buffers.have_changed()

    together = restored(lambda: loss(batch, has_group=True))
    try:
        by_itself, draws, changes_buffers = restored(effects)
    except Exception as error:
        return Finding.IMPOSSIBLE, f"a training step fails without a process group ({_first_line(error)})"
    if not _is_close(together, by_itself):
        return Finding.IMPOSSIBLE, "a worker's loss depends on other workers, as with SyncBatchNorm or all_gather"
    if not _is_alike(own, batch):
        return Finding.IMPOSSIBLE, "the training step gets another batch than the loader gives"
    if draws:
        return Finding.WHOLE, "a training step draws random numbers"
    if changes_buffers:
        return Finding.WHOLE, "a training step changes buffers, as BatchNorm does"
    if not isinstance(by_itself, Tensor | float):
        return Finding.WHOLE, "a training step returns no loss"
    try:
        pieces = [part_of(batch, number, of=2) for number in range(2)]
    except NotSliceableError as error:
        return Finding.WHOLE, str(error)
    try:
        losses = [restored(partial(loss, piece)) * share for piece, share in pieces if share]
    except Exception as error:
        return Finding.WHOLE, f"a training step fails with a part of its batch ({_first_line(error)})"
    if not _is_close(sum(losses), by_itself):
        return Finding.WHOLE, "the loss of a batch is not the mean over its samples"
    return Finding.SLICED, ""


def _is_close(a: Any, b: Any) -> bool:
    """Return whether two losses are the same but for rounding; what is no loss is."""
    if not isinstance(b, Tensor | float):
        return True
    dtype = b.dtype if isinstance(b, Tensor) else torch.float64
    a, b = float(a), float(b)
    largest = _TOLERANCES.get(dtype, _TOLERANCE_OF_OTHERS) * max(abs(a), abs(b))
    return abs(a - b) <= largest or (math.isnan(a) and math.isnan(b)) or a == b


def _is_alike(a: Any, b: Any) -> bool:
    """Return whether two batches have the same form; items may be random, and so may be their lengths."""
    leaves, form = tree_flatten(a)
    others, other_form = tree_flatten(b)
    return form == other_form and all(map(_are_alike, leaves, others))


def _are_alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return type(a) is type(b)
    return isinstance(b, Tensor) and (a.dtype, a.device, a.dim()) == (b.dtype, b.device, b.dim())


def _first_line(error: Exception) -> str:
    return next(iter(f"{error}".splitlines()), type(error).__name__)
