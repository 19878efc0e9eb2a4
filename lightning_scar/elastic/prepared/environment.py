"""The variables in which a worker finds its place in the job, and who reads them when."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: What differs between the workers of a job, or between the starts of one.
OF_A_WORKER = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_NAME",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RESTART_COUNT",
        "LIGHTNING_SCAR_STORE",
        "LIGHTNING_SCAR_SLOT",
        "LIGHTNING_SCAR_SPAWN",
        "LIGHTNING_SCAR_GENERATION",
    }
)


class _Watched(os._Environ):  # type: ignore[type-arg]
    """``os.environ``, which tells who reads a variable of :data:`OF_A_WORKER`."""

    asked: Callable[[str, str], None]

    def __getitem__(self, name: str) -> str:
        if name in OF_A_WORKER:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_globals.get("__name__") in ("os", "collections.abc"):
                frame = frame.f_back
            self.asked(str(frame.f_globals.get("__name__")), name)
        value: str = super().__getitem__(name)
        return value


@contextmanager
def watched(asked: Callable[[str, str], None]) -> Iterator[None]:
    """Call a function before somebody reads a variable of :data:`OF_A_WORKER` from ``os.environ``.

    Args:
        asked: Gets the name of the module that reads it, and that of the variable.

    """
    plain = os.environ.__class__
    _Watched.asked = staticmethod(asked)  # type: ignore[assignment]
    os.environ.__class__ = _Watched  # type: ignore[assignment]
    try:
        yield
    finally:
        os.environ.__class__ = plain

