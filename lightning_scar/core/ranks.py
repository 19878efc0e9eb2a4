"""The processes that save and recover together. They communicate at the start and in a recovery, never in a save."""

import pickle
import weakref
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

    Example::

        >>> alone = Ranks()
        >>> alone.rank, alone.gather("here")
        (0, ['here'])

    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        #: The default group that the last call has found, and that for CPU tensors beside it. They end with the former.
        self._default: weakref.ref[Any] | None = None
        self._beside: weakref.ref[Any] | None = None

    @classmethod
    def of_default_group(cls) -> "Ranks":
        """Return the ranks of the default process group, if there is one."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def all_here(self) -> bool:
        """Whether no rank is missing from the default process group now."""
        return self.world_size == 1 or dist.get_world_size() == self.world_size

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank; values are pickled. A collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group())
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
        dist.broadcast(message, source, group=self._group())
        if len(batch) > 1 and source != self.rank:
            for part, received in zip(batch, _split_like(message, batch), strict=True):
                part.copy_(received)

    def _group(self) -> "dist.ProcessGroup | None":
        """Return a group that supports CPU tensors; ``None`` is the default one. A collective, once in each."""
        if "gloo" in dist.get_backend_config():
            return None
        default = dist.group.WORLD
        if self._default is None or self._default() is not default:
            self._default, self._beside = weakref.ref(default), weakref.ref(dist.new_group(backend="gloo"))
        assert self._beside is not None
        return self._beside()


def _split_like(message: Tensor, batch: Sequence[Tensor]) -> Iterator[Tensor]:
    yield from torch.split(message, [len(part) for part in batch])


def _portable(error: Exception) -> Exception:
    """Return the error, or a ``RuntimeError`` with its text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error
