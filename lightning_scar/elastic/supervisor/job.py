"""What ``lightning-scar run`` was asked to run, and where. Nothing here imports torch, which takes a second."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_scar.elastic.supervisor.policy import Policy


class LaunchError(Exception):
    """The job cannot start."""


@dataclass(frozen=True)
class Layout:
    """The nodes of the job, and which of them this one is.

    Args:
        node: Its number.
        nodes: How many there are.
        per_node: How many workers each of them runs.

    """

    node: int
    nodes: int
    per_node: int

    @property
    def world_size(self) -> int:
        """How many workers there are."""
        return self.nodes * self.per_node

    def slots(self, node: int) -> range:
        """Return the slots of a node."""
        return range(node * self.per_node, (node + 1) * self.per_node)


@dataclass(frozen=True)
class Job:
    """What to run, and where.

    Args:
        command: What a worker runs: a program and its arguments.
        layout: How many workers there are, on which nodes.
        policy: What happens when they fail.
        host: The address of node 0.
        port: The port where it lets other nodes in; with one node that of its store, 0 for any free one.
        run_id: A name of the job; random if empty.
        hang_timeout: What the user chose, passed to the workers; ``None`` for the process group's timeout.
        prepared: Whether workers are forked from a process that has imported what they import.
        spares: How many replacements wait on each node.

    """

    command: Sequence[str]
    layout: Layout
    policy: Policy = field(default_factory=Policy)
    host: str = "127.0.0.1"
    port: int = 0
    run_id: str = ""
    hang_timeout: float | None = None
    prepared: bool = True
    spares: int = 0
