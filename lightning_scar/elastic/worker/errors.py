"""Why a worker cannot go on in its generation."""


class CutOffError(RuntimeError):
    """The supervisor is gone. A worker that went on would train apart from the others."""

    def __init__(self) -> None:
        super().__init__("lightning-scar: the supervisor is gone or out of reach; this worker stops")


class GroupLostError(RuntimeError):
    """The group broke, but no collective raised."""

    def __init__(self) -> None:
        super().__init__("lightning-scar: the process group was lost")


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
