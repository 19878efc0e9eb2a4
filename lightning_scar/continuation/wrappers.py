"""DDP wrappers that users hold references to: rebuilt in place for each process group."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from lightning_scar.continuation.model_modes import trained, unfrozen
from lightning_scar.core.training_state import unwrapped

#: The arguments of DDP that it keeps as attributes of the same name, with their defaults.
_OPTIONS = {
    "device_ids": None,
    "output_device": None,
    "dim": 0,
    "broadcast_buffers": True,
    "find_unused_parameters": False,
    "gradient_as_bucket_view": False,
    "static_graph": False,
}
#: Attributes that others set on a wrapper: Accelerate's mark, and users' hooks.
_MARKS = ("_is_accelerate_prepared", "_forward_hooks", "_forward_pre_hooks")


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
        self._wrappers = [_Wrapper(wrapper) for wrapper in ddp]

    def wrap(self) -> None:
        """Rebuild the wrappers for the current default group, whose members hold the same weights."""
        for wrapper in self._wrappers:
            wrapper.unwrap()
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


class _Wrapper:
    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self.ddp = wrapper
        self._module: Module = wrapper.module
        options = {name: getattr(wrapper, name) for name in _OPTIONS}
        self._options: dict[str, Any] = {name: value for name, value in options.items() if value != _OPTIONS[name]}
        self._options["bucket_cap_mb"] = wrapper.bucket_bytes_cap / (1 << 20)
        self._comm_hooks = list(getattr(wrapper, "_comm_hooks", ()))
        self._marks = {name: value for name, value in vars(wrapper).items() if name in _MARKS}
        self._parameters = trained(wrapper.module)
        self.is_wrapped = True

    def unwrap(self) -> None:
        if not self.is_wrapped:
            return
        self.is_wrapped = False
        # Remove the reducer, or its hooks would continue to reduce gradients.
        with self._rebuilt():
            Module.__init__(self.ddp)
            self.ddp.module = self._module
            self.ddp.forward = self._module.__call__  # type: ignore[method-assign]
            # `no_sync` sets this attribute.
            self.ddp.require_backward_grad_sync = True

    def wrap(self) -> None:
        self.is_wrapped = True
        with self._rebuilt(), unfrozen(self._parameters):
            DistributedDataParallel.__init__(self.ddp, self._module, init_sync=False, **self._options)
            for hook, state in self._comm_hooks:
                self.ddp.register_comm_hook(state, hook)

    @contextmanager
    def _rebuilt(self) -> Iterator[None]:
        is_training = self.ddp.training
        vars(self.ddp).clear()
        yield
        vars(self.ddp).update(self._marks)
        self.ddp.training = is_training
