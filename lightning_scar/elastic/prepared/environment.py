"""The variables in which a worker finds its place in the job, and who reads them when."""

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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


_PLAIN: type[os._Environ[str]] = os.environ.__class__
#: The descriptor over which a spare gets its place.
PLACE = 3
_place_lock = threading.Lock()


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
    """Note in :data:`readers` which modules ask for variables of a worker, which nobody has meanwhile.

    Who looks at the whole environment, as tqdm does for its own, finds none of them.
    """
    hidden = {name: os.environ.pop(name) for name in OF_A_WORKER if name in os.environ}
    os.environ.__class__ = _Watched
    try:
        yield
    finally:
        os.environ.__class__ = _PLAIN
        os.environ.update(hidden)


class _WithoutPlace(os._Environ):  # type: ignore[type-arg]
    """``os.environ`` of a spare: whoever reads a variable of :data:`OF_A_WORKER` waits until it has a place."""

    def __getitem__(self, name: str) -> str:
        if name in OF_A_WORKER:
            _wait_for_place()
        # Its class is another one by now.
        value: str = _PLAIN.__getitem__(self, name)
        return value


def become_spare() -> None:
    """Let this process wait for its place in the job when it first asks for it, or opens a device."""
    os.environ.update(dict.fromkeys(OF_A_WORKER, ""))
    os.environ.__class__ = _WithoutPlace
    # Only rank 0 prints and writes.
    set_ranks(1)
    torch = sys.modules.get("torch")
    if torch is not None:
        open_device = torch.cuda._lazy_init

        def wait_and_open(*args: Any) -> None:
            _wait_for_place()
            torch.cuda._lazy_init = open_device
            open_device(*args)

        torch.cuda._lazy_init = wait_and_open


def _wait_for_place() -> None:
    with _place_lock:
        if os.environ.__class__ is not _WithoutPlace:
            return
        with os.fdopen(PLACE) as source:
            place = source.read()
        if not place:
            os._exit(0)  # The supervisor has ended.
        os.environ.__class__ = _PLAIN  # type: ignore[assignment]
        os.environ.update(json.loads(place))
        set_ranks()


def set_ranks(rank: int | None = None) -> None:
    """Tell modules the rank that they would have read when they were imported.

    Args:
        rank: Another one.

    """
    for name, variables in readers.items():
        sys.modules[name].rank_zero_only.rank = _read_rank(variables) if rank is None else rank


def _read_rank(variables: Iterable[str]) -> int:
    return int(next((os.environ[name] for name in variables if name in os.environ), "0"))
