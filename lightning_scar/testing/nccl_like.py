"""A process group on the CPU that fails as NCCL's does: a dead peer makes no error, and only ``abort()`` ends a wait.

Collectives are queued and return at once; a thread runs them in order over gloo, as a device runs its kernels. A peer
that dies blocks the queue, and all that is queued later. ``abort()``, from any thread, ends all of it without an error
and leaves garbage in the tensors. What is called on an aborted group raises.

torch's watchdog is here, too, with its environment variables: it notices a collective that takes longer than the
group's timeout, writes a key that ends all processes which look at the same store, and ends its own.
"""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ErrorType, _create_work_from_future  # type: ignore[attr-defined]
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store  # type: ignore[attr-defined]
from torch.futures import Future
from torch.utils._pytree import tree_leaves, tree_map

from lightning_scar.elastic.worker.gloo import in_a_thread
from lightning_scar.elastic.worker.sockets import Connections

#: The name to give as ``backend``.
NAME = "nccl_like"
#: What torch's watchdog writes into the store when it gives up.
_DUMP_KEY = "exception_dump"
#: Seconds between two looks of the watchdog.
_WATCH = 0.05


def register() -> None:
    """Let ``torch.distributed.init_process_group(backend="nccl_like")`` know it."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, NCCLLikeGroup, devices=["cpu"])


class _Collective(NamedTuple):
    """What is queued.

    Attributes:
        run: Runs it on copies of its tensors, and returns the copies that it has written.
        outputs: The tensors to write.
        future: Completed with them.

    """

    run: Callable[[], list[Tensor]]
    outputs: list[Tensor]
    future: "Future[list[Tensor]]"


def _collective(name: str) -> Callable[..., dist.Work]:
    def launch(self: "NCCLLikeGroup", *args: Any, **options: Any) -> dist.Work:
        return self._launch(name, *args, *options.values())

    return launch


class NCCLLikeGroup(ProcessGroup):
    """A process group with the semantics of NCCL's.

    Args:
        store: Where its members find each other.
        rank: This process's rank.
        size: The number of members.
        timeout: How long a collective may take before the watchdog acts.

    Example::

        >>> from torch.distributed import HashStore
        >>> register()
        >>> dist.init_process_group("nccl_like", store=HashStore(), rank=0, world_size=1)
        >>> tensor = torch.ones(2)
        >>> dist.all_reduce(tensor)
        >>> tensor
        tensor([1., 1.])
        >>> dist.distributed_c10d._abort_process_group()

    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._root_store = _root(store)
        self._timeout = timeout.total_seconds()
        self._connections = Connections()
        with self._connections.forming(lambda: store) as known:
            # Nothing but an abort ends a wait, so gloo's own timeout is out of reach.
            forming = in_a_thread(partial(ProcessGroupGloo, known, rank, size, timedelta(days=1)))
            while not forming.done():
                wait([forming], _WATCH)
                # It raises if its connection is cut. gloo itself goes on to wait for who has told its address and died.
                store.check([_DUMP_KEY])
            self._gloo = forming.result()
        self._changed = threading.Condition()
        self._queue: deque[_Collective] = deque()
        #: When the present collective began; ``None`` while there is none.
        self._began: float | None = None
        self._error = ErrorType.SUCCESS
        self._is_aborted = self._is_closed = False
        for work in (self._run, self._watch):
            threading.Thread(target=work, name=f"{NAME} {work.__name__}", daemon=True).start()

    # -- what torch calls ----------------------------------------------------------------------------------------

    allgather = _collective("allgather")
    _allgather_base = _collective("_allgather_base")
    allreduce = _collective("allreduce")
    allreduce_coalesced = _collective("allreduce_coalesced")
    alltoall = _collective("alltoall")
    alltoall_base = _collective("alltoall_base")
    barrier = _collective("barrier")
    broadcast = _collective("broadcast")
    gather = _collective("gather")
    recv = _collective("recv")
    reduce = _collective("reduce")
    reduce_scatter = _collective("reduce_scatter")
    _reduce_scatter_base = _collective("_reduce_scatter_base")
    scatter = _collective("scatter")
    send = _collective("send")
    # Newer names of the same.
    all_gather_single = _allgather_base
    all_to_all_single = alltoall_base
    reduce_scatter_single = _reduce_scatter_base

    def getBackendName(self) -> str:
        """Return the backend's name."""
        return NAME

    def abort(self) -> None:
        """End all that waits, from any thread, and leave garbage in its tensors.

        Raises:
            RuntimeError: If the group is aborted already.

        """
        with self._changed:
            if self._is_aborted:
                raise RuntimeError(f"the {NAME} group was aborted already")
            self._is_aborted = True
            pending, self._queue = self._queue, deque()
            self._changed.notify_all()
        for collective in pending:
            _fill_with_garbage(collective.outputs)
            collective.future.set_result(collective.outputs)
        self._connections.cut()

    def shutdown(self) -> None:
        """End its threads when what is queued is done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # -- the queue -----------------------------------------------------------------------------------------------

    def _launch(self, name: str, *args: Any) -> dist.Work:
        copies = tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, args)

        def run() -> list[Tensor]:
            getattr(self._gloo, name)(*copies).wait()
            return _tensors(copies[:1])

        future: Future[list[Tensor]] = Future()
        with self._changed:
            if self._is_aborted:
                raise dist.DistBackendError(f"the {NAME} communicator was aborted")
            self._queue.append(_Collective(run, _tensors(args[:1]), future))
            self._changed.notify_all()
        work: dist.Work = _create_work_from_future(future)
        return work

    def _run(self) -> None:
        """Run what is queued; the thread of the device."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_aborted or self._is_closed)
                if self._is_aborted or not self._queue:
                    return
                self._began = time.monotonic()
                collective = self._queue[0]
            try:
                results = collective.run()
            except RuntimeError:
                # A peer is dead. Nobody is told.
                with self._changed:
                    self._changed.wait_for(lambda: self._is_aborted)
                return
            with self._changed:
                if not self._queue:
                    return  # Aborted meanwhile.
                self._began = None
                self._queue.popleft()
                with torch.no_grad():
                    for output, result in zip(collective.outputs, results, strict=True):
                        output.detach().copy_(result)
            collective.future.set_result(collective.outputs)

    # -- torch's watchdog ----------------------------------------------------------------------------------------

    @property
    def _has_ended(self) -> bool:
        return self._is_aborted or self._is_closed

    def get_error(self) -> ErrorType:
        """Return what the watchdog has noted."""
        return self._error

    def _watch(self) -> None:
        while not self._has_ended:
            time.sleep(_WATCH)
            # Other threads change these.
            began: float | None = self._began
            is_late = began is not None and time.monotonic() - began > self._timeout
            if is_late and self._error == ErrorType.SUCCESS:
                self._error = ErrorType.TIMEOUT
                self._give_up()
            if _is_on("TORCH_NCCL_ENABLE_MONITORING") and _is_on("TORCH_NCCL_DUMP_ON_TIMEOUT"):
                with suppress(dist.DistError):
                    if self._root_store.check([_DUMP_KEY]):
                        _end_process(f"there is a key {_DUMP_KEY} in the store")

    def _give_up(self) -> None:
        # It tells everybody who uses the store, also members of other groups.
        self._root_store.set(_DUMP_KEY, str(self.rank()))
        time.sleep(4e-3 * int(os.environ.get("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "15000")))
        handling = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
        if handling in ("1", "2"):
            with suppress(RuntimeError):
                self.abort()
        if handling in ("1", "3"):
            _end_process("a collective takes too long")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "1").lower() in ("1", "true", "y", "yes", "t")


def _end_process(why: str) -> None:
    print(f"{NAME}: {why}; the watchdog ends the process", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)


def _root(store: Store) -> Store:
    """Return the store behind all prefixes."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _fill_with_garbage(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() or tensor.is_complex() else -1)
