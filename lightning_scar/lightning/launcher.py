"""The launcher that runs a script under the supervisor, and reports errors that end a Trainer's call."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from typing_extensions import override

from lightning_scar.core.platforms import supervisor_refusal


class SupervisedLauncher(_Launcher):
    """Turns the first process of a plain ``python train.py`` into the supervisor, which starts the workers.

    Args:
        options: Options of ``lightning-scar run``; ``None`` if something else creates the processes.
        on_call: Called at the start of every call of the Trainer.
        on_error: Called with every error that ends a call of the Trainer, before anything else handles it.
        on_signal: Called with a signal that asks for the end of the job.

    """

    def __init__(
        self,
        options: list[str] | None,
        on_call: Callable[["pl.Trainer"], None],
        on_error: Callable[[BaseException], None],
        on_signal: Callable[[int], None],
    ) -> None:
        self._options = options
        self._on_begin = on_call
        self._on_error = on_error
        self._on_signal = on_signal
        self._process = os.getpid()

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return False

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: "pl.Trainer", **kwargs: Any) -> Any:
        self._on_begin(trainer)
        if self._options is not None:
            become_supervisor(self._options)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            self._on_error(error)
            raise

    @override
    def kill(self, signum: int) -> None:
        """Tell the supervisor, which ends all workers behind the same step."""
        # A forked child has inherited the handler, and is none of them.
        if os.getpid() == self._process:
            self._on_signal(signum)


def become_supervisor(options: list[str]) -> None:
    """Replace this process with ``lightning-scar run``, which runs the same program in its workers.

    Args:
        options: Options of the command.

    Raises:
        MisconfigurationException: If the program cannot be run again in the same way, or not on this operating system.

    """
    if (refusal := supervisor_refusal()) is not None:
        raise MisconfigurationException(refusal)
    remedy = f"Start it with `lightning-scar run {' '.join(options)} your_script.py`, or use strategy='ddp'."
    if not _is_a_script():
        raise MisconfigurationException(
            "strategy='scar_ddp' starts this program again under a supervisor, so it must be a script; this is a "
            f"notebook, an interactive session or `python -c`. {remedy}"
        )
    if multiprocessing.parent_process() is not None or threading.current_thread() is not threading.main_thread():
        raise MisconfigurationException(
            "strategy='scar_ddp' starts this program again under a supervisor, so its main process and thread must "
            f"call `fit`; this call comes from a child process or another thread, e.g. of a sweep. {remedy}"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "lightning_scar", "run", *options, "--", *sys.orig_argv[1:]]
    os.execv(sys.executable, command)


def _is_a_script() -> bool:
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    return not hasattr(sys, "ps1") and path is not None and os.path.isfile(path) and "pytest" not in sys.modules
