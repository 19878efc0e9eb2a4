"""The private API of Lightning that this package uses.

Each use is in one function here, and each function has a test that fails when Lightning changes.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, Timer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.migration.utils import _pl_migrate_checkpoint
from torch import Tensor

from lightning_scar.core.zero import is_sharded, shard_state
from lightning_scar.lightning.private_logs import of_batch


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """Return Lightning's checkpoint dict, with references to live tensors, and with this rank's optimizer shard.

    The public ``Trainer.save_checkpoint`` would write the dict, and end in a barrier. The strategy would gather the
    shards of a ``ZeroRedundancyOptimizer`` on one rank, with a collective, and the others would have none.
    """
    strategy = trainer.strategy
    optimizer_state = strategy.optimizer_state
    own = vars(strategy).get("optimizer_state")
    strategy.optimizer_state = (  # type: ignore[method-assign]
        lambda optimizer: shard_state(optimizer) if is_sharded(optimizer) else optimizer_state(optimizer)
    )
    try:
        return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    finally:
        vars(strategy).pop("optimizer_state")
        if own is not None:
            strategy.optimizer_state = own  # type: ignore[method-assign]


def weights_beside(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the model's state if a callback has put another one into a checkpoint dict, such as averaged weights."""
    own, dumped = trainer.strategy.lightning_module_state_dict(), checkpoint["state_dict"]
    pairs = [(value, dumped[name]) for name, value in own.items() if isinstance(value, Tensor) and name in dumped]
    return own if any(a.data_ptr() != b.data_ptr() for a, b in pairs) else None


