"""Iterative-convergent algorithms: trainings whose every iteration depends on the seed and its number only."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_scar.core.skeleton import Path

Batch = tuple[Tensor, ...]


def chance(seed: int, number: int) -> torch.Generator:
    """The chances of one iteration, other than those of any other and of the initial values.

    Args:
        seed: Of the training, less than 4,000, since a generator heeds 32 bits only.
        number: Of the iteration, at most a million.

    """
    return torch.Generator().manual_seed((seed + 1) * 1_000_003 + number)


class Training(Protocol):
    """What is perturbed by failures.

    Two trainings of one seed that are in the same state at the same iteration go on alike; a recovered one makes the
    iterations behind the failure on the same batches as one that never failed.

    Attributes:
        iteration: How many iterations were made.

    """

    iteration: int

    def step(self) -> None:
        """Makes one iteration."""

    def loss(self) -> float:
        """What is minimised, over the data or a fixed part of them."""

    def checkpoint(self) -> dict[str, Any]:
        """The state in the shape of Lightning's checkpoint dict; its tensors are the live ones."""

    def optimizers(self) -> Mapping[Path, Optimizer]:
        """The optimizers by the places of their states in the checkpoint; by default there are none."""
        return {}

    def parameters(self) -> list[Tensor]:
        """The live tensors whose distance counts."""

    def recovered(self) -> None:
        """Follows a change of the live tensors by a recovery; by default nothing depends on them."""
        return


class ModuleTraining(Training):
    """Minibatch training of a torch module.

    Args:
        model: What is trained.
        optimizer: Makes its optimizer.
        batch: Gives the batch of an iteration, from a generator that was seeded for it.
        objective: The mean loss of the model on a batch.
        held: The batch over which :meth:`loss` is taken.
        seed: Of the batches.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        batch: Callable[[torch.Generator], Batch],
        objective: Callable[[nn.Module, Batch], Tensor],
        held: Batch,
        seed: int,
    ) -> None:
        self.iteration = 0
        self.model = model
        self.optimizer = optimizer(model.parameters())
        self._batch = batch
        self._objective = objective
        self._held = held
        self._seed = seed

    @override
    def step(self) -> None:
        self.backward(self.iteration)
        self.optimizer.step()
        self.iteration += 1

    def backward(self, number: int) -> int:
        """Computes the gradients of a batch, at the present weights, in place of those that there were.

        Args:
            number: Which batch; iteration ``i`` of :meth:`step` takes batch ``i``.

        Returns:
            How many samples the gradients are a mean over.

        """
        batch = self._batch(chance(self._seed, number))
        self.optimizer.zero_grad()
        self._objective(self.model, batch).backward()  # type: ignore[no-untyped-call]
        return len(batch[0])

    @override
    @torch.no_grad()
    def loss(self) -> float:
        return float(self._objective(self.model, self._held))

    @override
    def checkpoint(self) -> dict[str, Any]:
        return {"state_dict": self.model.state_dict(), "optimizer_states": [self.optimizer.state_dict()]}

    @override
    def optimizers(self) -> Mapping[Path, Optimizer]:
        return {("optimizer_states", 0): self.optimizer}

    @override
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())
