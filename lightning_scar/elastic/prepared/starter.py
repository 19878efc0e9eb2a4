"""How the processes of workers come to be: forks of a prepared parent where that can be, else programs of their own."""

import ctypes
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from lightning_scar.elastic.prepared.child import COVERAGE
from lightning_scar.elastic.prepared.environment import OF_A_WORKER
from lightning_scar.elastic.prepared.imports import Imports, NotPreparedError
from lightning_scar.elastic.prepared.parent import MESSAGE_BYTES
from lightning_scar.elastic.prepared.program import Program

_PR_SET_CHILD_SUBREAPER = 36
#: Seconds that a parent has for a fork, and for the imports of a program: a worker would not start sooner.
_FORK_SECONDS, _IMPORT_SECONDS = 30.0, 600.0
#: Seconds between two calls of who has something else to do meanwhile.
_MOMENT = 0.005
#: One thread at a time changes who gets orphans.
_orphans = threading.Lock()
_DIE_WITH_PARENT = Path(__file__).with_name("die_with_parent.py")


class Process(Protocol):
    """A child of this process."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; ``None`` while it lives."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""


def dying_with_this_process(command: Sequence[str]) -> list[str]:
    """Return the command line of a program that is killed when this process ends, even by SIGKILL."""
    return [sys.executable, "-I", "-S", str(_DIE_WITH_PARENT), str(os.getpid()), *command]


class ForkedProcess:
    """A child of this process that a prepared parent has forked.

    Args:
        pid: Its number.

    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; ``None`` while it lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""
        if self.poll() is None:
            os.kill(self.pid, sig)


class PreparedParent:
    """The end of a connection to a :mod:`parent <lightning_scar.elastic.prepared.parent>`.

    Args:
        connection: To it. Its messages are kept apart by the kernel.

    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        #: How many answers are still to come before it can fork.
        self._waits = 0

    @property
    def is_ready(self) -> bool:
        """Whether it has imported what it was asked to.

        Raises:
            NotPreparedError: If it must not be forked.

        """
        while self._waits and self._has_answer(0):
            self._finish_import()
        return not self._waits

    def import_too(self, modules: Sequence[str]) -> None:
        """Let it import more modules. It is not ready until it has."""
        self._ask({"modules": list(modules)}, [])
        self._waits += 1

    def fork(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        streams: Sequence[int],
        cwd: str = "",
        meanwhile: Callable[[], None] | None = None,
    ) -> ForkedProcess:
        """Return a child of this process.

        Args:
            command: Its command line.
            environment: All its variables.
            streams: Its standard input, output and error; for a spare also where it reads its place.
            cwd: Another working directory than this process's.
            meanwhile: Called until it is there, for what cannot wait: where the processors are busy it takes 0.2 s.

        Raises:
            NotPreparedError: If there is none.

        """
        while self._waits:
            self._finish_import()
        request = {
            "command": list(command),
            "environment": dict(environment),
            "cwd": os.path.abspath(cwd),
            "parent": os.getpid(),
        }
        with _receiving_orphans():
            self._ask(request, streams)
            deadline = time.monotonic() + _FORK_SECONDS
            while meanwhile is not None and not self._has_answer(_MOMENT) and time.monotonic() < deadline:
                meanwhile()
            return ForkedProcess(self._read_answer(_FORK_SECONDS)["pid"])

    def close(self) -> None:
        """Let it end. Its forks live on."""
        self._connection.close()

    def _ask(self, request: Mapping[str, Any], streams: Sequence[int]) -> None:
        try:
            socket.send_fds(self._connection, [json.dumps(request).encode()], streams)
        except OSError as error:
            raise NotPreparedError(f"the process that forks them cannot be asked ({error})") from None

    def _finish_import(self) -> None:
        self._read_answer(_IMPORT_SECONDS)
        self._waits -= 1

    def _has_answer(self, seconds: float) -> bool:
        return bool(select.select([self._connection], [], [], seconds)[0])

    def _read_answer(self, seconds: float) -> dict[str, Any]:
        self._connection.settimeout(seconds)
        try:
            answer = self._connection.recv(MESSAGE_BYTES)
        except OSError as error:
            raise NotPreparedError(f"the process that forks them does not answer ({error})") from None
        if not answer:
            raise NotPreparedError("the process that forks them has ended")
        fields: dict[str, Any] = json.loads(answer)
        if fields.get("refusal"):
            raise NotPreparedError(fields["refusal"])
        return fields


class ProgramParent(PreparedParent):
    """A parent that imports what a program imports.

    Args:
        command: The program's command line.
        environment: The variables that all its forks will have.

    Raises:
        NotPreparedError: If there can be none for this command, or on this operating system.

    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        if sys.platform != "linux":
            raise NotPreparedError("only on Linux a process can be forked safely")
        program = Program.of(command)
        if program is None or command[0] != sys.executable:
            raise NotPreparedError(f"`{' '.join(command)}` does not name a script, a module or code")
        imports = Imports(program)
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(mine)
        with theirs:
            # In a list of processes its forks look as the program does.
            parent = [command[0], *program.flags, "-m", "lightning_scar.elastic.prepared", *program.words]
            variables = _environment_of_parent({**environment, **imports.environment})
            self._process = subprocess.Popen(parent, stdin=theirs.fileno(), env=variables, start_new_session=True)
        self.import_too(imports.modules)

    @override
    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        super().close()


