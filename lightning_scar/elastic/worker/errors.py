"""Why a worker cannot go on in its generation."""


class CutOffError(RuntimeError):
    """The supervisor is gone. A worker that went on would train apart from the others."""

    def __init__(self) -> None:
        super().__init__("lightning-scar: the supervisor is gone or out of reach; this worker stops")


class GroupLostError(RuntimeError):
    """The group broke, but no collective raised."""

    def __init__(self) -> None:
        super().__init__("lightning-scar: the process group was lost")


class UnevenDataError(RuntimeError):
    """Another worker has no more batches where this one has, so nobody answers its collectives.

    Args:
        reason: Who has none, and after which step.

    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"lightning-scar: {reason}. Give all ranks the same number of batches in an epoch: repeat or cut what an "
            "iterable dataset yields, or set limit_train_batches, drop_last=True, or Accelerate's even_batches=True."
        )


class RestartError(RuntimeError):
    """All workers will be started again.

    Attributes:
        keeper: The slot of the worker that saves its state for the next start; -1 for none.
        deaths: Which workers died and how, for the user.

    """

    def __init__(self, keeper: int, deaths: str) -> None:
        super().__init__("lightning-scar: all workers will be started again")
        self.keeper = keeper
        self.deaths = deaths
