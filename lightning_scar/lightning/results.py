"""What ``self.log`` has gathered in an epoch that is not over, and the private API of Lightning that keeps it."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor

#: Metrics with larger states are not saved. Each tensor of a state that is a list counts as if it were larger.
_SMALL_BYTES, _TENSOR_BYTES = 64 * 1024, 64
#: What :func:`results` keeps of how a value was logged.
_PLAIN = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)


def results(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return what the present epoch has logged so far and will reduce at its end, as plain values.

    Of ``torchmetrics`` those whose state is small: tensors, and lists of tensors.
    """
    found = []
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        metric = result if result.is_tensor else result.value
        states = {name: getattr(metric, name) for name in metric._defaults}
        small = all(_bytes_in(state) <= _SMALL_BYTES for state in states.values())
        if result.has_reset or not meta.on_epoch or not small or meta.sync.group is not None:
            continue
        found.append(
            {
                "key": key,
                "is_tensor": result.is_tensor,
                "meta": {name: getattr(meta, name) for name in _PLAIN} | {"reduce_fx": meta.reduce_fx.__name__},
                "sync": [meta.sync.should, meta.sync.rank_zero_only],
                # As bytes, because floating-point tensors count as parts of the model's state.
                "states": {name: _bytes_of(state) for name, state in states.items()},
                "updates": metric._update_count,
            }
        )
    return found


def set_results(trainer: pl.Trainer, saved: list[dict[str, Any]]) -> None:
    """Go on with another process's :func:`results`."""
    module, device = trainer.lightning_module, trainer.strategy.root_device
    for each in saved:
        meta = _Resumed(**each["meta"])
        should, rank_zero_only = each["sync"]
        meta.sync = _Sync(fn=trainer.strategy.reduce, _should=should, rank_zero_only=rank_zero_only)
        result = _ResultMetric(meta, each["is_tensor"])
        metric: Any = result
        if not each["is_tensor"]:
            result.value = metric = dict(module.named_modules()).get(meta.metric_attribute)
        if metric is None or set(metric._defaults) != set(each["states"]):
            continue
        for name, state in each["states"].items():
            setattr(metric, name, _of_bytes(state, device))
        metric._update_count = each["updates"]
        trainer.fit_loop.epoch_loop._results[each["key"]] = result


def logged(trainer: pl.Trainer) -> list[str]:
    """Return the keys of all that the present epoch has logged so far and will reduce at its end."""
    items = trainer.fit_loop.epoch_loop._results.items()
    return [key for key, result in items if result.meta.on_epoch and not result.has_reset]


def join_results(trainer: pl.Trainer, saved: list[dict[str, Any]], keys: list[str]) -> None:
    """Take part in the epoch of another worker: what all workers will reduce begins anew, its own values go on.

    Args:
        trainer: The trainer.
        saved: The other worker's :func:`results`.
        keys: What it has :func:`logged`. At the end of the epoch it reduces these, and so must this one.

    """
    collection = trainer.fit_loop.epoch_loop._results
    collection.reset()
    set_results(trainer, saved)
    for key in keys:
        result = collection.get(key)
        if result is None:
            continue
        if not result.is_tensor or result.meta.sync.should:
            _reset(result)
        result.has_reset = False


def _reset(result: Any) -> None:
    """Begin anew, in the form of the present states: the defaults may have another dtype, and fewer dimensions.

    Workers reduce what they have at the end of an epoch, which this one may have joined in its last step.
    """
    metric = result if result.is_tensor else result.value
    states = {name: getattr(metric, name) for name in metric._defaults}
    result.reset()
    for name, state in states.items():
        setattr(metric, name, _in_form_of(state, getattr(metric, name)))


def _in_form_of(state: Any, default: Any) -> Any:
    if isinstance(state, list):
        return [each[:0] for each in state[:1] if isinstance(each, Tensor) and each.dim()]
    fresh = default.to(state.dtype)
    return fresh.new_empty(state.shape).copy_(fresh) if fresh.dim() < state.dim() else fresh


class _Resumed(_Metadata):
    """What was said when a value was logged before; the program may say something else by now."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Metadata) or other.reduce_fx is not self.reduce_fx:
            return False
        present, said = self.sync, other.sync
        vars(self).update(vars(other))
        if (present.should, present.rank_zero_only) == (said.should, said.rank_zero_only):
            # It may count batches of missing workers.
            self._sync = present
        return True


def _bytes_in(state: Any) -> float:
    if isinstance(state, list):
        return sum(_bytes_in(each) + _TENSOR_BYTES for each in state)
    return state.nbytes if isinstance(state, Tensor) else float("inf")


def _bytes_of(tensor: Any) -> list[Any]:
    if isinstance(tensor, list):
        return [_bytes_of(each) for each in tensor]
    # On its device, because a save copies all small tensors from there at once.
    values = tensor.detach().reshape(-1).view(torch.uint8)
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), values]


def _of_bytes(saved: list[Any], device: torch.device) -> Any:
    if not saved or isinstance(saved[0], list):
        return [_of_bytes(each, device) for each in saved]
    dtype, shape, values = saved
    return values.clone().view(getattr(torch, dtype)).reshape(shape).to(device)
