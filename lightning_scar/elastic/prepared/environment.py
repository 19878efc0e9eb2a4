"""The variables in which a worker finds its place in the job, and who reads them when."""

import os
import sys
from collections.abc import Iterator
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


#: Modules of this process that have read variables of :data:`OF_A_WORKER` when they were imported, and which.
readers: dict[str, list[str]] = {}


class _Watched(os._Environ):  # type: ignore[type-arg]
    """``os.environ``, which notes who reads a variable of :data:`OF_A_WORKER`."""

    def __getitem__(self, name: str) -> str:
        if name in OF_A_WORKER:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_globals.get("__name__") in ("os", "collections.abc"):
                frame = frame.f_back
            readers.setdefault(str(frame.f_globals.get("__name__")), []).append(name)
        value: str = super().__getitem__(name)
        return value


@contextmanager
def watched() -> Iterator[None]:
    """Note in :data:`readers` which modules read variables of a worker."""
    plain = os.environ.__class__
    os.environ.__class__ = _Watched
    try:
        yield
    finally:
        os.environ.__class__ = plain
