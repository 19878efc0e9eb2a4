"""``SCARContinuation``: the workers of a loop survive the death of others."""

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
from lightning_scar.elastic.worker import groups
from lightning_scar.elastic.worker.member import Member
from lightning_scar.loops.framework import Framework


class SCARContinuation:
    """Lets the workers of a loop survive the death of others ('Training Through Failure', 2024).

    It creates the process groups, so create it before the ``Accelerator`` or ``Fabric``. Then pass it to the object
    whose :meth:`~lightning_scar.loops.loop.SCARLoop.training_step` makes the steps. Start the program with
    ``lightning-scar run``; otherwise there are no replacements, and a warning says so.

    Args:
        on_failure: What survivors do until the replacement has joined. ``"cover"``: they compute the missing worker's
            batches besides their own, so that each step is the same as without the failure. ``"shrink"``: they continue
            synchronously, as a smaller group. ``"buffer"``: they collect gradients on extra batches, up to
            ``max_staleness``, and apply them as the interrupted step. ``"wait"``: they wait.
        min_world_size: If fewer workers are left, they save and stop.
        max_staleness: The most gradients that a survivor collects beyond that of the interrupted step.
        flush: How collected gradients are applied: ``"mean"`` as one step, ``"replay"`` one by one.
        backend: The backend of the process groups; ``None`` is NCCL with CUDA, else gloo. A loop on the CPU of a
            machine with CUDA, such as that of ``Accelerator(cpu=True)``, needs ``"gloo"``.

    Raises:
        ValueError: If a value is out of range.
        RuntimeError: If a process group exists already.

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
        on_failure: OnFailure = "cover",
        min_world_size: int = 1,
        max_staleness: int = 16,
        flush: FlushMode = "mean",
        backend: str | None = None,
    ) -> None:
        self.policy = OutagePolicy(on_failure, min_world_size, max_staleness, flush)
        #: This worker's membership in the job; ``None`` without a supervisor.
        self.member = Member.of_environment()
        #: The engine, after a loop has started.
        self.engine: Continuation | None = None
        self._backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        if self.member is None:
            _warn_of_missing_supervisor()
        elif dist.is_initialized() and self.member.generation is None:
            raise RuntimeError(
                "a process group exists already; create SCARContinuation() first, before Accelerator(), Fabric() or "
                "torch.distributed.init_process_group"
            )
        elif self.member.is_joiner:
            # A group of its own, so that collectives in the script's set-up work.
            groups.form(store=HashStore(), rank=0, world_size=1, **self.group_options())
        elif not dist.is_initialized():
            self.member.enter_first(**self.group_options())

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which is no member of the job."""
        return {**vars(self), "member": None, "engine": None}

    def prepare(self, framework: Framework) -> None:
        """Prepare a framework for this worker's membership in the job.

        Args:
            framework: The loop's framework.

        """
        if self.member is not None:
            framework.check_beginning()
            if self.is_joiner:
                framework.set_up_joiner(self.member.slot, self.member.world_size)

    @property
    def outages(self) -> list[Outage]:
        """The failures that this worker has survived, in order."""
        return self.engine.outages.list if self.engine is not None else []

    @property
    def is_joiner(self) -> bool:
        """Whether this worker is a replacement that has not joined yet."""
        return self.member is not None and self.member.is_joiner

    @property
    def timeout(self) -> timedelta:
        """The time after which a blocked collective fails."""
        return groups.hang_timeout() or default_pg_timeout

    def group_options(self) -> dict[str, Any]:
        """Return the arguments of ``init_process_group``, the same for every generation."""
        options: dict[str, Any] = {"backend": self._backend, "timeout": self.timeout}
        if "nccl" in self._backend and torch.cuda.is_available():
            options["device_id"] = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(options["device_id"])
        return options


def _warn_of_missing_supervisor() -> None:
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        warnings.warn(
            "lightning-scar: SCARContinuation runs without lightning-scar's supervisor, so a worker that dies is not "
            "replaced. Use `lightning-scar run --nproc-per-node N script.py` instead of torchrun, `accelerate launch` "
            "or a notebook launcher.",
            stacklevel=3,
        )
