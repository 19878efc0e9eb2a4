"""The background writer: one thread, a bounded queue, and no error lost."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

#: One write in progress and one waiting, as there are two staging buffers.
DEPTH = 2


class BackgroundWriter:
    """Runs writes one after the other, in order of submission.

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
        """The number of writes in progress or waiting."""
        self._pending = [future for future in self._pending if not future.done()]
        return len(self._pending)

    def reserve(self, wait: bool) -> bool:
        """Reserve a place in the queue for one :meth:`submit` or :meth:`give_back`.

        Args:
            wait: Whether to wait for a place when the queue is full.

        Returns:
            Whether a place was reserved.

        """
        return self._room.acquire(blocking=wait)

    def give_back(self) -> None:
        """Release a reserved place that is not needed."""
        self._room.release()

    def submit(self, write: Callable[[], None]) -> None:
        """Queue a write in a reserved place.

        Args:
            write: What to run. :meth:`take_errors` returns its exception, if any.

        """
        if self._executor is None:
            # The interpreter joins an executor's threads at exit, so that no queued write is lost.
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
        """Return the errors since the last call, oldest first."""
        errors, self._errors = self._errors, []
        return errors

    def drain(self) -> None:
        """Wait for all queued writes, and end the thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
            self._pending = []
