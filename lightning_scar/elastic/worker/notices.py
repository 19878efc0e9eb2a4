"""What a worker knows of its job: the notices so far, read by a thread."""

import atexit
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.doorbell import Doorbell
from lightning_scar.elastic.protocol.log import Notices
from lightning_scar.elastic.protocol.messages import (
    Broken,
    Formed,
    Generation,
    Joining,
    Notice,
    Restart,
    Stop,
)
from lightning_scar.elastic.worker.errors import CutOffError, RestartError

#: Seconds between two calls of ``on_tick``.
_TICK_SECONDS = 0.5


def acknowledgements_key(generation: int) -> str:
    """Return the key that counts the members of a generation which know why something may be announced in it."""
    return f"acknowledgements/{generation}"


@contextmanager
def or_cut_off() -> Iterator[None]:
    """Raise :class:`CutOffError` where the supervisor's store does not answer."""
    try:
        yield
    except dist.DistError as error:
        raise CutOffError from error


class History:
    """The notices of a job, as far as this worker has read them.

    Args:
        connect: Opens a connection to the supervisor's store, for the reading thread alone.
        doorbell: Rings when there are notices.
        slot: This worker's slot.
        spawn: Its spawn number.
        on_break: Called in that thread with the number of a generation that broke; with ``None`` if the supervisor is
            gone.
        on_tick: Called in that thread twice a second with its store.

    """

    def __init__(
        self,
        connect: Callable[[], Store],
        doorbell: Doorbell,
        slot: int,
        spawn: int,
        on_break: Callable[[int | None], None],
        on_tick: Callable[[Store], None],
    ) -> None:
        #: Whether the supervisor is gone.
        self.is_cut_off = False
        #: Whether the job ends.
        self.is_stopping = False
        #: Why no more generations form; "" if they may.
        self.disbanded = ""
        #: The generations that this worker is a member of, in order.
        self.generations: list[Generation] = []
        self._connect = connect
        self._doorbell = doorbell
        self._slot = slot
        self._spawn = spawn
        self._on_break = on_break
        self._on_tick = on_tick
        self._acknowledged = -1
        self._broken: set[int] = set()
        self._joining: Joining | None = None
        self._restart: Restart | None = None
        self._changed = threading.Condition()
        self._has_ended = False
        has_read = threading.Event()
        self._thread = threading.Thread(target=self._read, args=[has_read], name="scar-notices", daemon=True)
        self._thread.start()
        # A thread that returns from the store while the interpreter exits would crash the process.
        atexit.register(self._end)
        # What was published before this process began is not news.
        has_read.wait()

    def is_broken(self, generation: int) -> bool:
        """Return whether a generation has failed."""
        return self.is_cut_off or generation in self._broken

    def is_joined(self, generation: int) -> bool:
        """Return whether replacements wait to be taken into the generation after this one."""
        return self._joining is not None and self._joining.generation == generation

    @property
    def is_restarting(self) -> bool:
        """Whether all workers will be started again."""
        return self._restart is not None

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that notices make true.

        Args:
            condition: Checked after every notice.

        Raises:
            RestartError: If all workers will be started again.
            CutOffError: If the supervisor is gone.

        """
        with self._changed:
            while self._restart is None and not condition():
                if self.is_cut_off:
                    raise CutOffError
                self._changed.wait()
        if self._restart is not None:
            raise RestartError(self._restart.keeper, self._restart.deaths)

    def _read(self, has_read: threading.Event) -> None:
        try:
            store = self._connect()
            notices = Notices(store)
            for notice in notices.news():
                self._apply(notice)
            self._acknowledge(store)
            has_read.set()
            ticked_at = time.monotonic()
            while self._doorbell.wait(ticked_at + _TICK_SECONDS - time.monotonic()):
                for notice in notices.news():
                    self._handle(notice)
                    self._acknowledge(store)
                if time.monotonic() - ticked_at >= _TICK_SECONDS:
                    ticked_at = time.monotonic()
                    self._on_tick(store)
            self._lose_supervisor()
        except Exception:
            self._lose_supervisor()
            has_read.set()

    def _lose_supervisor(self) -> None:
        if self._has_ended:
            return
        with self._changed:
            self.is_cut_off = True
            self._changed.notify_all()
        self._on_break(None)

    def _acknowledge(self, store: Store) -> None:
        """Tell the leader, once in a generation, that this worker knows why something may be announced in it."""
        number = self.generations[-1].number if self.generations else -1
        if number > self._acknowledged and (self.is_stopping or self.is_joined(number)):
            self._acknowledged = number
            store.add(acknowledgements_key(number), 1)

    def _handle(self, notice: Notice) -> None:
        with self._changed:
            self._apply(notice)
            self._changed.notify_all()
        if isinstance(notice, Broken):
            self._on_break(notice.generation)

    def _apply(self, notice: Notice) -> None:
        match notice:
            case Formed():
                if notice.generation.spawns.get(self._slot) == self._spawn:
                    self.generations.append(notice.generation)
                # It was meant for the workers before the new start.
                self._restart = None
            case Broken():
                self._broken.add(notice.generation)
            case Joining():
                self._joining = notice
            case Restart():
                self._restart = notice
            case Stop():
                self.is_stopping = True
                self.disbanded = notice.reason if notice.disbands else ""
            case _:
                pass

    def _end(self) -> None:
        # Not in a fork of this process, which would close the connection here, too.
        if self._thread.is_alive():
            self._has_ended = True
            self._doorbell.close()
            self._thread.join(timeout=5)
