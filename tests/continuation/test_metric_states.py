"""An attempt that failed does not count in metrics, whether they are alone or in a collection."""

import torch
from torch.nn import Module
from torchmetrics import ExplainedVariance, MeanSquaredError, MetricCollection, R2Score

from lightning_scar.continuation.metric_states import MetricStates


def test_collections() -> None:
    model = Module()
    model.metrics = MetricCollection([MeanSquaredError(), R2Score(), ExplainedVariance()])
    states = MetricStates(model)
    a, b = torch.arange(4.0), torch.tensor([1.0, 0.0, 3.0, 5.0])
    model.metrics.update(a, b)
    expected = model.metrics.compute()
    states.save()
    model.metrics.update(b, a * 7)
    states.restore()
    assert model.metrics.compute() == expected
