"""DDP wrappers that users hold references to: rebuilt in place for each process group."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from lightning_scar.continuation.model_modes import trained, unfrozen
from lightning_scar.core.training_state import unwrapped


class Wrapper:
    """A DDP wrapper, with all of its options, that is made anew for each process group, and is the same object.

    Args:
        ddp: The wrapper, on the default group.
        parameters: Those that it reduces.

    Raises:
        ValueError: If it has a group of its own with fewer members, which nobody could form again.

    """

    def __init__(self, ddp: DistributedDataParallel, parameters: list[Parameter]) -> None:
        if ddp.process_group.size() != dist.get_world_size():
            raise ValueError(
                f"a DistributedDataParallel reduces over {ddp.process_group.size()} of {dist.get_world_size()} workers "
                "in a group of its own, which cannot form again after a failure; omit process_group and device_mesh"
            )
        self.ddp = ddp
        self._parameters = parameters

    @property
    def is_wrapped(self) -> bool:
        """Whether it reduces gradients."""
        return "reducer" in vars(self.ddp)

    def unwrap(self) -> None:
        """Let it call its model directly, without a group."""
        if not self.is_wrapped:
            return
        # The reducer's hooks would go on to reduce gradients.
        for name in ("reducer", "logger", "process_group"):
            delattr(self.ddp, name)
        self.ddp.forward = self.ddp.module.__call__  # type: ignore[method-assign]
        # `no_sync` sets this attribute.
        self.ddp.require_backward_grad_sync = True

    def wrap(self) -> None:
        """Let it reduce gradients over the present default group, whose members hold the same weights."""
        self.unwrap()
        del self.ddp.forward
        with unfrozen(self._parameters):
            # What it does when it is unpickled: all but what has been removed is there.
            self.ddp.__setstate__({})  # type: ignore[no-untyped-call]
        if self.ddp.static_graph:
            # The next step is the first one of its reducer.
            self.ddp._static_graph_delay_allreduce_enqueued = False
        hooks, self.ddp._comm_hooks = self.ddp._comm_hooks, []
        for hook, state in hooks:
            self.ddp.register_comm_hook(state, hook)
        if self.ddp.mixed_precision is not None:
            reducer: Any = self.ddp.reducer
            reducer._set_mixed_precision_param_dtype(self.ddp.mixed_precision.param_dtype)


class Wrappers:
    """All DDP wrappers of a training's models, wherever they are referenced.

    Args:
        modules: The models, wrapped or not.

    Example::

        >>> import torch, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = DistributedDataParallel(torch.nn.Linear(2, 1))
        >>> wrappers = Wrappers([model])
        >>> wrappers.unwrap()
        >>> dist.destroy_process_group()
        >>> model(torch.ones(3, 2)).shape  # without a group
        torch.Size([3, 1])
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> wrappers.wrap()
        >>> model(torch.ones(3, 2)).shape
        torch.Size([3, 1])
        >>> dist.destroy_process_group()

    """

    def __init__(self, modules: Iterable[Module]) -> None:
        models = {id(unwrapped(module)) for module in modules}
        # Accelerate keeps only the bare models, so the wrappers must be searched for.
        found = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
        ddp = [wrapper for wrapper in found if id(unwrapped(wrapper)) in models]
        self._wrappers = [Wrapper(wrapper, trained(wrapper.module)) for wrapper in ddp]

    def wrap(self) -> None:
        """Rebuild the wrappers for the current default group, whose members hold the same weights."""
        for wrapper in self._wrappers:
            wrapper.wrap()

    def unwrap(self) -> None:
        """Make the wrappers call their model directly, without a group."""
        for wrapper in self._wrappers:
            wrapper.unwrap()

    def present(self) -> list[DistributedDataParallel]:
        """Return the wrappers, unless they call their model directly."""
        return [wrapper.ddp for wrapper in self._wrappers if wrapper.is_wrapped]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without synchronization, even if the group changed in the user's own ``no_sync``."""
        with ExitStack() as stack:
            for wrapper in self._wrappers:
                stack.enter_context(wrapper.ddp.no_sync())
            yield
