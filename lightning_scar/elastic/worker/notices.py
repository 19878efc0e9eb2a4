"""What a worker knows of its job: the notices so far, read by a thread of their own."""

import atexit
import threading
from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]

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

#: Seconds between two looks at the store. A blocking wait there could only be ended by breaking its connection.
_POLL = 0.02


class History:
    """The notices of a job, as far as this worker has heard.

    Args:
        connect: Makes a connection to the supervisor's store, for the reading thread alone.
        key: Under which the others find in the store how many notices this worker has heard.
        on_break: Called in that thread with the number of a generation that broke; with ``None`` if the supervisor is
            gone.

    """

    def __init__(self, connect: Callable[[], Store], key: str, on_break: Callable[[int | None], None]) -> None:
        #: Whether the supervisor is gone.
        self.is_cut_off = False
        #: Whether the job is to end.
        self.is_stopping = False
        #: With how many notices this worker knew of the newest one that a leader has to act on.
        self.acted_on = 0
        self._connect = connect
        self._key = key
        self._heard = 0
        self._on_break = on_break
        self._formed: list[Generation] = []
        self._broken: set[int] = set()
        self._joining: Joining | None = None
        self._restart: Restart | None = None
        self._changed = threading.Condition()
        self._has_ended = threading.Event()
        has_read = threading.Event()
        self._thread = threading.Thread(target=self._read, args=[has_read], name="scar-notices", daemon=True)
        self._thread.start()
        # A thread that comes back from the store while the interpreter ends takes the process down.
        atexit.register(self._end)
        # What was true before this process began must not be taken for news.
        has_read.wait()

    def generations(self, slot: int, spawn: int) -> list[Generation]:
        """Those that a worker is a member of, in order."""
        return [generation for generation in self._formed if generation.spawns.get(slot) == spawn]

    def is_broken(self, generation: int) -> bool:
        """Whether a generation is no more."""
        return self.is_cut_off or generation in self._broken

    def is_joined(self, generation: int) -> bool:
        """Whether replacements wait to be taken into the generation after one."""
        return self._joining is not None and self._joining.generation == generation

    @property
    def is_restarting(self) -> bool:
        """Whether all workers will be started again."""
        return self._restart is not None

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something to be known.

        Args:
            condition: Looked at after every notice.

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
                self._take_note_of(notice)
            store.set(self._key, str(self._heard))
            has_read.set()
            while not self._has_ended.wait(_POLL):
                for notice in notices.news():
                    self._hear(notice)
                    store.set(self._key, str(self._heard))
        except Exception:
            with self._changed:
                self.is_cut_off = True
                self._changed.notify_all()
            self._on_break(None)
            has_read.set()

    def _hear(self, notice: Notice) -> None:
        with self._changed:
            self._take_note_of(notice)
            self._changed.notify_all()
        if isinstance(notice, Broken):
            self._on_break(notice.generation)

    def _take_note_of(self, notice: Notice) -> None:
        self._heard += 1
        if isinstance(notice, Joining | Stop):
            self.acted_on = self._heard
        match notice:
            case Formed():
                self._formed.append(notice.generation)
                # Of those whom a new start has replaced.
                self._restart = None
            case Broken():
                self._broken.add(notice.generation)
            case Joining():
                self._joining = notice
            case Restart():
                self._restart = notice
            case Stop():
                self.is_stopping = True
            case _:
                pass

    def _end(self) -> None:
        self._has_ended.set()
        self._thread.join(timeout=5)
