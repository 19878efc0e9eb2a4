"""A process that imports what workers import, does nothing else, and forks them.

It has one thread, computes nothing and opens nothing: a fork of a process that did may hang. What it finds odd about
itself it says, and is not used. Its standard input is the connection to whoever started it; see
:class:`~lightning_scar.elastic.prepared.starter.PreparedParent`.
"""

import gc
import importlib
import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from lightning_scar.elastic.prepared.child import become, run
from lightning_scar.elastic.prepared.environment import readers, watched
from lightning_scar.elastic.prepared.imports import is_installed
from lightning_scar.elastic.prepared.program import Program, file_of

#: Standard input, output and error, and one for a spare.
_STREAMS = 4
#: How long a message may be.
MESSAGE_BYTES = 1 << 20


class Parent:
    """What is imported in this process, and whether it may be forked.

    Args:
        connection: To whoever asks for processes. Its messages are kept apart by the kernel.

    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._descriptors = _descriptors()
        #: The files of modules, and their state when they were imported.
        self._files: dict[str, tuple[int, int]] = {}

    def serve(self) -> Program:
        """Answer requests; return in each process that is forked, with what it is to run."""
        while True:
            try:
                message, streams, *_ = socket.recv_fds(self._connection, MESSAGE_BYTES, _STREAMS)
            except ConnectionError:
                message, streams = b"", []
            if not message:
                os._exit(0)  # Nobody asks any more.
            request = json.loads(message)
            if "modules" in request:
                self._answer(refusal=self._import(request["modules"]))
                continue
            if stale := self._stale():
                self._answer(refusal=f"{stale} has changed")
            elif (program := self._fork(request, streams)) is not None:
                return program
            for descriptor in streams:
                os.close(descriptor)

    def _answer(self, **fields: Any) -> None:
        with suppress(ConnectionError):
            self._connection.send(json.dumps(fields).encode())

    # -- what is imported ----------------------------------------------------------------------------------------

    def _import(self, modules: Sequence[str]) -> str:
        """Import modules. Return why this process may not be forked after it, or ""."""
        with watched():
            for name in modules:
                if name in sys.modules or (file := file_of(name)) is None or not is_installed(file):
                    continue
                try:
                    importlib.import_module(name)
                except BaseException as error:
                    return f"import {name} raised {type(error).__name__}: {error}"
        self._files |= {file: _state(file) for file in _files() if file not in self._files}
        # Collections in forks then do not write to the pages that they share.
        gc.freeze()
        return self._oddity()

    def _oddity(self) -> str:
        """Return what forks would inherit beside imported modules, or ""."""
        for name, variables in readers.items():
            if not hasattr(getattr(sys.modules.get(name), "rank_zero_only", None), "rank"):
                return f"{name} reads {variables[0]} when it is imported"
        if len(os.listdir("/proc/self/task")) > 1:
            return "an imported package has started a thread"
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return "an imported package has initialized CUDA"
        if opened := _descriptors() - self._descriptors:
            return f"an imported package keeps {opened.pop()[1]} open"
        if sys.gettrace() is not None or sys.getprofile() is not None:
            return "a debugger or profiler runs in it"
        if "/dev/shm/" in Path("/proc/self/maps").read_text():
            return "an imported package shares memory"
        return ""

    def _stale(self) -> str:
        """Return a module whose file is another one now, or ""."""
        return next((file for file, state in self._files.items() if _state(file) != state), "")

    # -- forks ---------------------------------------------------------------------------------------------------

    def _fork(self, request: dict[str, Any], streams: list[int]) -> Program | None:
        """Return in the new process what it is to run; ``None`` in this one."""
        heard, told = os.pipe()
        try:
            between = os.fork()
        except OSError as error:
            self._answer(refusal=f"cannot fork: {error}")
            return None
        if not between:
            if _forked_again():
                os._exit(0)
            self._connection.detach()
            become(request, streams, told)
            program = Program.of(request["command"])
            assert program is not None
            return program
        os.close(told)
        # Its child is an orphan then, and goes to whoever asked for it.
        os.waitpid(between, 0)
        pid = os.read(heard, 20)
        os.close(heard)
        self._answer(**({"pid": int(pid)} if pid else {"refusal": "a fork failed"}))
        return None


def _forked_again() -> bool:
    try:
        return os.fork() != 0
    except OSError:
        return True


def _files() -> set[str]:
    found = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return {file for file in found if isinstance(file, str)}


def _state(file: str) -> tuple[int, int]:
    try:
        about = os.stat(file)
    except OSError:
        return (0, 0)
    return about.st_mtime_ns, about.st_size


def _descriptors() -> set[tuple[str, str]]:
    """Return which descriptors are open, and what they lead to."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        # The listing's own is closed by now.
        with suppress(OSError):
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def main() -> NoReturn:
    """Serve who started this process, and become what they ask for."""
    # Of the modules that a program imports some may be found beside it.
    program = Program.of([sys.executable, *sys.argv[1:]])
    assert program is not None
    sys.path[:1] = [program.path] if program.path is not None else []
    run(Parent(socket.socket(fileno=os.dup(0))).serve())
