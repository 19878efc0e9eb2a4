"""The two logs in the supervisor's store.

All :mod:`messages <lightning_scar.elastic.protocol.messages>` go through them.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import get_args

from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.messages import Arrived, Event, Formed, Generation, Joining, Notice

_KINDS = {kind.__name__: kind for kind in (*get_args(Event), Arrived, *get_args(Notice))}


def _quietly() -> None:
    """Tell nobody."""


def _encode(message: Event | Arrived | Notice) -> str:
    return json.dumps({"kind": type(message).__name__, **asdict(message)})


def _decode(text: str | bytes) -> Event | Arrived | Notice:
    fields = json.loads(text)
    kind = _KINDS[fields.pop("kind")]
    if kind is Formed:
        generation = fields["generation"]
        generation["spawns"] = {int(slot): spawn for slot, spawn in generation["spawns"].items()}
        generation["joiners"] = tuple(generation["joiners"])
        return Formed(Generation(**generation))
    if kind is Joining:
        fields["slots"] = tuple(fields["slots"])
    message: Event | Arrived | Notice = kind(**fields)
    return message


class Events:
    """The log of events: many writers, any of which may be killed while it writes; one reader, which removes them.

    Args:
        store: The supervisor's.
        ring: Called after each event, to wake the reader.

    Example::

        >>> from torch.distributed import HashStore
        >>> from lightning_scar.elastic.protocol.messages import Began
        >>> store = HashStore()
        >>> events = Events.create(store)
        >>> Events(store).append(Began(slot=1, spawn=4))
        >>> list(events.news())
        [Began(slot=1, spawn=4, can_take_in=True)]

    """

    _KEY = "events"

    def __init__(self, store: Store, ring: Callable[[], None] = _quietly) -> None:
        self._store = store
        self._ring = ring

    @classmethod
    def create(cls, store: Store) -> "Events":
        """Create the log; once, before anybody else uses it."""
        store.set(cls._KEY, "")
        return cls(store)

    def append(self, event: Event | Arrived) -> None:
        """Append an event, in one operation of the store."""
        self._store.append(self._KEY, _encode(event) + "\n")  # type: ignore[attr-defined]
        # The store does not confirm an append. When it answers a question after it, the event is there.
        self._store.check([self._KEY])
        self._ring()

    def news(self) -> Iterator[Event | Arrived]:
        """Yield the events since the last call."""
        text = self._store.get(self._KEY)
        # What was read is removed, unless somebody has just appended to it.
        while text and (left := self._store.compare_set(self._KEY, text.decode(), "")):
            text = left
        for line in text.splitlines():
            yield _decode(line)  # type: ignore[misc]


class Notices:
    """The log of notices: one writer, the coordinator; any number of readers.

    Args:
        store: The supervisor's.
        ring: Called after new notices, to wake the readers.

    Example::

        >>> from torch.distributed import HashStore
        >>> from lightning_scar.elastic.protocol.messages import Stop
        >>> store = HashStore()
        >>> Notices(store).append(Stop("SIGTERM"))
        >>> list(Notices(store).news())
        [Stop(reason='SIGTERM', disbands=False)]

    """

    def __init__(self, store: Store, ring: Callable[[], None] = _quietly) -> None:
        self._store = store
        self._ring = ring
        self._length = 0
        self._read = 0

    @property
    def length(self) -> int:
        """How many notices this writer has appended."""
        return self._length

    def append(self, *notices: Notice) -> None:
        """Append notices."""
        for notice in notices:
            self._store.set(self._key(self._length), _encode(notice))
            self._length += 1
        if notices:
            # The store does not confirm a set. When it answers a question after it, everybody can read it.
            self._store.check([self._key(self._length - 1)])
            self._ring()

    def skip(self, count: int) -> list[Notice]:
        """Return the first ``count`` notices, and begin to read after them."""
        skipped = [_decode(self._store.get(self._key(i))) for i in range(count)]
        self._read = count
        return skipped  # type: ignore[return-value]

    def news(self) -> Iterator[Notice]:
        """Yield the notices since the last call."""
        while self._store.check([self._key(self._read)]):
            notice = _decode(self._store.get(self._key(self._read)))
            self._read += 1
            yield notice  # type: ignore[misc]

    @staticmethod
    def _key(number: int) -> str:
        return f"notice/{number}"
