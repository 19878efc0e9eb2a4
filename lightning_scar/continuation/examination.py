"""Whether batches of missing workers can be computed, and whether slices of them do as well as whole ones."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_scar.continuation.alone import alone
from lightning_scar.continuation.buffers import SharedBuffers
from lightning_scar.continuation.kept_batch import KeptBatch
from lightning_scar.continuation.metric_states import MetricStates
from lightning_scar.continuation.outages import Finding
from lightning_scar.continuation.parts import NotSliceableError, part_of
from lightning_scar.continuation.protocol import Training
from lightning_scar.continuation.side_gradients import SideGradients
from lightning_scar.continuation.step_tensors import StepTensors
from lightning_scar.core.private import has_compiled
from lightning_scar.core.random_generators import random_generators, same_state, set_random_generators

#: By dtype of a loss, how much it may differ, relatively, if the same samples are computed in other pieces.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
_TOLERANCE_OF_OTHERS = 1e-2


def examine(training: Training, tensors: StepTensors, batch: Any, loaded: Iterable[Any]) -> tuple[Finding, str]:
    """Compute this worker's present batch twice: whole with a group, then in slices without one. A collective.

    Slices may be used where they change nothing: no random numbers are drawn, of which each sample would get others; no
    buffers change; and the loss is the mean over samples. Their shapes would be new to compiled code. Otherwise the
    whole batch is computed without a group, which must not change its loss. Nothing of the training is different
    afterwards.

    Args:
        training: The training.
        tensors: What a training step changes in place.
        batch: The batch, as the training step gets it.
        loaded: Batches that are loaded as those of missing workers are; the last one is the same batch.

    Returns:
        The finding, and why it is not a better one: a clause for the user.

    """
    buffers, random, gradients = SharedBuffers(training, tensors), random_generators(), SideGradients(training.module)
    metrics = MetricStates(training.module)
    metrics.save()
    kept = KeptBatch()
    kept.save(batch)

    def restored(compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        finally:
            buffers.restore()
            metrics.restore()
            kept.restore()
            set_random_generators(random)

    def loss(piece: Any, has_group: bool = False) -> Any:
        with alone(training, share=0, has_group=has_group), gradients.collecting(weight=0):
            value = training.compute_gradient(piece)
        return value.detach() if isinstance(value, Tensor) else value

    def effects() -> tuple[Any, str]:
        value = loss(batch, has_group=True)
        if not same_state(random, random_generators()):
            return value, "a training step draws random numbers"
        if buffers.have_changed():
            return value, "a training step changes buffers, as BatchNorm does"
        if has_compiled():
            return value, "torch.compile would compile the training step again for slices"
        return value, ("" if isinstance(value, Tensor | float) else "a training step returns no loss")

    whole, why = restored(effects)
    why = why or _why_whole(batch, whole, lambda piece: restored(lambda: loss(piece)))
    if why:
        # Slices have not shown that the loss is the same without a group.
        try:
            by_itself = restored(lambda: loss(batch))
        except Exception as error:
            return Finding.IMPOSSIBLE, f"a training step fails without a process group ({_first_line(error)})"
        if not _is_close(whole, by_itself):
            return Finding.IMPOSSIBLE, "a worker's loss depends on other workers, as with SyncBatchNorm or all_gather"
    if not restored(lambda: any(_is_alike(each, batch) for each in loaded)):
        return Finding.IMPOSSIBLE, "the training step gets another batch than the loader gives"
    return (Finding.WHOLE, why) if why else (Finding.SLICED, "")


def _why_whole(batch: Any, whole: Any, compute: Callable[[Any], Any]) -> str:
    """Return why a batch cannot be computed in slices; empty if it can.

    Args:
        batch: The batch.
        whole: Its loss.
        compute: Returns the loss of a slice.

    """
    try:
        pieces = [part_of(batch, number, of=2) for number in range(2)]
    except NotSliceableError as error:
        return str(error)
    if not all(share for _, share in pieces):
        return "a batch of one sample does not tell whether slices of others do as well"
    try:
        losses = [compute(piece) * share for piece, share in pieces]
    except Exception as error:
        return f"a training step fails with a part of its batch ({_first_line(error)})"
    return "" if _is_close(sum(losses), whole) else "the loss of a batch is not the mean over its samples"


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
