"""The state of a plain training loop: modules, optimizers, schedulers and other stateful objects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch.nn import Module, ModuleDict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_scar.core.compatibility import ModelMismatchError
from lightning_scar.core.live_state import live_parts
from lightning_scar.core.loading import load_model
from lightning_scar.core.optimizer_loading import NO_OWNERS, Owners, load_optimizers
from lightning_scar.core.zero import is_sharded, shard_state


@runtime_checkable
class Stateful(Protocol):
    """An object with a state to save."""

    def state_dict(self) -> Any:
        """Return the state, with references to live tensors."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Load a state."""


@dataclass
class TrainingState:
    """The stateful parts of a training. Its checkpoint dict follows the layout of Lightning's.

    Attributes:
        modules: The models by name, possibly wrapped; saves unwrap them.
        optimizers: The optimizers; saves unwrap those of Accelerate and Fabric.
        schedulers: The learning rate schedulers.
        objects: Other stateful objects, by name.

    Example::

        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainingState.of({"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})
        >>> sorted(state.dump()), sorted(state.dump()["state_dict"])
        (['lr_schedulers', 'objects', 'optimizer_states', 'state_dict'], ['bias', 'weight'])

    """

    modules: dict[str, Module] = field(default_factory=dict)
    optimizers: list[Optimizer] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    objects: dict[str, Stateful] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "TrainingState":
        """Sort the user's objects by type.

        Args:
            state: Modules, optimizers, schedulers, and other objects with ``state_dict`` and ``load_state_dict``.

        Raises:
            TypeError: If an object has no state.
            ValueError: If ``torch.nn.ModuleDict`` does not accept a module's name.

        """
        sorted_out = cls()
        for name, value in state.items():
            if isinstance(value, Module):
                if "." in name or hasattr(ModuleDict, name):
                    raise ValueError(f"state[{name!r}]: torch does not accept this name for a module; choose another")
                sorted_out.modules[name] = value
            elif isinstance(value, Optimizer):
                sorted_out.optimizers.append(value)
            elif isinstance(value, LRScheduler):
                sorted_out.schedulers.append(value)
            elif isinstance(value, Stateful):
                sorted_out.objects[name] = value
            else:
                raise TypeError(
                    f"state[{name!r}] is a {type(value).__name__}, which has no state_dict() and load_state_dict(); "
                    "leave it out, or wrap it in an object that has them"
                )
        return sorted_out

    # -- the checkpoint dict -------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """Return the checkpoint dict, with references to live tensors, and this rank's shard of sharded optimizers."""
        return {
            "state_dict": self.state_dict(),
            "optimizer_states": [
                shard_state(optimizer) if is_sharded(optimizer) else optimizer.state_dict()
                for optimizer in self.inner_optimizers
            ],
            "lr_schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "objects": {name: value.state_dict() for name, value in self.objects.items()},
        }

    @property
    def module(self) -> Module:
        """The only module, unwrapped; or a ``ModuleDict`` of all."""
        plain = self._plain_modules
        return plain[""] if "" in plain else ModuleDict({prefix[:-1]: module for prefix, module in plain.items()})

    @property
    def _plain_modules(self) -> dict[str, Module]:
        """The unwrapped modules, by the prefix of their names in the checkpoint."""
        is_only = len(self.modules) == 1
        return {"" if is_only else f"{name}.": unwrapped(module) for name, module in self.modules.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the ``state_dict`` of :attr:`module`."""
        return self.module.state_dict()

    def load(
        self,
        checkpoint: Mapping[str, Any],
        path: str = "the checkpoint",
        strict: bool = True,
        owners: Owners = NO_OWNERS,
    ) -> None:
        """Load a checkpoint dict.

        Args:
            checkpoint: From :meth:`dump`.
            path: Its path, for errors.
            strict: Whether it must fit this training; else what fits is loaded.
            owners: Which parameters the optimizers' states belong to, for ``strict=False``.

        Raises:
            ModelMismatchError: If ``strict`` and a model or an optimizer refuses its state, or numbers of optimizers or
                schedulers, or names of objects differ; or if nothing of the models was loaded.

        """
        states, schedules = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        _check_numbers(path, "optimizers", states, self.optimizers, strict)
        _check_numbers(path, "schedulers", schedules, self.schedulers, strict)
        if missing := sorted(self.objects.keys() - checkpoint["objects"].keys()) if strict else []:
            raise ModelMismatchError(
                f"{path} has no state of {', '.join(missing)}, which this training has. Use another dirpath, or "
                "`strict=False` to load what fits."
            )
        is_same_model = load_model(path, self._plain_modules, checkpoint["state_dict"], strict)
        load_optimizers(
            path,
            self.inner_optimizers,
            states,
            self._load_optimizers,
            owners=owners,
            live=self.state_dict(),
            saved_model=checkpoint["state_dict"],
            strict=strict,
            is_same_model=is_same_model,
        )
        for scheduler, state in zip(self.schedulers, schedules, strict=False):
            scheduler.load_state_dict(state)
        for name, value in self.objects.items():
            if name in checkpoint["objects"]:
                value.load_state_dict(checkpoint["objects"][name])

    def _load_optimizers(self, states: Sequence[Any]) -> None:
        for optimizer, state in zip(self.inner_optimizers, states, strict=False):
            optimizer.load_state_dict(state)

    # -- its live parts ------------------------------------------------------------------------------------------

    @property
    def inner_optimizers(self) -> list[Optimizer]:
        """The optimizers without wrappers."""
        return [_inner(optimizer) for optimizer in self.optimizers]

    @property
    def live_parts(self) -> dict[str, Any]:
        """The arguments of a save besides the dict.

        See :meth:`~lightning_scar.core.running_checkpoint.RunningCheckpoint.save`.
        """
        return live_parts(self.inner_optimizers, *self.modules.values())


def unwrapped(module: Module) -> Module:
    """Return the user's module inside wrappers of DDP, ``torch.compile`` and Lightning Fabric.

    Example::

        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> unwrapped(torch.compile(model)) is model
        True

    """
    while (name := _LOOKED_THROUGH.get(type(module).__name__)) is not None:
        module = getattr(module, name)
    return module


#: Class names of wrappers, and their attributes with the wrapped module.
_LOOKED_THROUGH = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod", "_FabricModule": "module"}


def _inner(optimizer: Optimizer) -> Optimizer:
    # Optimizers like Lookahead also have an `optimizer` attribute, but a state of their own besides it.
    while _FRAMEWORKS & {base.__name__ for base in type(optimizer).__mro__}:
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


#: Class names of optimizer wrappers.
_FRAMEWORKS = {"AcceleratedOptimizer", "_FabricOptimizer"}


def _check_numbers(path: str, what: str, saved: Sequence[Any], live: Sequence[Any], strict: bool) -> None:
    if strict and len(saved) != len(live):
        raise ModelMismatchError(
            f"{path} has {len(saved)} {what}, this training has {len(live)}. Use another dirpath, or `strict=False` to "
            "load what fits."
        )
