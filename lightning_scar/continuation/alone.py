"""Computing a batch as if there were no process group."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lightning_scar.continuation.protocol import Training
from lightning_scar.core.private import without_group


@contextmanager
def alone(training: Training, share: float, has_group: bool = False) -> Iterator[None]:
    """Compute gradients that DDP does not reduce, in a program that sees no process group.

    Args:
        training: The training.
        share: The share of a whole batch that is computed; with 0, what is logged is discarded.
        has_group: Whether what is computed may run collectives, nevertheless.

    """
    with ExitStack() as stack:
        for wrapper in training.wrappers():
            # An attribute of the instance, so that DDP's own code does not run.
            wrapper.forward = wrapper.module.__call__  # type: ignore[method-assign]
            stack.callback(vars(wrapper).pop, "forward", None)
        stack.enter_context(training.covering(share))
        if not has_group:
            stack.enter_context(without_group())
        yield
