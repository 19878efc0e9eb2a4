"""Whether the next start can load what a run saves; else nobody would know until it has failed."""

import re
from collections.abc import Iterator
from typing import Any

from lightning_scar.core.notices import Notices
from lightning_scar.core.skeleton import pack, unpack


class ReadBack:
    """Loads the first skeleton of a run, as the next start will.

    Args:
        path: The directory, for the warning.
        rank: This process; only the first one looks.

    """

    def __init__(self, path: str, rank: int) -> None:
        self._path = path
        self._looks = rank == 0
        self._is_due = False
        self._weights_only: bool | None = None
        self._refused = ""

    def expect(self, weights_only: bool | None) -> None:
        """Check the next save.

        Args:
            weights_only: As in ``torch.load``: how this start has loaded what it found, or would have.

        """
        self._is_due, self._weights_only = self._looks, weights_only

    def check(self, skeleton: memoryview) -> None:
        """Load a skeleton, if a check is due. This is for the writer's thread."""
        if not self._is_due:
            return
        self._is_due = False
        try:
            unpack(skeleton, self._weights_only)
        except Exception as error:
            # Safe, because this process has just packed it.
            tree = unpack(skeleton, weights_only=False)["skeleton"]["tree"]
            self._refused = ", ".join(_refused(tree, self._weights_only)) or _reason(error)

    def warn(self, notices: Notices) -> None:
        """Warn if it could not be loaded."""
        if self._refused:
            notices.warn(
                "read_back",
                f"the next start cannot resume from {self._path}, because torch's `weights_only` refuses "
                f"{self._refused}. Pass `weights_only=False` to fit, or to resume() of a loop; or allow the classes "
                "with `torch.serialization.add_safe_globals([...])`; or save plain values instead",
            )


def _refused(value: Any, weights_only: bool | None, path: str = "") -> Iterator[str]:
    """Yield the parts of a skeleton's tree that cannot be loaded, with the reason."""
    try:
        unpack(pack({"part": value}), weights_only)
    except Exception as error:
        found = [part for key, item in _items(value) for part in _refused(item, weights_only, f"{path}/{key}")]
        yield from found or [f"{path.removeprefix('/')} ({_reason(error)})"]


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    yield from value.items() if type(value) is dict else ()


def _reason(error: Exception) -> str:
    """Return the class that torch refuses, or else the error."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found.group(1) if found else f"{type(error).__name__}: {str(error).splitlines()[0]}"
