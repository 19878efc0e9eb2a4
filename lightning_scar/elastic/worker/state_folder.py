"""Where a worker saves its state when all workers are started again."""

import os
from pathlib import Path

#: The environment variable in which the supervisor names the folder.
VARIABLE = "LIGHTNING_SCAR_STATE"


def state_folder() -> Path:
    """Return the folder of this worker's supervisor.

    Raises:
        KeyError: If it has none.

    """
    return Path(os.environ[VARIABLE])
