"""``SCARContinuation``: the workers of a loop outlive each other."""

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.constants import default_pg_timeout

from lightning_scar.continuation.outages import FlushMode, OnFailure, Outage, OutagePolicy
from lightning_scar.continuation.step import Continuation
from lightning_scar.elastic.worker.member import Member, hang_timeout
from lightning_scar.loops.framework import Framework


class SCARContinuation:
    """Lets the workers of a loop outlive each other ('Training Through Failure', 2024).

    It makes the process groups, so it comes before the ``Accelerator`` or ``Fabric``; then it is given to the object
    whose :meth:`~lightning_scar.loops.loop.SCARLoop.training_step` makes the steps. The program must be started with
    ``lightning-scar run``; by other means it works without replacements, and says so.

    Args:
        on_failure: What survivors do until the replacement is there. ``"shrink"``: they go on synchronously, as a
            smaller group. ``"buffer"``: they collect gradients on extra batches, up to ``max_staleness``, and apply
            them as the interrupted step. ``"wait"``: nothing.
        min_world_size: With fewer workers than that, they save and stop.
        max_staleness: How many gradients a survivor collects at most beyond that of the interrupted step.
        flush: How collected gradients are applied: ``"mean"`` as one step, ``"replay"`` one by one.
        backend: That of the process groups; ``None`` is NCCL where there is CUDA, else gloo.

    Raises:
        ValueError: If a value is out of range.
        RuntimeError: If there is a process group already.

    Example::

        >>> continuation = SCARContinuation(on_failure="wait")
        >>> # accelerator = Accelerator()
        >>> # scar = SCARAccelerator(accelerator, "runs/a/scar", every_n_steps=25, continuation=continuation)
        >>> continuation.outages
        []

    """

    def __init__(
        self,
        *,
        on_failure: OnFailure = "shrink",
        min_world_size: int = 1,
        max_staleness: int = 16,
        flush: FlushMode = "mean",
        backend: str | None = None,
    ) -> None:
        self.policy = OutagePolicy(on_failure, min_world_size, max_staleness, flush)
        #: This worker's part in the job; ``None`` if no supervisor started it.
        self.member = Member.of_environment()
        #: The engine, once a loop has begun.
        self.engine: Continuation | None = None
        self._backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        if self.member is None:
            _warn_of_missing_supervisor()
        elif dist.is_initialized() and self.member.generation is None:
            raise RuntimeError(
                "there is a process group already; make SCARContinuation() first, before Accelerator(), Fabric or "
                "torch.distributed.init_process_group"
            )
        elif self.member.is_joiner:
            # It has its set-up to itself, whatever collectives are in it.
            dist.init_process_group(store=HashStore(), rank=0, world_size=1, **self.group_options())
        elif not dist.is_initialized():
            self.member.enter_first(**self.group_options())

    def prepare(self, framework: Framework) -> None:
        """Makes a framework ready for this worker's part in the job.

        Args:
            framework: That of the loop.

        """
        if self.member is not None:
            framework.check_beginning()
            if self.is_joiner:
                framework.set_up_joiner(self.member.slot, self.member.world_size)

    @property
    def outages(self) -> list[Outage]:
        """The failures that this worker has lived through, in order."""
        return self.engine.outages.list if self.engine is not None else []

    @property
    def is_joiner(self) -> bool:
        """Whether this worker is a replacement that has not been taken in yet."""
        return self.member is not None and self.member.is_joiner

    @property
    def timeout(self) -> timedelta:
        """How long a worker is blocked in a collective before it gives up."""
        return hang_timeout() or default_pg_timeout

    def group_options(self) -> dict[str, Any]:
        """How the process group of any generation is made."""
        options: dict[str, Any] = {"backend": self._backend, "timeout": self.timeout}
        if self._backend == "nccl":
            # The membership aborts a broken group itself; NCCL's watchdog would end the process.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            options["device_id"] = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return options


def _warn_of_missing_supervisor() -> None:
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        warnings.warn(
            "lightning-scar: SCARContinuation was not started by lightning-scar's supervisor: no replacement will come "
            "for a worker that dies. Use `lightning-scar run --nproc-per-node N script.py` in the place of torchrun, "
            "`accelerate launch` or a notebook launcher.",
            stacklevel=3,
        )