def intercept_resume(trainer: pl.Trainer, choose: Callable[[Any, bool | None], Any]) -> None:
    """Let a callback's ``setup`` decide what the current call resumes from.

    ``setup`` runs before the checkpoint is read, but does not receive ``ckpt_path``.

    Args:
        trainer: The trainer, in ``fit``, ``validate``, ``test`` or ``predict``.
        choose: Receives the ``ckpt_path``, or ``None``, and ``weights_only``. It returns a checkpoint dict, or a path
            for Lightning to read, or ``None`` not to resume.

    """
    connector = trainer._checkpoint_connector

    def resume_start(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        end_interception(trainer)
        chosen = choose(checkpoint_path, weights_only)
        if isinstance(trainer.precision_plugin, DoublePrecision):
            # Lightning converts the model when it has loaded the weights, which single precision would round.
            trainer.precision_plugin.convert_module(trainer.lightning_module)
        if isinstance(chosen, dict):
            connector._loaded_checkpoint = _pl_migrate_checkpoint(chosen)
        else:
            _resume_start(connector, chosen, weights_only)

    connector.resume_start = resume_start  # type: ignore[method-assign]


def _resume_start(connector: Any, path: Any, weights_only: bool | None) -> None:
    """Let Lightning read a checkpoint. Lightning 2.5 has no ``weights_only``, and loads everything."""
    knows = "weights_only" in inspect.signature(connector.resume_start).parameters
    connector.resume_start(path, **({"weights_only": weights_only} if knows else {}))


def end_interception(trainer: pl.Trainer) -> None:
    """Undo :func:`intercept_resume`, if a call failed before the checkpoint was read."""
    vars(trainer._checkpoint_connector).pop("resume_start", None)


def after_batches(trainer: pl.Trainer, hook: Callable[[], None]) -> None:
    """Call a function after every training batch, right behind the LightningModule's ``on_train_batch_end``.

    Lightning calls the callbacks' hook of that name before the module's. The next hook of a callback comes too late: by
    then a validation may have begun, or the loader and the loops have moved on to the next batch.

    Args:
        trainer: The trainer.
        hook: The function.

    """
    connector: Any = trainer._logger_connector
    connector.on_batch_end = _AfterBatches(trainer, hook, connector.on_batch_end)


class _AfterBatches(NamedTuple):
    trainer: pl.Trainer
    hook: Callable[[], None]
    on_batch_end: Callable[[], None]

    def __call__(self) -> None:
        # Batches of a validation end here, too.
        if self.trainer.training:
            self.hook()
        self.on_batch_end()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the Trainer has its own method.
        return getattr, (self.trainer._logger_connector, "on_batch_end")


def end_after_batches(trainer: pl.Trainer) -> None:
    """Undo all :func:`after_batches`."""
    vars(trainer._logger_connector).pop("on_batch_end", None)


def is_over(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> bool:
    """Return whether ``fit`` will return at once when its loops are restored from a checkpoint dict.

    Args:
        trainer: The trainer; ``should_stop`` counts as in its loops.
        checkpoint: The checkpoint dict.

    """
    steps, epochs = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    limits = (steps, trainer.max_steps), (epochs, trainer.max_epochs)
    if any(limit not in (None, -1) and done >= limit for done, limit in limits):
        return True
    return trainer.should_stop and epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)


def logger_step(trainer: pl.Trainer) -> int:
    """Return the step that Lightning passes to loggers; they require steps that never decrease."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def mark_sigterm(trainer: pl.Trainer) -> None:
    """Make the training loop end with ``SIGTERMException`` after the current batch."""
    trainer._signal_connector.received_sigterm = True


def time_is_up(trainer: pl.Trainer) -> bool:
    """Return whether a Timer callback ends the training."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return any((timer.time_remaining() or 1) <= 0 for timer in timers)


# -- in the middle of a training -------------------------------------------------------------------------------------


def metrics(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the metrics of callbacks, loggers and the progress bar."""
    connector = trainer._logger_connector
    return [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics]


def set_metrics(trainer: pl.Trainer, values: list[dict[str, Any]]) -> None:
    """Set the metrics to another rank's :func:`metrics`."""
    connector = trainer._logger_connector
    connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics = values


def restore(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Restore everything from a checkpoint dict, in the middle of a loop."""
    with _loaded(trainer, checkpoint) as connector:
        connector.restore_datamodule()
        connector.restore_model()
        connector.restore_callbacks()
        connector.restore_precision_plugin_state()
        connector.restore_loops()
        _catch_up(trainer)
        connector.restore_optimizers_and_schedulers()
    _forget_the_restart(trainer)


def restore_step(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Restore only what an optimizer step changes."""
    with _loaded(trainer, checkpoint) as connector:
        trainer.strategy.load_model_state_dict(checkpoint, strict=trainer.lightning_module.strict_loading)
        connector.restore_precision_plugin_state()
        connector.restore_optimizers()


def _catch_up(trainer: pl.Trainer) -> None:
    """Let callbacks give the optimizers the parameters and schedulers that they had given them in another process."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            callback.on_fit_start(trainer, trainer.lightning_module)
        elif isinstance(callback, StochasticWeightAveraging) and callback._scheduler_state is not None:
            # Without what it may have done in this process before.
            callback._initialized, callback.n_averaged = False, None
            callback.on_train_epoch_start(trainer, trainer.lightning_module)


@contextmanager
def _loaded(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> Iterator[Any]:
    """Let Lightning's connector restore from a checkpoint dict."""
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = checkpoint
    try:
        yield connector
    finally:
        connector._loaded_checkpoint = {}


def _forget_the_restart(trainer: pl.Trainer) -> None:
    """Clear the restart flags of restored loops, which are in the middle of a batch already."""
    loop = trainer.fit_loop
    loop.restarting = False
    for each in (loop, loop.epoch_loop, loop.epoch_loop.automatic_optimization, loop.epoch_loop.val_loop):
        each._loaded_from_state_dict = each._resuming_from_checkpoint = False


def leaves_training_next(trainer: pl.Trainer) -> bool:
    """Return whether something other than the next step follows the completed one, which is not counted yet."""
    loop = trainer.fit_loop.epoch_loop
    is_last = loop.max_steps != -1 and loop.global_step + 1 >= loop.max_steps
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return is_last or trainer.should_stop or loop._num_ready_batches_reached() or loop._should_check_val_fx(fetcher)


def validates_by_time(trainer: pl.Trainer) -> bool:
    """Return whether the clock says when a validation follows. Lightning 2.5 cannot do that."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def transferred(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a batch of the loader as a training step gets it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def compute_gradient(trainer: pl.Trainer, batch: Any, ago: int = 0) -> Tensor:
    """Compute the gradient of a batch as a training step does; discard the gradients before it. Return the loss."""
    trainer.lightning_module.zero_grad()
    loop = trainer.fit_loop.epoch_loop
    kwargs = loop._build_kwargs(OrderedDict(), batch, loop.batch_idx - ago)
    with torch.enable_grad(), of_batch(trainer, batch):
        output = call._call_strategy_hook(trainer, "training_step", *kwargs.values())
        loss = ClosureResult.from_training_step_output(output).closure_loss
        assert loss is not None
        call._call_strategy_hook(trainer, "backward", loss, trainer.optimizers[0])
    return loss


def silence_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Disable Lightning's broadcast of SIGTERM before every batch.

    Lightning ignores errors of this broadcast, so after a failure the ranks would be in different collectives. Instead,
    the ranks agree on the step to stop at through the supervisor's store. Lightning 2.5 has no such broadcast.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _no_broadcast  # type: ignore[method-assign]


def _no_broadcast() -> None:
    """Do nothing. Unlike a lambda, it can be pickled with the Trainer."""


def batch_size(trainer: pl.Trainer, batch: Any) -> int:
    """Return the number of samples in a batch as Lightning's logging counts them; 1 if unknown."""
    try:
        return extract_batch_size(batch)
    except (RecursionError, MisconfigurationException):
        return 1
