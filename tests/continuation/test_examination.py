"""What is checked before missing batches are computed: in one process, whose own batch it is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import mse_loss

from lightning_scar.continuation.examination import examine
from lightning_scar.continuation.outages import Finding
from lightning_scar.continuation.protocol import Training
from lightning_scar.continuation.step_tensors import StepTensors
from lightning_scar.core.random_generators import random_generators, same_state

Batch = tuple[Tensor, list[Any]]


class Small:
    """A training of a small model, as far as it is examined.

    Args:
        module: The model.
        loss: Computes the loss of its output.

    """

    def __init__(self, module: nn.Module, loss: Callable[[Tensor], Any]) -> None:
        self.module = module
        self._loss = loss
        #: The samples of each batch that was computed.
        self.computed: list[int] = []

    def wrappers(self) -> list[Any]:
        return []

    def covering(self, share: float) -> AbstractContextManager[None]:
        return nullcontext()

    def compute_gradient(self, batch: Batch) -> Any:
        self.computed.append(len(batch[0]))
        loss = self._loss(self.module(batch[0]))
        if isinstance(loss, Tensor):
            loss.backward()  # type: ignore[no-untyped-call]
        return loss


def examined(training: Small, own: Any, loaded: Iterable[Any]) -> tuple[Finding, str]:
    return examine(cast(Training, training), StepTensors(training.module), own, loaded)


def mean(output: Tensor) -> Tensor:
    return mse_loss(output, torch.zeros_like(output))


def batch(names: int = 1) -> Batch:
    """Eight samples; each has a name, or several."""
    return torch.arange(16.0).reshape(8, 2), [["a"] * names] * 8 if names > 1 else ["a"] * 8


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> Iterator[None]:
    """In this process, whatever other tests did."""
    counters.clear()
    yield
    counters.clear()


def unchanged(training: Small) -> Callable[[], bool]:
    before, random = [value.clone() for value in training.module.state_dict().values()], random_generators()
    return lambda: (
        all(map(torch.equal, training.module.state_dict().values(), before))
        and all(parameter.grad is None for parameter in training.module.parameters())
        and same_state(random, random_generators())
    )


def test_slices_are_proved_by_twice_the_batch() -> None:
    training = Small(nn.Linear(2, 1), mean)
    is_unchanged = unchanged(training)
    assert examined(training, batch(), [batch()]) == (Finding.SLICED, "")
    assert training.computed == [8, 4, 4]
    assert is_unchanged()


@pytest.mark.parametrize(
    ("module", "loss", "reason"),
    [
        (nn.Linear(2, 1), torch.sum, "is not the mean over its samples"),
        (nn.Sequential(nn.Linear(2, 1), nn.Dropout()), mean, "draws random numbers"),
        (nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), mean, "changes buffers"),
        (nn.Linear(2, 1), lambda output: None, "returns no loss"),
        (nn.Linear(2, 1), lambda output: mean(output[4:]), "is not the mean over its samples"),
        (nn.Linear(2, 1), lambda output: mean(output.reshape(8, 1)), "fails with a part of its batch"),
        (cast(nn.Module, torch.compile(nn.Linear(2, 1), backend="eager")), mean, "would compile"),
    ],
)
def test_otherwise_batches_are_whole(module: nn.Module, loss: Callable[[Tensor], Any], reason: str) -> None:
    training = Small(module, loss)
    is_unchanged = unchanged(training)
    finding, why = examined(training, batch(), [batch()])
    assert (finding, reason in why) == (Finding.WHOLE, True), why
    assert is_unchanged()


def test_a_batch_of_a_missing_worker_may_have_another_form_if_ones_own_has_not() -> None:
    asked = []

    def loaded(*batches: Batch) -> Iterator[Batch]:
        for each in batches:
            asked.append(each)
            yield each

    def found(*batches: Batch) -> Finding:
        asked.clear()
        return examined((Small(nn.Linear(2, 1), mean)), batch(), loaded(*batches))[0]

    assert found(batch(names=2), batch()) == Finding.SLICED
    assert found(batch(names=2), batch(names=2)) == Finding.IMPOSSIBLE
    assert found(batch(), batch(names=2)) == Finding.SLICED
    assert len(asked) == 1


def test_a_batch_of_one_sample_tells_nothing_of_larger_ones() -> None:
    finding, why = examined((Small(nn.Linear(2, 1), torch.sum)), one := (torch.ones(1, 2), ["a"]), [one])
    assert finding == Finding.WHOLE
    assert "a batch of one sample" in why


def test_the_batch_may_be_changed_by_the_step() -> None:
    class Scales(Small):
        def compute_gradient(self, batch: Batch) -> Any:
            batch[1].clear()
            return super().compute_gradient((batch[0].div_(4), batch[1]))

    present = batch()
    assert examined((Scales(nn.Linear(2, 1), mean)), present, [batch()]) == (Finding.SLICED, "")
    assert (present[0].tolist(), present[1]) == (batch()[0].tolist(), batch()[1])
