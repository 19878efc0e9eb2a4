"""Which policy is possible with a training's data."""

import warnings
from dataclasses import replace

from lightning_scar.continuation.outages import OutagePolicy
from lightning_scar.continuation.protocol import Training


def feasible(policy: OutagePolicy, training: Training, warns: bool) -> OutagePolicy:
    """Return the policy, or ``"shrink"`` where it is impossible.

    Args:
        policy: The requested policy.
        training: The training, after its data were set up.
        warns: Whether this process warns about a change.

    """
    why = None
    if policy.on_failure == "cover":
        why = training.why_unknown(slot=0)
    elif policy.on_failure == "buffer" and training.extra_batches() is None:
        why = "extra batches require a map-style dataset in a single DataLoader with a batch size"
    if why is None:
        return policy
    if warns:
        warn_of_shrinking(policy, why)
    return replace(policy, on_failure="shrink")


def warn_of_shrinking(policy: OutagePolicy, why: str) -> None:
    """Warn that the group shrinks after a failure.

    Args:
        policy: The requested policy.
        why: Why it is impossible: a clause.

    """
    warnings.warn(
        f"lightning-scar: on_failure={policy.on_failure!r} is not possible here, because {why}. The group shrinks "
        "after a failure instead.",
        stacklevel=3,
    )
