"""The background writer: one thread, a bounded queue, and no error lost."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

#: One write under way and one waiting: what two staging buffers can hold.
DEPTH = 2


class BackgroundWriter:
    """Runs writes one after the other, in the order given.

    Example::

        >>> writer = BackgroundWriter()
        >>> writer.reserve(wait=True)
        True
        >>> writer.submit(lambda: None)
        >>> writer.drain()
        >>> writer.take_errors()
        []

    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._room = threading.BoundedSemaphore(DEPTH)
        self._pending: list[Future[None]] = []
        self._errors: list[Exception] = []

    @property
    def depth(self) -> int:
        """Writes that are under way or waiting."""
        self._pending = [future for future in self._pending if not future.done()]
        return len(self._pending)

    def reserve(self, wait: bool) -> bool:
        """Takes a place in the queue, for one :meth:`submit` or :meth:`give_back`.

        Args:
            wait: Whether to wait for a place when the queue is full.

        Returns:
            Whether there is one.

        """
        return self._room.acquire(blocking=wait)

    def give_back(self) -> None:
        """Returns a reserved place that is not needed after all."""
        self._room.release()

    def submit(self, write: Callable[[], None]) -> None:
        """Queues a write in a reserved place.

        Args:
            write: What to run. Its exception, if any, waits for :meth:`take_errors`.

        """
        if self._executor is None:
            # The interpreter joins an executor's threads at its end, so a queued write is never cut off by exit.
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="scar-writer")
        self._pending.append(self._executor.submit(self._run, write))

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._errors.append(error)
        finally:
            self._room.release()

    def take_errors(self) -> list[Exception]:
        """The errors since the last call, oldest first."""
        errors, self._errors = self._errors, []
        return errors

    def drain(self) -> None:
        """Waits until everything queued is written, and ends the thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
            self._pending = []
