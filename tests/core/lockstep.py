"""A device that runs late and in any order that its marks allow, with the memory of the CPU.

What a thread launches on tensors of the device is queued, operation by operation, on the stream of the training or on
the side stream of the saves. A scheduler runs the streams by turns that a seed decides. Nothing but marks, holds and
waits keeps an operation of one stream behind one of the other; whoever reads a result too early finds garbage.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_scar.core import live_state, stager, tiles
from lightning_scar.core.skeleton import Path, Skeleton
from lightning_scar.core.skeletons import pack_skeleton

_ATEN = torch.ops.aten
#: What needs a value of the device on the host: the thread would wait for it.
_WAITING = {_ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.masked_select, _ATEN.equal, _ATEN.is_nonzero}


class Mark:
    """A mark on a stream."""

    def __init__(self, stream: str, landing: list[Tensor]) -> None:
        self.stream = stream
        self.is_reached = False
        #: What is on the host once it is reached.
        self.landing = landing


class Lockstep:
    """The device, and the queue of saves on it.

    Args:
        seed: Which order, among all that are allowed.
        broken: What does nothing: ``"hold"``, ``"wait"`` or ``"after"``.

    """

    def __init__(self, seed: int, broken: str | None = None) -> None:
        self._random = random.Random(seed)
        self._broken = broken
        self._streams: dict[str, deque[Any]] = {"training": deque(), "side": deque()}
        self._memory: dict[int, Any] = {}
        self._lock = threading.RLock()
        self._more = threading.Condition(self._lock)
        self._launched = 0
        self._stream_of = threading.local()
        self._landing: list[Tensor] = []
        # In a thread of its own, where nothing is intercepted.
        self._worker = ThreadPoolExecutor(1, "lockstep")

    def take(self, *tensors: Tensor) -> None:
        """Makes these tensors lie on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                # Kept, so that no other memory gets its address.
                self._memory[storage.data_ptr()] = storage

    @contextmanager
    def training(self) -> Iterator[None]:
        """What this thread does in the ``with`` block is launched on the training's stream; at its end all is done."""
        with (
            patch.object(stager, "queue_of", lambda tensors: self),
            patch.object(stager, "on_host", self._on_host),
            patch.object(live_state.LiveState, "pack", _all_on_the_device),
            patch.object(tiles, "may_look", lambda tensor: False),
            # On a CPU encoding looks at values, since nothing has to be waited for there.
            patch.object(tiles, "_log_of_positive", lambda bits, work: False),
        ):
            with _Launching(self):
                yield
            self.synchronize()

    def synchronize(self) -> None:
        """Runs all that is queued."""
        with self._lock:
            while any(self._streams.values()):
                assert sum(self._advance(name) for name in self._streams), "the streams wait for each other"

    # -- the queue of saves ---------------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """A mark on the training's stream."""
        return self._record("training")

    def beside(self, work: Callable[[], None], after: Mark) -> Mark:
        """Launches work on the side stream."""
        if self._broken != "after":
            self._queue("side", after)
        outside, self._stream_of.name = getattr(self._stream_of, "name", "training"), "side"
        try:
            if outside == "training" and _Launching.is_on():
                work()
            else:
                with _Launching(self):
                    work()
        finally:
            self._stream_of.name = outside
        return self._record("side")

    def hold(self, mark: Mark) -> None:
        """The training's stream waits for the mark."""
        if self._broken != "hold":
            self._queue("training", mark)

    def wait(self, mark: Mark) -> None:
        """Runs what must have been run, and no more."""
        with self._lock:
            if mark.landing == []:
                # The disk is slow: the training goes on first, as far as it may.
                launched = self._launched + 60
                self._more.wait_for(lambda: self._launched >= launched, timeout=0.05)
                while self._advance("training"):
                    pass
            if self._broken != "wait":
                self._reach(mark)
            for tensor in mark.landing:
                self._memory.pop(tensor.untyped_storage().data_ptr(), None)

    def _on_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        copies = [tensor.clone() for tensor in tensors]
        self._landing += copies
        return copies

    # -- what is launched -----------------------------------------------------------------------------------------

    def launch(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Queues an operation, or does it at once if no tensor of the device is among its arguments."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(tensor.untyped_storage().data_ptr() in self._memory for tensor in tensors)
        if not here or function.is_view or function.overloadpacket is _ATEN.unsqueeze_:
            return function(*args, **kwargs)
        assert function.overloadpacket not in _WAITING, f"a thread waits for the device: {function}"
        # As they are now: their shapes may change in place.
        own_args, own_kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        if function._schema.is_mutable:
            self._queue_call(lambda: function(*own_args, **own_kwargs))
            written = _written(function, args, kwargs)
            self.take(*written)
            is_out = any(argument.is_out for argument in function._schema.arguments)
            return kwargs.get("out", written[0]) if is_out else args[0] if function._schema.returns else None
        found = function(*args, **kwargs)
        made = [leaf.detach() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        for tensor in made:
            tensor.untyped_storage().fill_(0xAB)
        self.take(*made)

        def call() -> None:
            results = [leaf for leaf in tree_leaves(function(*own_args, **own_kwargs)) if isinstance(leaf, Tensor)]
            for tensor, result in zip(made, results, strict=True):
                tensor.copy_(result)

        self._queue_call(call)
        return found

    def _queue_call(self, call: Callable[[], object]) -> None:
        self._queue(getattr(self._stream_of, "name", "training"), call)

    def _record(self, stream: str) -> Mark:
        mark, self._landing = Mark(stream, self._landing), []
        self._queue(stream, (mark,))
        return mark

    def _queue(self, stream: str, item: Any) -> None:
        """Queues a call, a mark to wait for, or a mark to set; then the streams may run on, or not."""
        with self._lock:
            self._streams[stream].append(item)
            self._launched += 1
            self._more.notify_all()
            if self._random.random() < 0.1:
                name = self._random.choice(list(self._streams))
                for _ in range(self._random.randrange(200)):
                    if not self._advance(name):
                        break

    def _advance(self, name: str) -> bool:
        """Does the next thing of a stream, if there is one and nothing keeps it back."""
        stream = self._streams[name]
        if not stream or (isinstance(stream[0], Mark) and not stream[0].is_reached):
            return False
        item = stream.popleft()
        if isinstance(item, tuple):
            item[0].is_reached = True
        elif not isinstance(item, Mark):
            self._worker.submit(_run, item).result()
        return True

    def _reach(self, mark: Mark) -> None:
        while not mark.is_reached:
            if not self._advance(mark.stream):
                self._reach(self._streams[mark.stream][0])


class _Launching(TorchDispatchMode):
    """Hands what a thread does with tensors to a device."""

    _on = threading.local()

    def __init__(self, device: Lockstep) -> None:
        super().__init__()
        self._device = device

    @classmethod
    def is_on(cls) -> bool:
        return getattr(cls._on, "value", False)

    def __enter__(self) -> Any:
        self._on.value = True
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._on.value = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.launch(func, args, kwargs or {})


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    arguments = function._schema.arguments
    named = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    changed = [named.get(argument.name) for argument in arguments if argument.is_write]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _run(call: Callable[[], object]) -> None:
    # The counters of versions went up when it was launched.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        call()


def _all_on_the_device(state: live_state.LiveState) -> tuple[memoryview, list[tuple[list[Path], Tensor]]]:
    """As :meth:`LiveState.pack`, where all counters lie on an accelerator."""
    skeleton = Skeleton(tree=state.skeleton["tree"], counters=[])
    return pack_skeleton(skeleton, state.description, state.sharded), state.skeleton["counters"]
