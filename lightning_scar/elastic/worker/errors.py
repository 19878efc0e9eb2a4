"""Why a worker cannot go on in its generation."""

from typing import NamedTuple

#: How much of an error is told.
_ERROR_LENGTH = 200
#: What torch puts in front of an error in a callback of a future, such as those of collectives that DDP waits for.
_CALLBACK = "Got the following error when running the callback: RuntimeError: "


class Loss(NamedTuple):
    """How a worker lost its generation.

    Attributes:
        waited: Seconds for which it had been blocked when it gave up.
        failure: What failed, for the user; "" if it leaves as all members do.

    """

    waited: float = 0.0
    failure: str = ""

    @classmethod
    def of(cls, error: BaseException, waited: float) -> "Loss":
        """Return the one that an error shows."""
        line = next(iter(f"{error}".splitlines()), "").removeprefix(_CALLBACK)
        return cls(waited, line[:_ERROR_LENGTH] or type(error).__name__)


#: A worker leaves as all members do.
PLANNED = Loss()


class FinalError(RuntimeError):
    """Something other than the loss of another worker, which would lead to the next generation."""


class CutOffError(FinalError):
    """The supervisor is gone. A worker that went on would train apart from the others."""

    def __init__(self) -> None:
        super().__init__("lightning-scar: the supervisor is gone or out of reach; this worker stops")


class GroupLostError(RuntimeError):
    """The group broke, but no collective raised.

    Args:
        reason: Why, for the user.

    """

    def __init__(self, reason: str = "the process group was lost") -> None:
        super().__init__(f"lightning-scar: {reason}")


class NoGroupError(FinalError):
    """The job ends, and no more generations form.

    Args:
        reason: Why, for the user.

    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"lightning-scar: {reason}. The training stops. Start it again to resume from its last save.")


class UnevenDataError(FinalError):
    """Another worker has no more batches where this one has, so nobody answers its collectives.

    Args:
        reason: Who has none, and after which step.

    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"lightning-scar: {reason}. Give all ranks the same number of batches in an epoch: repeat or cut what an "
            "iterable dataset yields, or set limit_train_batches, drop_last=True, or Accelerate's even_batches=True."
        )


class RestartError(FinalError):
    """All workers will be started again.

    Attributes:
        keeper: The slot of the worker that saves its state for the next start; -1 for none.
        deaths: Which workers died and how, for the user.

    """

    def __init__(self, keeper: int, deaths: str) -> None:
        super().__init__("lightning-scar: all workers will be started again")
        self.keeper = keeper
        self.deaths = deaths
