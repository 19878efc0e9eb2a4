"""The private API of Lightning that has to do with SLURM's signal, as :mod:`~lightning_scar.lightning.private`."""

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


def requeue_signal(trainer: pl.Trainer) -> int | None:
    """Return the signal on which Lightning lets SLURM requeue the job; ``None`` if it does not."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal


def requeue(trainer: pl.Trainer, signum: int) -> None:
    """Let Lightning requeue the job, without the checkpoint that it would write: a collective, and of one rank only."""
    trainer.save_checkpoint = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        trainer._signal_connector._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]
    finally:
        vars(trainer).pop("save_checkpoint")
