"""``SCARDDPStrategy``: DDP whose workers outlive each other."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_scar.continuation.outages import FlushMode, OnFailure, Outage, OutagePolicy
from lightning_scar.elastic.worker.member import Member, hang_timeout
from lightning_scar.lightning import replacement
from lightning_scar.lightning.launcher import SupervisedLauncher
from lightning_scar.lightning.restart import calls
from lightning_scar.lightning.training import Fit


class SCARDDPStrategy(DDPStrategy):
    """DDP that goes on when a worker dies ('Training Through Failure', 2024).

    The survivors stay in their processes, compute the interrupted step again, and take the replacement in that the
    supervisor starts. No completed step is undone. Without failures the parameters are those of ``"ddp"``, bit for bit.

    Args:
        on_failure: What survivors do until the replacement is there. ``"shrink"``: they go on synchronously, as a
            smaller group. ``"buffer"``: they collect gradients on extra batches, up to ``max_staleness``, and apply
            them as the interrupted step. ``"wait"``: nothing.
        min_world_size: With fewer workers than that, they save and stop.
        max_staleness: How many gradients a survivor collects at most beyond that of the interrupted step.
        flush: How collected gradients are applied: ``"mean"`` as one step, ``"replay"`` one by one.
        max_restarts: How many deaths within an hour are too many.
        hang_timeout: For how many seconds the others wait for a worker that hangs; by default the process group's
            ``timeout``.
        kwargs: As for :class:`~lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        MisconfigurationException: If a value is out of range, and when ``fit`` begins if the model optimizes manually.

    Example::

        >>> from lightning_scar import SCARDDPStrategy
        >>> strategy = SCARDDPStrategy(on_failure="wait")
        >>> strategy.outages
        []

    """

    strategy_name = "scar_ddp"

    def __init__(
        self,
        *,
        on_failure: OnFailure = "shrink",
        min_world_size: int = 1,
        max_staleness: int = 16,
        flush: FlushMode = "mean",
        max_restarts: int = 3,
        hang_timeout: float | None = None,
        **kwargs: Any,
    ) -> None:
        if hang_timeout is not None:
            kwargs["timeout"] = timedelta(seconds=hang_timeout)
        super().__init__(**kwargs)
        self._policy = OutagePolicy(on_failure, min_world_size, max_staleness, flush)
        self._max_restarts = max_restarts
        self._member: Member | None = None
        self._fit: Fit | None = None

    @property
    def outages(self) -> list[Outage]:
        """The failures that this worker has lived through, in order."""
        return self._fit.continuation.outages.list if self._fit is not None else []

    @property
    def is_joiner(self) -> bool:
        """Whether this worker is a replacement that has not been taken in yet."""
        return self._fit is not None and self._fit.continuation.is_joiner

    # -- processes and groups ------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        self._member = Member.of_environment()
        assert self.cluster_environment is not None
        options = None
        if self._member is None and not self.cluster_environment.creates_processes_externally:
            options = self._run_options()
        elif self._member is None:
            rank_zero_warn(
                "strategy='scar_ddp' was not started by lightning-scar's supervisor: it works as 'ddp', and no "
                "replacement will come for a worker that dies. Use `lightning-scar run` in the place of torchrun."
            )
        self._launcher = SupervisedLauncher(options, self._begin, self._failed)

    def _run_options(self) -> list[str]:
        options = ["--nproc-per-node", str(self.num_processes), "--max-restarts", str(self._max_restarts)]
        if self._timeout is not None:
            options += ["--hang-timeout", f"{self._timeout.total_seconds():g}"]
        if self.num_nodes > 1:
            endpoint = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
            node = os.environ.get("NODE_RANK", "0")
            options += ["--nnodes", str(self.num_nodes), "--node-rank", node, "--rdzv-endpoint", endpoint]
        return options

    @override
    def setup_distributed(self) -> None:
        if self._member is None:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        if self._fit is None:
            trainer = self.lightning_module.trainer if self.lightning_module is not None else None
            assert trainer is not None
            self._fit = Fit(self, trainer, self._member, self._policy)
        self._fit.set_up()

    def group_options(self) -> dict[str, Any]:
        """How the process group of any generation is made."""
        options: dict[str, Any] = {"backend": self._process_group_backend, "timeout": self.timeout}
        if self.root_device.type == "cuda":
            # The membership aborts a broken group itself; NCCL's watchdog would end the process.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            options["device_id"] = self.root_device
        return options

    @property
    def timeout(self) -> timedelta:
        """How long a worker is blocked in a collective before it gives up."""
        return hang_timeout() or self._timeout or default_pg_timeout

    @property
    @override
    def is_global_zero(self) -> bool:
        """Whether this worker writes checkpoints: the lowest of those that are alive."""
        return self._member.is_leader if self._member is not None else super().is_global_zero

    # -- the wrapper around the model ----------------------------------------------------------------------------

    @override
    def configure_ddp(self) -> None:
        # A replacement has no group yet; it is wrapped when it is taken in.
        if self._member is None or dist.is_initialized():
            super().configure_ddp()

    def wrap(self) -> None:
        """Wraps the model for the present generation, whose members hold the same weights."""
        self.unwrap()
        init_sync, self._ddp_kwargs = self._ddp_kwargs, {**self._ddp_kwargs, "init_sync": False}
        try:
            self.configure_ddp()
        finally:
            self._ddp_kwargs = init_sync

    def unwrap(self) -> None:
        """Makes the model compute alone."""
        wrapper, module = self.model, self.lightning_module
        if isinstance(wrapper, DistributedDataParallel):
            # It is part of a reference cycle; until that is collected its hooks would go on to reduce gradients.
            vars(wrapper).clear()
        self.model = module
        # A forward that failed leaves the redirection of Lightning's wrapper behind.
        vars(module).pop("forward", None)

    # -- training ------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        check_optimizers(self.lightning_module.trainer)
        if self._fit is not None:
            self._fit.begin()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._fit is not None:
            self._fit.continuation.batch = batch

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "pl.LightningModule | Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        if self._fit is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        step = super().optimizer_step
        return self._fit.step(lambda closure: step(optimizer, closure, model, **kwargs), closure)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._fit is not None:
            self._fit.continuation.end()

    def _begin(self, trainer: "pl.Trainer") -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            check_module(trainer.lightning_module)
        if self._member is not None:
            calls.begin(trainer, writes=self._member.is_leader)
        elif self.num_processes * self.num_nodes == 1:
            rank_zero_warn(
                "strategy='scar_ddp' with devices=1: nobody survives when the only worker dies; it is started again. "
                "Add a SCARCheckpoint, from which it resumes."
            )

    def _failed(self, error: BaseException) -> None:
        if self._fit is None or self._member is None:
            return
        if self._fit.continuation.is_due_to_failure(error):
            self._fit.continuation.restart()
        elif isinstance(error, SIGTERMException | KeyboardInterrupt):
            self._member.end()


def check_module(module: "pl.LightningModule") -> None:
    """Refuses a model that cannot be continued.

    Raises:
        MisconfigurationException: For manual optimization.

    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "strategy='scar_ddp' cannot go on after a failure with manual optimization, in which it does not see where "
            "a step begins. Set `automatic_optimization = True`, or use strategy='ddp'."
        )


def check_optimizers(trainer: "pl.Trainer") -> None:
    """Refuses optimizers that cannot be continued.

    Raises:
        MisconfigurationException: For one that calls its closure several times, and for a sharded one without a running
            checkpoint.

    """
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            "strategy='scar_ddp' cannot go on after a failure inside a step of LBFGS, which changes the parameters and "
            "computes gradients in turn. Use another optimizer, or strategy='ddp'."
        )
    if replacement.has_sharded_optimizer(trainer) and not replacement.scar_checkpoints(trainer):
        raise MisconfigurationException(
            "strategy='scar_ddp' with a ZeroRedundancyOptimizer needs a SCARCheckpoint: what a dead worker alone held "
            "of the optimizer's state comes from there. Add SCARCheckpoint(...) to the Trainer's callbacks."
        )