@contextmanager
def _receiving_orphans() -> Iterator[None]:
    """Become the parent of what the children of this process leave behind, instead of init."""
    libc = ctypes.CDLL(None)
    with _orphans:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            yield
        finally:
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _environment_of_parent(more: Mapping[str, str]) -> dict[str, str]:
    environment = {**os.environ, **more}
    # Threads of OpenBLAS start when it is loaded. A question for a GPU must not open it.
    environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    return {name: value for name, value in environment.items() if name not in OF_A_WORKER and name not in COVERAGE}


class Starter:
    """Starts the workers of a node.

    Args:
        command: What they run.
        environment: The variables that all of them have beside this process's.
        imports: Where one that trains lists the modules that it has imported.
        tell_user: Called with why they start slowly, once.
        prepared: Whether they are forked where that can be.

    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        imports: Path,
        tell_user: Callable[[str], None],
        prepared: bool = True,
    ) -> None:
        self._command = command
        self._environment = environment
        self._imports = imports
        self._tell_user = tell_user
        #: Called while a worker is forked, again and again.
        self.meanwhile: Callable[[], None] | None = None
        self._parent: ProgramParent | None = None
        #: Whether it could be forked.
        self._was_ready = False
        #: Whether a worker has told what it imports to train.
        self.knows_imports = False
        if prepared:
            self._prepare()

    @property
    def is_ready(self) -> bool:
        """Whether a worker would start now, rather than wait for imports."""
        while self._parent is not None:
            try:
                if not self._parent.is_ready:
                    return False
                self._was_ready = True
                break
            except NotPreparedError as error:
                self._do_without(error)
        return True

    def start(self, environment: Mapping[str, str], errors: int) -> Process:
        """Start a worker, in a session of its own. It dies with this process.

        Args:
            environment: What it has beside this process's and the common variables.
            errors: Its standard error.

        Raises:
            OSError: If there can be no more processes.

        """
        variables = self._variables(environment)
        if self._parent is not None:
            try:
                return self._parent.fork(self._command, variables, [0, 1, errors], meanwhile=self.meanwhile)
            except NotPreparedError as error:
                self._do_without(error)
        command = dying_with_this_process(self._command)
        return subprocess.Popen(command, env=variables, stderr=errors, start_new_session=True)

    def start_spare(self, environment: Mapping[str, str], errors: int, place: int) -> Process:
        """Start a spare, which runs the program until it asks for its place in the job.

        Args:
            environment: What it has beside this process's and the common variables.
            errors: Its standard error.
            place: Where it reads the variables of its place, as JSON to the end.

        Raises:
            NotPreparedError: If it cannot be forked now.

        """
        if self._parent is None or not self.is_ready:
            raise NotPreparedError("nothing is there that could fork them")
        return self._parent.fork(self._command, self._variables(environment), [0, 1, errors, place])

    def import_more(self) -> None:
        """Let later workers start with what one that trains has imported, once it has listed that."""
        if self._parent is not None and self._was_ready and self._imports.exists():
            modules = json.loads(self._imports.read_text())
            self._imports.unlink()
            self.knows_imports = True
            with suppress(NotPreparedError):
                self._parent.import_too(modules)

    def close(self) -> None:
        """End the prepared parent, if there is one."""
        if self._parent is not None:
            self._parent.close()
            self._parent = None

    def _variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, **self._environment, **environment}

    def _prepare(self) -> None:
        self._was_ready = False
        try:
            self._parent = ProgramParent(self._command, self._environment)
        except NotPreparedError as error:
            self._do_without(error)

    def _do_without(self, error: NotPreparedError) -> None:
        """Replace a parent that could be forked before, e.g. until a module changed; else say what is in the way."""
        self.close()
        if self._was_ready:
            self._prepare()
        else:
            self._tell_user(f"workers start as programs of their own, which takes longer: {error}")
