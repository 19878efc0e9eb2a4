"""The processes that save and recover together. They communicate at the start and in a recovery, never in a save."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_scar.core.threads import batches

#: Bytes of one message.
_MESSAGE = 1 << 26

T = TypeVar("T")


class Ranks:
    """This process's place among those that train together.

    Args:
        rank: Its rank in the group.
        world_size: The number of processes.
        group: A process group that supports CPU tensors; ``None`` for the default one at the time of each call.

    Example::

        >>> alone = Ranks()
        >>> alone.rank, alone.gather("here")
        (0, ['here'])

    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: "dist.ProcessGroup | None" = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group = group

    @classmethod
    def of_default_group(cls) -> "Ranks":
        """Return the ranks of the default process group, if there is one. A collective.

        If the group's backend does not support CPU tensors, form a second group with gloo.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        is_gloo = dist.get_backend() == dist.Backend.GLOO
        group = None if is_gloo else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def all_here(self) -> bool:
        """Whether no rank is missing from the default process group now."""
        return self.world_size == 1 or dist.get_world_size() == self.world_size

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank; values are pickled. A collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, function: Callable[[], T]) -> T:
        """Call a function that may fail on some ranks, and raise an error of one on all. A collective.

        Args:
            function: The function; must not run collectives.

        Returns:
            What it returned on this rank.

        Raises:
            Exception: This rank's own error, else that of the first rank with one.

        """
        try:
            result = function()
        except Exception as own:
            self.gather(_portable(own))
            raise
        for error in self.gather(None):
            if error is not None:
                raise error
        return result

    def share_out(self, pieces: Sequence[Sequence[Tensor]]) -> None:
        """Broadcast the pieces of every rank to all others. A collective.

        Args:
            pieces: For every rank the memory that it has filled and the others receive: uint8, 1-d, contiguous, on the
                CPU, with the same sizes on all ranks.

        """
        if self.world_size == 1:
            return
        for source, tensors in enumerate(pieces):
            cut = (part for tensor in tensors for part in torch.split(tensor, _MESSAGE))
            for batch in batches(cut, lambda part: part.nbytes, _MESSAGE):
                self._broadcast(batch, source)

    def _broadcast(self, batch: list[Tensor], source: int) -> None:
        message = batch[0] if len(batch) == 1 else torch.cat(batch)
        at = source if self._group is None else dist.get_global_rank(self._group, source)
        dist.broadcast(message, at, group=self._group)
        if len(batch) > 1 and source != self.rank:
            for part, received in zip(batch, _split_like(message, batch), strict=True):
                part.copy_(received)


def _split_like(message: Tensor, batch: Sequence[Tensor]) -> Iterator[Tensor]:
    yield from torch.split(message, [len(part) for part in batch])


def _portable(error: Exception) -> Exception:
    """Return the error, or a ``RuntimeError`` with its text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error
