"""``SCARDDPStrategy``: DDP whose workers survive the death of others."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_scar.continuation.model_modes import trained, unfrozen
from lightning_scar.continuation.outages import FlushMode, OnFailure, Outage, OutagePolicy
from lightning_scar.continuation.wrappers import Wrapper
from lightning_scar.elastic.worker import groups
from lightning_scar.elastic.worker.member import Member
from lightning_scar.lightning import private, replacement
from lightning_scar.lightning.launcher import SupervisedLauncher
from lightning_scar.lightning.restart import trainer_calls
from lightning_scar.lightning.training import TrainerTraining


class SCARDDPStrategy(DDPStrategy):
    """DDP that continues when a worker dies ('Training Through Failure', 2024).

    The survivors stay in their processes, repeat the interrupted step, and let the replacement join that the supervisor
    starts. No completed step is lost. Without failures, the parameters equal those of ``"ddp"`` bit for bit.

    Args:
        on_failure: What survivors do until the replacement has joined. ``"cover"``: they compute the missing worker's
            batches besides their own, so that each step is the same as without the failure. ``"shrink"``: they continue
            synchronously, as a smaller group. ``"buffer"``: they collect gradients on extra batches, up to
            ``max_staleness``, and apply them as the interrupted step. ``"wait"``: they wait.
        min_world_size: If fewer workers are left, they save and stop.
        max_staleness: The most gradients that a survivor collects beyond that of the interrupted step.
        flush: How collected gradients are applied: ``"mean"`` as one step, ``"replay"`` one by one.
        max_restarts: The number of failures within an hour after which the job is not continued.
        hang_timeout: Seconds that the others wait for a worker that hangs; by default the process group's ``timeout``.
        spares: How many replacements wait on each node, having run the script up to its Trainer. They cost host memory.
        kwargs: Arguments of :class:`~lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        MisconfigurationException: If a value is out of range, and when ``fit`` starts with manual optimization.

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
        on_failure: OnFailure = "cover",
        min_world_size: int = 1,
        max_staleness: int = 16,
        flush: FlushMode = "mean",
        max_restarts: int = 3,
        hang_timeout: float | None = None,
        spares: int = 0,
        **kwargs: Any,
    ) -> None:
        if hang_timeout is not None:
            kwargs["timeout"] = timedelta(seconds=hang_timeout)
        super().__init__(**kwargs)
        self._policy = OutagePolicy(on_failure, min_world_size, max_staleness, flush)
        self._max_restarts = max_restarts
        self._spares = spares
        self._member: Member | None = None
        self._training: TrainerTraining | None = None
        self._starts_workers = False
        self._accumulates = False
        self._wrapper: Wrapper | None = None
        #: The parameters that were not frozen when the model was to be wrapped first.
        self._trained: list[Parameter] = []
        #: A method of the model that is no method of its class, such as a compiled one.
        self._forward: Callable[..., Any] | None = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which is in no group: neither are the processes that get one."""
        state = super().__getstate__()
        nothing = dict.fromkeys(("_member", "_training", "_wrapper", "_forward"))
        return {**state, **nothing, "_trained": [], "_model": state["_lightning_module"]}

    @property
    def outages(self) -> list[Outage]:
        """The failures that this worker has survived, in order."""
        return self._training.continuation.outages.list if self._training is not None else []

    @property
    def is_supervised(self) -> bool:
        """Whether a supervisor has started this process."""
        return self._member is not None

    @property
    def is_stopping(self) -> bool:
        """Whether the job ends."""
        return self._member is not None and self._member.is_stopping

    @property
    def is_joiner(self) -> bool:
        """Whether this worker is a replacement that has not joined yet."""
        return self._training is not None and self._training.continuation.is_joiner

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
                "strategy='scar_ddp' runs without lightning-scar's supervisor, so it works as 'ddp', and a worker that "
                "dies is not replaced. Use `lightning-scar run` instead of torchrun."
            )
        self._starts_workers = options is not None
        self._launcher = SupervisedLauncher(options, self._on_call, self._on_error, self._on_signal)

    def _run_options(self) -> list[str]:
        options = ["--nproc-per-node", str(self.num_processes), "--max-restarts", str(self._max_restarts)]
        options += ["--spares", str(self._spares)] if self._spares else []
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
        if self._training is None:
            trainer = self.lightning_module.trainer if self.lightning_module is not None else None
            assert trainer is not None
            self._training = TrainerTraining(self, trainer, self._member, self._policy)
        self._training.set_up()

    def group_options(self) -> dict[str, Any]:
        """Return the arguments of ``init_process_group``, the same for every generation."""
        assert self._process_group_backend is not None
        options = {"backend": self._process_group_backend, "timeout": self.timeout}
        if self.root_device.type == "cuda":
            options["device_id"] = self.root_device
        return options

    @property
    def timeout(self) -> timedelta:
        """The time after which a blocked collective fails."""
        return groups.hang_timeout() or self._timeout or default_pg_timeout

    @property
    @override
    def is_global_zero(self) -> bool:
        """Whether this worker writes checkpoints: the lowest rank that is alive."""
        return self._member.is_leader if self._member is not None else super().is_global_zero

    # -- the wrapper around the model ----------------------------------------------------------------------------

    @override
    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        self._trained = trained(self.lightning_module)
        self._forward = vars(self.lightning_module).get("forward")
        # A replacement has no group yet; its model is wrapped when it joins.
        if self._member is None or dist.is_initialized():
            super().configure_ddp()

    @override
    def _setup_model(self, model: Module) -> DistributedDataParallel:
        with unfrozen(self._trained):
            wrapper = super()._setup_model(model)
        self._wrapper = Wrapper(wrapper, self._trained)
        return wrapper

    def wrap(self) -> None:
        """Wrap the model for the current generation, whose members hold the same weights."""
        self.unwrap()
        if self._wrapper is not None:
            self._wrapper.wrap()
            self.model = self._wrapper.ddp
            return
        # This worker joins; the others, whose weights it has, make their wrappers without a collective.
        options, self._ddp_kwargs = self._ddp_kwargs, {**self._ddp_kwargs, "init_sync": False}
        super().configure_ddp()
        self._ddp_kwargs = options

    def unwrap(self) -> None:
        """Remove the wrapper, so that the model works without a group."""
        if self._wrapper is not None:
            self._wrapper.unwrap()
        self.model = module = self.lightning_module
        # A failed forward leaves the redirection of Lightning's wrapper in place.
        vars(module).pop("forward", None)
        vars(module).update({"forward": self._forward} if self._forward is not None else {})

    # -- collectives ---------------------------------------------------------------------------------------------

    @override
    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked(super().reduce(*args, **kwargs))

    @override
    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked(super().broadcast(*args, **kwargs))

    @override
    def all_gather(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked(super().all_gather(*args, **kwargs))

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        super().barrier(*args, **kwargs)
        self._checked(None)

    def _checked(self, result: Any) -> Any:
        """Return what a collective returned, unless it is garbage: callbacks would act on it."""
        if self._member is not None:
            self._member.check_health()
        return result

    # -- training ------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        check_optimizers(self.lightning_module.trainer)
        if self._training is not None:
            self._training.start()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._training is not None:
            self._training.continuation.batch = batch

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "pl.LightningModule | Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        if self._training is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        step = super().optimizer_step
        return self._training.step(lambda closure: step(optimizer, closure, model, **kwargs), closure)

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Mark a batch that makes no step, because gradients accumulate."""
        self._accumulates = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._accumulates = False

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._training is None or not self._accumulates:
            return super().training_step(*args, **kwargs)
        step = super().training_step
        return self._training.continuation.accumulate(lambda: step(*args, **kwargs), gradients=False)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        is_in_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        # By the clock the ranks need not agree.
        if self._training is not None and is_in_fit and not private.validates_by_time(trainer):
            self._training.continuation.end_epoch()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._training is not None:
            self._training.continuation.end_epoch()
            self._training.continuation.finish()
            self._training.continuation.wait_until_over()

    def _on_call(self, trainer: "pl.Trainer") -> None:
        if self._starts_workers:
            check_is_first(self.local_rank)
        if trainer.state.fn == TrainerFn.FITTING:
            check_module(trainer.lightning_module)
        if self._member is not None:
            trainer_calls.start_call(trainer, writes=self._member.is_leader)
        elif self.num_processes * self.num_nodes == 1:
            rank_zero_warn(
                "strategy='scar_ddp' with devices=1: if the only worker dies, it is restarted and its state is lost. "
                "Add a SCARCheckpoint to resume from."
            )

    def _on_signal(self, signum: int) -> None:
        if self._member is not None:
            self._member.ask_to_stop(signum)

    def _on_error(self, error: BaseException) -> None:
        if self._training is None or self._member is None:
            return
        if self._training.continuation.caused_by_peer_loss(error):
            self._training.continuation.restart()
            raise SIGTERMException from error
        if isinstance(error, SIGTERMException | KeyboardInterrupt):
            self._member.end()


def check_is_first(local_rank: int) -> None:
    """Raise an error in a process that something else started, but whose environment says the opposite.

    Raises:
        MisconfigurationException: If this is not the first process of its node.

    """
    if local_rank > 0:
        raise MisconfigurationException(
            f"strategy='scar_ddp' starts its workers from the first process of a node, but this one has local rank "
            f"{local_rank}. Unset LOCAL_RANK, start the script with `lightning-scar run`, or let your "
            "ClusterEnvironment return True as `creates_processes_externally`."
        )


def check_module(module: "pl.LightningModule") -> None:
    """Raise an error for a model that cannot continue after a failure.

    Raises:
        MisconfigurationException: For manual optimization.

    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "strategy='scar_ddp' cannot continue after a failure with manual optimization, because it does not see "
            "where a step starts. Set `automatic_optimization = True`, or use strategy='ddp'."
        )


def check_optimizers(trainer: "pl.Trainer") -> None:
    """Raise an error for optimizers that cannot continue after a failure.

    Raises:
        MisconfigurationException: For one that calls its closure several times, and for a sharded one without a running
            checkpoint.

    """
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            "strategy='scar_ddp' cannot continue after a failure in a step of LBFGS, which changes the parameters and "
            "computes gradients several times. Use another optimizer, or strategy='ddp'."
        )
    if replacement.has_sharded_optimizer(trainer) and not replacement.scar_checkpoints(trainer):
        raise MisconfigurationException(
            "strategy='scar_ddp' with a ZeroRedundancyOptimizer requires a SCARCheckpoint, to restore the optimizer "
            "shard of a dead worker. Add SCARCheckpoint(...) to the Trainer's callbacks."
        )
