"""Features that some operating systems lack, and one clear message for each."""

from lightning_scar.storage.locks import IS_POSIX


def supervisor_refusal() -> str | None:
    """Return why ``lightning-scar run`` and ``scar_ddp`` cannot start workers here; ``None`` if they can."""
    if IS_POSIX:
        return None
    return (
        "`lightning-scar run` and strategy='scar_ddp' need Linux or macOS: they supervise processes with POSIX signals "
        "and file locks. Saving and resuming work here: use strategy='ddp', and start several workers with torchrun."
    )
