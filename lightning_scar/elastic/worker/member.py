"""A worker as a member of the generations of its process group."""

import atexit
import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.doorbell import Doorbell
from lightning_scar.elastic.protocol.log import Events
from lightning_scar.elastic.protocol.messages import (
    Began,
    Ended,
    Event,
    GaveUp,
    Generation,
    Ready,
    Registered,
    Stepped,
    StopAsked,
    Stranded,
    Waiting,
)
from lightning_scar.elastic.worker import gloo, groups
from lightning_scar.elastic.worker.epochs import Epochs
from lightning_scar.elastic.worker.errors import PLANNED, CutOffError, FinalError, GroupLostError, Loss, NoGroupError
from lightning_scar.elastic.worker.notices import History, acknowledgements_key, or_cut_off
from lightning_scar.elastic.worker.sockets import Connections

#: A supervisor that does not answer for so long is gone.
_CONNECT_TIMEOUT = timedelta(seconds=60)


class Member:
    """This worker, as its supervisor and the others know it. It forms the default process group of each generation.

    Args:
        host: Where the supervisor's store is.
        port: Its port.
        slot: This worker's place in the job, from 0.
        spawn: The number of this process.
        generation: The generation that it starts in; -1 for a replacement.
        world_size: How many places there are.
        doorbell: The port on this host where news is told.

    """

    def __init__(
        self, host: str, port: int, slot: int, spawn: int, generation: int, world_size: int, doorbell: int
    ) -> None:
        self.slot = slot
        self.world_size = world_size
        #: The generation that this worker is in, or was in last; ``None`` for a replacement not yet taken in.
        self.generation: Generation | None = None
        #: Whether this process took the place of one that died.
        self.is_replacement = generation < 0
        self._spawn = spawn
        self._first = generation
        self._connect: Callable[[], TCPStore] = lambda: TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=_CONNECT_TIMEOUT
        )
        self._store = self._connect()
        bell = Doorbell(doorbell)
        self._events = Events(self._store, bell.ring)
        self._connections = Connections()
        self.epochs = Epochs(slot, lambda: self._number)
        #: Whether a lost peer makes no error in the present generation.
        self._is_silent = False
        self._has_announced = False
        self._excepthook = sys.excepthook
        self._history = History(self._connect, bell, slot, spawn, self._wake, self._look_after_group)
        # As Lightning does: a group's threads that return while the interpreter exits may crash the process.
        atexit.register(_destroy_group)
        self._report(Registered(slot, spawn))

    @classmethod
    def of_environment(cls) -> "Member | None":
        """Return the member of this process, or ``None`` if no supervisor started it."""
        return _of_environment() if "LIGHTNING_SCAR_STORE" in os.environ else None

    # -- events --------------------------------------------------------------------------------------------------

    def begin(self, can_take_in: bool = True) -> None:
        """Report that this worker has a state worth keeping, and can go on after a failure.

        Args:
            can_take_in: Whether replacements can be taken in; else all workers are started again.

        """
        self._report(Began(self.slot, self._spawn, can_take_in))

    def complete_start(self) -> None:
        """Report that this worker has completed its first step."""
        self._report(Stepped(self.slot, self._spawn))

    def end(self) -> None:
        """Report that the training is over."""
        self._report(Ended(self.slot, self._spawn))

    def wait_until_over(self, members: int, limit: float) -> None:
        """Wait until the training is over for all members, or so many seconds. Raise an error if one is lost before."""
        with or_cut_off():
            self.epochs.wait_until_over(self._store, members, limit, stops=lambda: self.has_news)
        if self.is_broken:
            raise GroupLostError

    # -- generations ---------------------------------------------------------------------------------------------

    def enter_first(self, **options: Any) -> Generation:
        """Form the process group of the generation that all workers start in.

        Args:
            options: As for ``torch.distributed.init_process_group``.

        """
        self._history.wait_until(lambda: bool(self._history.generations))
        return self._form(self._history.generations[0], options)

    def enter_next(self, step: int, boundary: bool, loss: Loss = PLANNED, **options: Any) -> Generation:
        """Wait for the generation after the present one, and form its process group.

        Args:
            step: How many optimizer steps this worker has completed.
            boundary: Whether it is between two steps rather than within one.
            loss: How it lost the present generation.
            options: As for ``torch.distributed.init_process_group``.

        Raises:
            RestartError: If all workers will be started again instead.
            NoGroupError: If the job ends instead, and no more groups form.
            CutOffError: If the supervisor is gone.

        """
        number = self._number
        self.leave()
        self._report(Waiting(self.slot, self._spawn, number, step, boundary, loss.waited, loss.failure))
        return self._form(self._wait_for_next(number), options)

    def enter_as_joiner(self, **options: Any) -> Generation:
        """Wait until this worker, which has no state yet, is taken in, and form the process group.

        Args:
            options: As for ``torch.distributed.init_process_group``.

        Raises:
            RestartError: If all workers will be started again instead.
            CutOffError: If the supervisor is gone.

        """
        number = self._number
        self.leave()
        self._report(Ready(self.slot, self._spawn))
        return self._form(self._wait_for_next(number), options)

    def strand(self, step: int) -> None:
        """Wait to learn who saves the state, after a failure that cannot be repaired here. Return if the job ends.

        Args:
            step: How many optimizer steps this worker has completed; -1 if it has no state.

        Raises:
            RestartError: When it is known.
            CutOffError: If the supervisor is gone.

        """
        number = self._number
        self.leave()
        self._report(Stranded(self.slot, self._spawn, number, step))
        self._history.wait_until(lambda: self.is_stopping)

    def check_health(self) -> None:
        """Raise if the group broke without an error: collectives that are aborted leave garbage.

        Raises:
            GroupLostError: If the present generation has failed.

        """
        if not (self._is_silent and dist.is_initialized()):
            return
        groups.wait_for_device(stops=lambda: self.is_broken)
        if self.is_broken:
            raise GroupLostError
        if reason := groups.failure():
            raise GroupLostError(reason)

    def leave(self) -> None:
        """Close the group, which wakes all that are blocked in it."""
        self._connections.cut()
        if dist.is_initialized():
            groups.leave_all()

    @property
    def _number(self) -> int:
        return self.generation.number if self.generation is not None else self._first

    def _wait_for_next(self, number: int) -> Generation:
        history = self._history
        history.wait_until(lambda: bool(history.disbanded) or any(g.number > number for g in history.generations))
        if history.disbanded:
            raise NoGroupError(history.disbanded)
        return history.generations[-1]

    def _form(self, generation: Generation, options: dict[str, Any]) -> Generation:
        self.generation = generation
        self._is_silent = groups.is_silent(options["backend"])
        self._has_announced = False
        # torch wraps the hook for every group, to put the rank in front of tracebacks.
        sys.excepthook = self._on_uncaught
        # A connection of its own can be cut, to wake this thread when it waits there for a worker that has died.
        with self._connections.forming(self._connect, is_aborted=self._is_silent) as connection:
            if self.is_broken:
                # The notice came before there was anything to cut.
                raise GroupLostError
            rank = generation.members.index(self.slot)
            store = PrefixStore(f"generation/{generation.number}", connection)
            size = len(generation.spawns)
            groups.form(stops=lambda: self.is_broken, store=store, rank=rank, world_size=size, **options)
            # With one node nobody but its own users reaches the group. NCCL's connections need a secret of this store.
            if "LIGHTNING_SCAR_NODE_0" in os.environ and not self._is_silent:
                self._connections.check(store, rank, size)
        return generation

    # -- the state of the present generation ---------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether this worker has the lowest slot in its generation."""
        return self.generation is not None and self.generation.members[0] == self.slot

    @property
    def is_joiner(self) -> bool:
        """Whether this process took the place of one that died, and has not been taken in yet."""
        return self.is_replacement and self.generation is None

    @property
    def local_rank(self) -> int:
        """How many of its generation have lower slots on this node."""
        members = self.generation.members if self.generation is not None else []
        first = self.slot - int(os.environ.get("LOCAL_RANK", "0"))
        return sum(first <= slot < self.slot for slot in members)

    @property
    def is_full(self) -> bool:
        """Whether nobody is missing from its generation."""
        return self.generation is not None and len(self.generation.spawns) == self.world_size

    @property
    def is_broken(self) -> bool:
        """Whether the present generation is known to have failed."""
        return self._history.is_broken(self._number)

    def caused_by_peer_loss(self, error: BaseException) -> bool:
        """Return whether an error comes from the loss of another worker, not from the program."""
        if isinstance(error, FinalError) or not isinstance(error, Exception):
            return False
        if isinstance(error, GroupLostError | dist.DistError):
            return True
        return gloo.has_raised(error) or self.is_broken

    def joiners_are_ready(self) -> bool:
        """Return whether replacements wait to be taken in after the present generation."""
        return self._history.is_joined(self._number)

    def wait_for_joiners(self) -> None:
        """Wait until replacements are ready, the generation breaks or the job ends; else as :meth:`enter_next`."""
        self._history.wait_until(lambda: self.has_news)

    @property
    def has_news(self) -> bool:
        """Whether there is a reason to stop waiting: joiners, another failure or the end of the job."""
        return self.joiners_are_ready() or self.is_broken or self.is_stopping or self._history.is_restarting

    @property
    def attempt(self) -> int:
        """How many times all workers have been started again."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    @property
    def is_stopping(self) -> bool:
        """Whether the job ends."""
        return self._history.is_stopping

    def announce(self, word: str, step: int) -> None:
        """Announce something to the present generation; by its leader, before a step's collectives.

        Do nothing until all members have acknowledged the reason for it, replacements that wait or the end of the job:
        only then do they look for an announcement after each step.

        Args:
            word: What follows the step. The first announcement of a generation counts.
            step: The number of the step.

        """
        with or_cut_off():
            if not self._has_announced and self._all_have_acknowledged():
                self._has_announced = True
                self._store.set(self._announcement_key, f"{step} {word}")
                # The store does not confirm a set. When it answers a question after it, everybody can read it.
                self._store.check([self._announcement_key])

    def announced(self, step: int) -> str:
        """Return what the leader announced to follow a step whose collectives this worker has completed, or "".

        Args:
            step: The number of the step.

        Raises:
            CutOffError: If the supervisor is gone.

        """
        if self._history.is_cut_off:
            raise CutOffError
        if not (self.joiners_are_ready() or self.is_stopping):
            return ""
        with or_cut_off():
            if not self._store.check([self._announcement_key]):
                return ""
            number, word = self._store.get(self._announcement_key).decode().split()
        # The leader may be a step ahead when this worker reads.
        return word if int(number) <= step else ""

    def _all_have_acknowledged(self) -> bool:
        assert self.generation is not None
        return self._store.add(acknowledgements_key(self._number), 0) == len(self.generation.spawns)

    def end_epoch(self, step: int, times: int) -> None:
        """Tell the others that this worker has no more batches for now; see :meth:`Epochs.end`."""
        with or_cut_off():
            self.epochs.end(self._store, step, times)

    def left_behind_by(self) -> tuple[int, int] | None:
        """Return who has no more batches where this worker has; see :meth:`Epochs.left_behind_by`."""
        with or_cut_off():
            return self.epochs.left_behind_by(self._store)

    def _look_after_group(self, store: Store) -> None:
        """Wake the training thread if it waits for nothing that comes."""
        is_left_behind = self.epochs.left_behind_by(store) is not None
        if is_left_behind or (groups.are_silent() and groups.failure()):
            self._wake(None)

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Report before the process exits that it was not the program's fault, if another worker was lost."""
        with suppress(CutOffError):
            if self.caused_by_peer_loss(error):
                self._report(Stranded(self.slot, self._spawn, self._number, step=-1))
        self._excepthook(kind, error, trace)

    def give_up(self, reason: str) -> None:
        """Report that the job cannot go on."""
        self._report(GaveUp(self.slot, self._spawn, reason))

    def ask_to_stop(self, signum: int) -> None:
        """Ask the supervisor to end the job: all workers save after the same step."""
        self._report(StopAsked(signum, slot=self.slot, spawn=self._spawn))

    @property
    def _announcement_key(self) -> str:
        return f"announcement/{self._number}"

    def _wake(self, generation: int | None) -> None:
        """Wake the training thread if it may be blocked in a collective of a generation that has failed."""
        if generation is not None and generation != self._number:
            return
        groups.abort_all()
        self._connections.cut()

    def _report(self, event: Event) -> None:
        with or_cut_off():
            self._events.append(event)


def _destroy_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def _of_environment() -> Member:
    host, _, port = os.environ["LIGHTNING_SCAR_STORE"].rpartition(":")
    slot, spawn, generation = (int(os.environ[f"LIGHTNING_SCAR_{name}"]) for name in ("SLOT", "SPAWN", "GENERATION"))
    world_size, doorbell = (int(os.environ[name]) for name in ("WORLD_SIZE", "LIGHTNING_SCAR_DOORBELL"))
    return Member(host, int(port), slot, spawn, generation, world_size, doorbell)
