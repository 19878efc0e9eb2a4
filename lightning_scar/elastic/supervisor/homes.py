"""Which node runs each slot: its own, or another one where its own cannot any more."""

from collections.abc import Iterable

#: Replacements that die on their way in, one after the other, before another node takes the slot.
_FAILED_STARTS = 2


class Homes:
    """The nodes of the slots. A slot moves only to where a spare waits.

    Args:
        per_node: How many slots each node has of its own.

    Example::

        >>> homes = Homes(per_node=2)
        >>> homes.note_spares(node=1, count=1)
        >>> homes.fail(slot=0), homes.fail(slot=0), homes.node_of(slot=0), homes.node_of(slot=1)
        (None, 1, 1, 0)
        >>> homes.lose(node=1, slots=[2, 3]), homes.node_of(slot=0)
        ({0, 2, 3}, 0)

    """

    def __init__(self, per_node: int) -> None:
        self._per_node = per_node
        self._spares: dict[int, int] = {}
        self._moved: dict[int, int] = {}
        self._failed: dict[int, int] = {}

    def note_spares(self, node: int, count: int) -> None:
        """Note how many spares wait on a node."""
        self._spares[node] = count

    def node_of(self, slot: int) -> int:
        """Return the node that runs a slot."""
        return self._moved.get(slot, slot // self._per_node)

    def fail(self, slot: int) -> int | None:
        """Note that a replacement died on its way in. Return where the slot moves now, if it does."""
        self._failed[slot] = self._failed.get(slot, 0) + 1
        left_out = {slot // self._per_node, self.node_of(slot)}
        nodes = [node for node, count in sorted(self._spares.items()) if count and node not in left_out]
        if self._failed[slot] < _FAILED_STARTS or not nodes:
            return None
        self._moved[slot] = nodes[0]
        self._spares[nodes[0]] -= 1
        self.succeed(slot)
        return nodes[0]

    def succeed(self, slot: int) -> None:
        """Note that a replacement is ready."""
        self._failed.pop(slot, None)

    def lose(self, node: int, slots: Iterable[int]) -> set[int]:
        """Note that a node is lost. Return the slots that it ran; those that had moved there belong home again.

        Args:
            node: The node.
            slots: Its own slots.

        """
        self._spares.pop(node, None)
        guests = {slot for slot, home in self._moved.items() if home == node}
        for slot in guests:
            del self._moved[slot]
        return guests | {slot for slot in slots if slot not in self._moved}
