"""A process group over gloo, of which any thread can wake what waits in it.

gloo forgets a send or a receive that is under way while its connection closes: whoever waits for it, waits for the
group's timeout, half an hour by default.
"""

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import wait
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, ProcessGroupGloo, Store  # type: ignore[attr-defined]
from torch.futures import Future
from typing_extensions import override

#: What torch calls it while it forms. Afterwards it is ``gloo``, as all that asks for the backend expects.
_NAME = "gloo_that_can_be_woken"
#: gloo ends what it has not forgotten a few milliseconds after its connections are closed.
_SETTLE_SECONDS = 1.0
#: Between two looks at whether a member was lost while the group forms.
_POLL_SECONDS = 0.05

T = TypeVar("T")


def form(stops: Callable[[], bool] = lambda: False, **options: Any) -> None:
    """Form the default process group over gloo.

    Args:
        stops: Whether a member is known to be lost. gloo waits until its timeout for one that has told its address.
        options: As for ``torch.distributed.init_process_group``, without ``backend``.

    Raises:
        RuntimeError: If ``stops`` returns ``True`` before all members are connected.

    """

    def connect(store: Store, rank: int, size: int, timeout: timedelta) -> Gloo:
        connecting = in_a_thread(partial(ProcessGroupGloo, store, rank, size, timeout))
        while not connecting.done():
            if stops():
                raise _lost()
            wait([connecting], _POLL_SECONDS)
        return Gloo(connecting.result())

    dist.Backend.register_backend(_NAME, connect, devices=["cpu", "cuda"])
    dist.init_process_group(backend=_NAME, **options)
    world, group = dist.distributed_c10d._world, dist.group.WORLD
    assert group is not None
    _, store = world.pg_map[group]
    world.pg_map[group] = "gloo", store
    world.pg_backend_config[group] = str(dist.distributed_c10d.BackendConfig(dist.Backend("gloo")))


def in_a_thread(call: Callable[[], T]) -> "ThreadFuture[T]":
    """Return what a call will return. Nobody has to wait for its thread, which may never end."""
    future: ThreadFuture[T] = ThreadFuture()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="lightning-scar gloo", daemon=True).start()
    return future


def has_raised(error: BaseException) -> bool:
    """Return whether an error comes from gloo.

    Args:
        error: The error. gloo raises plain ones, all of which name one of its source files.

    Example::

        >>> has_raised(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed"))
        True

    """
    return isinstance(error, RuntimeError) and re.search("gloo[/:]", str(error)) is not None


class _Waits:
    """What is waited for in a group. gloo's threads hold it, and not the group: the last one would join itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: What nobody has completed or aborted; what gloo has not ended.
        self._pending: set[Future[Any]] = set()
        self._at_work: set[Future[Any]] = set()
        self._is_aborted = False

    @property
    def are_over(self) -> bool:
        """Whether gloo has ended everything."""
        return not self._at_work

    def begin(self, work: dist.Work) -> "Future[Any]":
        """Return what is completed with the result of a collective, or its error.

        Args:
            work: What gloo does.

        """
        future: Future[Any] = Future()
        with self._lock:
            is_aborted = self._is_aborted
            self._at_work.add(future)
            if not is_aborted:
                self._pending.add(future)
        if is_aborted:
            future.set_result(_lost())
        work.get_future().add_done_callback(partial(self.complete, future))
        return future

    def complete(self, future: "Future[Any]", done: "Future[Any]") -> None:
        """Complete it with what gloo has, unless it was aborted."""
        with self._lock:
            self._at_work.discard(future)
            if future not in self._pending:
                return
            self._pending.remove(future)
        try:
            result = done.value()
        except RuntimeError as error:
            result = error
        future.set_result(result)

    def abort(self) -> None:
        """Complete all with an error, and what begins later."""
        with self._lock:
            self._is_aborted = True
            pending, self._pending = self._pending, set()
        for future in pending:
            future.set_result(_lost())


class _Work(dist.Work):
    """What somebody may wait for.

    Args:
        work: What gloo does.
        future: Completed with its result, or its error.

    """

    def __init__(self, work: dist.Work, future: "Future[Any]") -> None:
        super().__init__()
        self._work = work
        self._future = future

    @override
    def wait(self, timeout: timedelta | None = None) -> bool:
        if timeout is not None:
            return self._work.wait(timeout)
        self._future.wait()
        _result(self._future)
        # Done already, but where the tensors are on a device, the caller's stream has to wait, too.
        return self._work.wait()

    @override
    def is_completed(self) -> bool:
        return self._future.done()

    @override
    def get_future(self) -> "Future[Any]":
        # An error in a callback is the one way to give an error to a future.
        return self._future.then(_result)


def _lost() -> RuntimeError:
    return RuntimeError("gloo: a peer is lost, and what waits for it was aborted")


def _result(future: "Future[Any]") -> Any:
    value = future.value()
    if isinstance(value, RuntimeError):
        raise value
    return value


def _collective(name: str) -> Callable[..., dist.Work]:
    # Where torch's own groups are C++, which is not compiled.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def launch(self: "Gloo", *args: Any, **options: Any) -> dist.Work:
        work = getattr(self._gloo, name)(*args, **options)
        return _Work(work, self._waits.begin(work))

    return launch


class Gloo(ProcessGroup):
    """A process group over gloo whose ``abort`` ends all that waits.

    Args:
        group: That of torch.

    Example::

        >>> from torch.distributed import HashStore
        >>> form(store=HashStore(), rank=0, world_size=1)
        >>> tensor = torch.ones(2)
        >>> dist.all_reduce(tensor)
        >>> tensor, dist.get_backend()
        (tensor([1., 1.]), 'gloo')
        >>> dist.destroy_process_group()

    """

    def __init__(self, group: ProcessGroupGloo) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        self._gloo = group
        # For what is not one of the collectives below.
        self._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, self._gloo)
        self._waits = _Waits()

    allgather = _collective("allgather")
    _allgather_base = _collective("_allgather_base")
    allgather_coalesced = _collective("allgather_coalesced")
    allreduce = _collective("allreduce")
    allreduce_coalesced = _collective("allreduce_coalesced")
    alltoall = _collective("alltoall")
    alltoall_base = _collective("alltoall_base")
    barrier = _collective("barrier")
    broadcast = _collective("broadcast")
    gather = _collective("gather")
    reduce = _collective("reduce")
    reduce_scatter = _collective("reduce_scatter")
    _reduce_scatter_base = _collective("_reduce_scatter_base")
    scatter = _collective("scatter")
    # Newer names of the same.
    all_gather_single = _allgather_base
    all_to_all_single = alltoall_base
    reduce_scatter_single = _reduce_scatter_base

    def getBackendName(self) -> str:
        """Return the backend's name."""
        return "gloo"

    def abort(self) -> None:
        """End all that waits for peers with an error, from any thread."""
        if self.size() > 1:
            self._waits.abort()

    def shutdown(self) -> None:
        """Abort the group, and wait until nothing writes to a tensor any more."""
        self.abort()
        until = time.monotonic() + _SETTLE_SECONDS
        while not self._waits.are_over and time.monotonic() < until:
            time.sleep(0.001)
        if not self._waits.are_over:
            # gloo's destructor would wait for what it has forgotten.
            in_a_thread(self._keep)

    def _keep(self) -> None:
        while not self._waits.are_over:
            time.sleep(1)
