"""What metric objects, such as those of torchmetrics, have gathered."""

from typing import Any

from torch import Tensor
from torch.nn import Module


class MetricStates:
    """Restores what the updates of metric objects change.

    Args:
        module: The model that holds them.

    Example::

        >>> from torchmetrics import MeanMetric
        >>> model = Module()
        >>> model.metric = MeanMetric()
        >>> model.metric.update(1.0)
        >>> states = MetricStates(model)
        >>> states.save()
        >>> model.metric.update(5.0)
        >>> states.restore()
        >>> model.metric.compute()
        tensor(1.)

    """

    def __init__(self, module: Module) -> None:
        self._metrics: list[Any] = [each for each in module.modules() if _is_metric(each)]
        self._saved: list[dict[str, Any]] = []

    def save(self) -> None:
        """Copy the present states."""
        self._saved = [_state(metric) for metric in self._metrics]

    def restore(self) -> None:
        """Restore the copied states."""
        for metric, state in zip(self._metrics, self._saved, strict=True):
            for name, value in state.items():
                setattr(metric, name, _copied(value))


def _is_metric(module: Module) -> bool:
    # Known by its public property, because torchmetrics need not be installed. A collection has no state of its own.
    return isinstance(getattr(type(module), "metric_state", None), property) and hasattr(module, "_update_count")


def _state(metric: Any) -> dict[str, Any]:
    state = {name: _copied(value) for name, value in metric.metric_state.items()}
    return {**state, "_update_count": metric._update_count, "_computed": None}


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)
    # Updates change tensors in place, but append to lists.
    return value.clone() if isinstance(value, Tensor) else value
