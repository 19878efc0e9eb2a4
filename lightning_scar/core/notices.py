"""Warnings that are given once, and messages to the user."""

import sys
import warnings


class Notices:
    """Warns of each kind of trouble once.

    Example::

        >>> import warnings
        >>> notices = Notices()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     notices.warn("disk", "the disk is full")
        ...     notices.warn("disk", "the disk is still full")
        >>> [str(warning.message) for warning in caught]
        ['lightning-scar: the disk is full']

    """

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless this kind was warned of before."""
        if kind not in self._given:
            self._given.add(kind)
            warnings.warn(f"lightning-scar: {message}", stacklevel=5)

    def tell(self, message: str) -> None:
        """Print a message that is not a warning."""
        print(f"lightning-scar: {message}", file=sys.stderr, flush=True)
