"""A worker's part in the generations of its process group."""

import functools
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.connections import Connections
from lightning_scar.elastic.messages import (
    Began,
    Broken,
    Ended,
    Event,
    Events,
    Formed,
    GaveUp,
    Generation,
    Joining,
    Notice,
    Notices,
    Ready,
    Registered,
    Restart,
    Stop,
    StopAsked,
    Stranded,
    Waiting,
)

T = TypeVar("T")


class CutOffError(RuntimeError):
    """The supervisor is gone. A worker that went on alone would train apart from the others."""

    def __init__(self) -> None:
        super().__init__("lightning-scar: the supervisor is gone or out of reach; this worker stops")


class GroupLostError(RuntimeError):
    """The group broke, and no collective said so."""

    def __init__(self) -> None:
        super().__init__("lightning-scar: the NCCL group was lost")


class RestartError(RuntimeError):
    """All workers will be started again.

    Attributes:
        keeper: The slot of the worker that leaves its state for the next start; -1 for nobody.

    """

    def __init__(self, keeper: int) -> None:
        super().__init__("lightning-scar: all workers will be started again")
        self.keeper = keeper


class Member:
    """This worker, as its supervisor and the others know it. It makes the default process group of each generation.

    Args:
        host: Where the supervisor's store is.
        port: Its port.
        slot: This worker's place in the job, from 0.
        spawn: The number of this process.
        generation: The generation that it starts in; -1 for a replacement.
        world_size: How many places there are.

    """

    def __init__(self, host: str, port: int, slot: int, spawn: int, generation: int, world_size: int) -> None:
        self.slot = slot
        self.world_size = world_size
        #: The generation that this worker is in, or was in last; ``None`` for a replacement not yet taken in.
        self.generation: Generation | None = None
        #: Whether this process took the place of one that died.
        self.is_replacement = generation < 0
        self._spawn = spawn
        self._first = generation
        self._connect: Callable[[], TCPStore] = lambda: TCPStore(host, port, is_master=False, wait_for_workers=False)
        self._store = self._connect()
        self._events = Events(self._store)
        self._connections = Connections()
        self._has_called = False
        self._changed = threading.Condition()
        self._formed: list[Generation] = []
        self._broken: dict[int, str] = {}
        self._joining: Joining | None = None
        self._restart: Restart | None = None
        self._is_stopping = False
        self._is_cut_off = False
        has_read = threading.Event()
        threading.Thread(target=self._watch, args=[has_read], name="lightning-scar notices", daemon=True).start()
        # What was true before this process began must not be taken for news.
        has_read.wait()
        self._tell(Registered(slot, spawn))

    @classmethod
    def of_environment(cls) -> "Member | None":
        """The one of this process; ``None`` if no supervisor started it."""
        return _of_environment() if "LIGHTNING_SCAR_STORE" in os.environ else None

    # -- what a worker tells -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """From now on this worker has a state worth keeping, and can go on after a failure."""
        self._tell(Began(self.slot, self._spawn))

    def end(self) -> None:
        """The training is over."""
        self._tell(Ended(self.slot, self._spawn))

    # -- generations ---------------------------------------------------------------------------------------------

    def enter_first(self, **options: Any) -> Generation:
        """Forms the process group of the generation that all workers start in.

        Args:
            options: As for ``torch.distributed.init_process_group``.

        """
        self._wait_until(lambda: any(generation.number == self._first for generation in self._formed))
        return self._form(next(g for g in self._formed if g.number == self._first), options)

    def enter_next(self, step: int, boundary: bool, waited: float = 0.0, **options: Any) -> Generation:
        """Waits for the generation after the present one, and forms its process group.

        Args:
            step: How many optimizer steps this worker has completed.
            boundary: Whether it stands behind a completed step rather than in the next one.
            waited: Seconds for which it had been blocked when it gave up.
            options: As for ``torch.distributed.init_process_group``.

        Raises:
            RestartError: If all workers will be started again instead.
            CutOffError: If the supervisor is gone.

        """
        number = self._number
        self.leave()
        self._tell(Waiting(self.slot, self._spawn, number, step, boundary, waited))
        return self._form(self._wait_for_next(number), options)

    def enter_as_joiner(self, **options: Any) -> Generation:
        """Waits until this worker, which has no state yet, is taken in, and forms the process group.

        Args:
            options: As for ``torch.distributed.init_process_group``.

        Raises:
            RestartError: If all workers will be started again instead.
            CutOffError: If the supervisor is gone.

        """
        number = self._number
        self.leave()
        self._tell(Ready(self.slot, self._spawn))
        return self._form(self._wait_for_next(number), options)

    def strand(self, step: int) -> None:
        """Waits to hear who keeps the state, after a failure that cannot be mended in this process.

        Args:
            step: How many optimizer steps this worker has completed; -1 if it has no state.

        Raises:
            RestartError: When that is known.
            CutOffError: If the supervisor is gone.

        """
        number = self._number
        self.leave()
        self._tell(Stranded(self.slot, self._spawn, number, step))
        self._wait_until(lambda: self._restart is not None)

    def check_health(self) -> None:
        """Raises if the group broke where the device says nothing: kernels of NCCL that are aborted leave garbage.

        Raises:
            GroupLostError: If the present generation is no more.

        """
        if dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
            torch.cuda.current_stream().synchronize()
            if self.is_broken:
                raise GroupLostError

    def leave(self) -> None:
        """Closes the group, which wakes whoever is blocked in it."""
        self._connections.cut()
        if not dist.is_initialized():
            return
        if dist.get_backend() == dist.Backend.NCCL:
            # A kernel may wait on the device for a peer that is gone.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()

    @property
    def _number(self) -> int:
        return self.generation.number if self.generation is not None else self._first

    def _wait_for_next(self, number: int) -> Generation:
        self._wait_until(lambda: any(g.number > number and self._is_in(g) for g in self._formed))
        return max((g for g in self._formed if self._is_in(g)), key=lambda g: g.number)

    def _is_in(self, generation: Generation) -> bool:
        return generation.spawns.get(self.slot) == self._spawn

    def _form(self, generation: Generation, options: dict[str, Any]) -> Generation:
        self.generation = generation
        self._has_called = False
        with self._connections.recorded():
            # A connection of its own: whoever is blocked in it, waiting for one that died meanwhile, can be woken.
            store = PrefixStore(f"generation/{generation.number}", self._connect())
            rank = generation.members.index(self.slot)
            dist.init_process_group(store=store, rank=rank, world_size=len(generation.spawns), **options)
        if self.is_broken:
            # The notice may have come just before the last connection was made.
            self._connections.cut()
        return generation

    # -- the state of the present generation ---------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether this worker has the lowest slot in its generation."""
        return self.generation is not None and self.generation.members[0] == self.slot

    @property
    def is_full(self) -> bool:
        """Whether nobody is missing from its generation."""
        return self.generation is not None and len(self.generation.spawns) == self.world_size

    @property
    def is_broken(self) -> bool:
        """Whether the present generation is known to be no more."""
        return self._is_cut_off or self._number in self._broken

    def is_due_to_failure(self, error: BaseException) -> bool:
        """Whether an error comes from the loss of another worker, not from the program."""
        if isinstance(error, CutOffError | RestartError):
            return False
        if not isinstance(error, RuntimeError):
            return self.is_broken and isinstance(error, Exception)
        text = str(error)
        if isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "ncclComm")):
            return True
        return self.is_broken

    def joiners_are_ready(self) -> bool:
        """Whether replacements wait to be taken in after the present generation."""
        return self._joining is not None and self._joining.generation == self._number and not self._is_cut_off

    def wait_for_joiners(self) -> None:
        """Waits until replacements are ready, or the generation breaks, or the job is to end.

        Raises:
            RestartError: If all workers will be started again instead.
            CutOffError: If the supervisor is gone.

        """
        self._wait_until(lambda: self.has_news)

    @property
    def has_news(self) -> bool:
        """Whether there is a reason to stop waiting for better times: joiners, another failure, the end of the job."""
        return self.joiners_are_ready() or self.is_broken or self._is_stopping or self._restart is not None

    @property
    def attempt(self) -> int:
        """How often all workers have been started again."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    @property
    def is_stopping(self) -> bool:
        """Whether the job is to end."""
        return self._is_stopping

    def call(self, word: str, step: int) -> None:
        """Announces something to the present generation; by its leader, before a step's collectives.

        Args:
            word: What is to follow the step. The first word of a generation counts.
            step: The number of the step.

        """
        if not self._has_called:
            self._has_called = True
            self._store.set(self._call_key, f"{step} {word}")

    def called(self, step: int) -> str:
        """What the leader announced to follow a step whose collectives this worker has completed; empty for nothing.

        Args:
            step: The number of the step.

        Raises:
            CutOffError: If the supervisor is gone.

        """
        try:
            if not self._store.check([self._call_key]):
                return ""
            number, word = self._store.get(self._call_key).decode().split()
        except dist.DistError as error:
            raise CutOffError from error
        # A leader may be a step ahead already when this worker looks.
        return word if int(number) <= step else ""

    def give_up(self, reason: str) -> None:
        """Tells the supervisor that the job cannot go on."""
        self._tell(GaveUp(self.slot, self._spawn, reason))

    def ask_to_stop(self, signum: int) -> None:
        """Asks the supervisor to end the job: all workers save behind the same step."""
        self._tell(StopAsked(signum))

    @property
    def _call_key(self) -> str:
        return f"call/{self._number}"

    # -- the watching thread -------------------------------------------------------------------------------------

    def _watch(self, has_read: threading.Event) -> None:
        try:
            notices = Notices(self._connect())
            known = list(notices.news())
            for notice in known:
                self._take_note_of(notice)
            number = len(known)
            has_read.set()
            while True:
                notice = notices.wait(number)
                number += 1
                with self._changed:
                    self._take_note_of(notice)
                    self._changed.notify_all()
        except dist.DistError:
            with self._changed:
                self._is_cut_off = True
                self._wake()
                self._changed.notify_all()
            has_read.set()

    def _take_note_of(self, notice: Notice) -> None:
        if isinstance(notice, Formed):
            self._formed.append(notice.generation)
            self._restart = None
        elif isinstance(notice, Broken):
            self._broken[notice.generation] = notice.reason
            if notice.generation == self._number:
                self._wake()
        elif isinstance(notice, Joining):
            self._joining = notice
        elif isinstance(notice, Restart):
            self._restart = notice
        elif isinstance(notice, Stop):
            self._is_stopping = True

    def _wake(self) -> None:
        """Lets the training thread go, should it be blocked in a collective."""
        self._connections.cut()
        if dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
            group = dist.distributed_c10d._get_default_group()
            group._get_backend(torch.device("cuda")).abort()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            while not condition():
                if self._is_cut_off:
                    raise CutOffError
                if self._restart is not None:
                    raise RestartError(self._restart.keeper)
                self._changed.wait()
        if self._restart is not None:
            raise RestartError(self._restart.keeper)

    def _tell(self, event: Event) -> None:
        try:
            self._events.append(event)
        except dist.DistError as error:
            raise CutOffError from error


@functools.cache
def _of_environment() -> Member:
    host, _, port = os.environ["LIGHTNING_SCAR_STORE"].rpartition(":")
    slot, spawn, generation = (int(os.environ[f"LIGHTNING_SCAR_{name}"]) for name in ("SLOT", "SPAWN", "GENERATION"))
    return Member(host, int(port), slot, spawn, generation, int(os.environ["WORLD_SIZE"]))


def hang_timeout() -> timedelta | None:
    """How long the others wait for a worker that hangs, if the user said so."""
    seconds = os.environ.get("LIGHTNING_SCAR_HANG_TIMEOUT")
    return timedelta(seconds=float(seconds)) if seconds else None
