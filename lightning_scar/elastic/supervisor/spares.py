"""Spares: replacements that have run the script before anybody dies, up to where it asks for its rank."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress

from lightning_scar.elastic.prepared.imports import NotPreparedError
from lightning_scar.elastic.prepared.starter import Starter
from lightning_scar.elastic.supervisor.process import WorkerProcess


class Spares:
    """The spares of a node.

    Args:
        starter: Starts them.
        count: How many wait, once a worker trains.
        environment: What all workers of the node have in common.
        tell_user: Called if the script ends in one, after which there are none.

    """

    def __init__(
        self, starter: Starter, count: int, environment: Mapping[str, str], tell_user: Callable[[str], None]
    ) -> None:
        self._starter = starter
        self._count = count
        self._environment = environment
        self._tell_user = tell_user
        #: Each with the end of a pipe through which it gets its place.
        self._waiting: list[tuple[WorkerProcess, int]] = []

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def refill(self) -> None:
        """Start those that are missing."""
        for worker, place in list(self._waiting):
            code = worker.poll()
            if code is None:
                continue
            self._waiting.remove((worker, place))
            os.close(place)
            if code >= 0:
                # The next one would do the same.
                self._count = 0
                self._tell_user(f"there are no spares: one exited with code {code} before it asked for its rank")
        while self._starter.knows_imports and len(self._waiting) < self._count and self._start():
            pass

    def take(self, environment: Mapping[str, str]) -> WorkerProcess | None:
        """Give a spare its place in the job, and return it; ``None`` if there is none.

        Args:
            environment: The variables of the place.

        """
        while self._waiting:
            worker, place = self._waiting.pop(0)
            is_alive = worker.poll() is None
            with suppress(BrokenPipeError), os.fdopen(place, "w") as pipe:
                pipe.write(json.dumps(dict(environment)))
            if is_alive:
                return worker
        return None

    def close(self) -> None:
        """End them."""
        while self._waiting:
            worker, place = self._waiting.pop()
            worker.send(signal.SIGKILL)
            os.close(place)

    def _start(self) -> bool:
        source, place = os.pipe()

        try:
            worker = WorkerProcess(lambda errors: self._starter.start_spare(self._environment, errors, source))
        except (OSError, NotPreparedError):
            os.close(place)
            return False
        finally:
            os.close(source)
        self._waiting.append((worker, place))
        return True
