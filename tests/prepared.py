"""Python programs that start in a moment: a parent that has imported everything forks them.

:class:`PreparedPopen` is ``subprocess.Popen`` but for where its process comes from. The process is a child of whoever
asked for it, has the streams, environment, working directory, arguments and ``__main__`` of a program of its own, and
dies by the same signals. What it starts with ``subprocess.Popen`` and ``sys.executable`` comes from a prepared parent
in the same way, so that the workers of a supervisor start in a moment, too.

Each process that may start others has a parent of its own for them, forked before it did anything. That one only ever
imports: it has no threads and computes nothing, since a fork of a process that did may hang.

What is started with ``subprocess.Popen`` itself is a real program. Where this is not Linux, all of them are.
"""

import atexit
import gc
import importlib
import inspect
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import psutil

from lightning_scar.elastic.prepared.child import run as run_program
from lightning_scar.elastic.prepared.environment import watched
from lightning_scar.elastic.prepared.parent import Parent
from lightning_scar.elastic.prepared.program import Program
from lightning_scar.elastic.prepared.starter import PreparedParent

#: What a prepared parent has imported. Torch imports its compiler when the first optimizer is made.
MODULES = [
    "lightning_scar.lightning.checkpoint",
    "lightning_scar.lightning.strategy",
    "lightning_scar.loops.accelerate",
    "lightning_scar.loops.continuation",
    "lightning_scar.elastic.supervisor.main",
    "lightning.fabric",
    "lightning.pytorch",
    "lightning.pytorch.cli",
    "accelerate",
    "torch._dynamo",
    "torch.distributed.optim",
    "torch.distributed.launcher.api",
    "torchdata.stateful_dataloader",
    "torchmetrics",
]
#: What modules of tests import, in which the functions are that ranks call. A program must not find pytest imported.
FOR_TESTS = ["pytest", "hypothesis", "hypothesis.strategies"]
FORKS_WORKERS = "lightning_scar.elastic.prepared"
_EXECUTE_CHILD = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def multiprocessing_context() -> Any:
    """For processes that call a function: they, too, are forked by a server that has imported everything."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    # There is one server in a process: the first list counts.
    context.set_forkserver_preload([*MODULES, *FOR_TESTS])
    return context


def _execute_child(self: Any, *args: Any) -> None:
    """Stands for the method of ``subprocess.Popen``: the process comes from this one's prepared parent, if it can."""
    call = inspect.signature(_EXECUTE_CHILD).bind(self, *args).arguments
    is_plain = not (call["preexec_fn"] or call["pass_fds"] or call["shell"] or call["executable"])
    words = [os.fsdecode(word) for word in call["args"]] if isinstance(call["args"], list | tuple) else []
    if words[1:3] == ["-I", "-S"] and Path(words[3]).name == "die_with_parent.py":
        words = words[5:]  # Every fork dies with its parent.
    parent = _parent() if is_plain and words[:1] == [sys.executable] and _can_run(words) else None
    if parent is None:
        _EXECUTE_CHILD(self, *args)
        return
    streams = [call[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    environment = os.environ if call["env"] is None else call["env"]
    streams = [own if stream == -1 else stream for own, stream in enumerate(streams)]
    self.pid = parent.fork(words, environment, streams, call["cwd"] or "").pid
    self._child_created = True
    self._close_pipe_fds(
        *(call[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
    )


def _can_run(words: Sequence[str]) -> bool:
    """Whether a fork can run it. It has the options of this interpreter, but for ``-u``."""
    program = Program.of(words)
    return program is not None and set(program.flags) <= {"-u"}


class _Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A program that starts anew, always."""

    _execute_child = _EXECUTE_CHILD


class PreparedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """A process that a prepared parent forks, where that can be; else a program that starts anew."""

    _started: ClassVar[list["PreparedPopen"]] = []

    def _execute_child(self, *args: Any) -> None:
        _execute_child(self, *args)
        self._started.append(self)

    @classmethod
    def end_all(cls) -> None:
        """Kills those that still run, with all that they started."""
        while cls._started:
            process = cls._started.pop()
            if process.poll() is None:
                kill_all(process.pid)
                process.wait(10)


@contextmanager
def workers_are_prepared() -> Iterator[None]:
    """Whatever this process starts meanwhile comes from a prepared parent."""
    _parent()  # It is no child of itself.
    subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]
    try:
        yield
    finally:
        subprocess.Popen._execute_child = _EXECUTE_CHILD  # type: ignore[attr-defined]


def run(
    command: Sequence[str], *, timeout: float, check: bool = False, capture_output: bool = False, **options: Any
) -> "subprocess.CompletedProcess[Any]":
    """What ``subprocess.run`` does; if it is too slow, whatever the program started is ended with it."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with PreparedPopen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            kill_all(process.pid)
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def kill_all(pid: int) -> None:
    """Kills a process and what it started."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in [first, *first.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


# -- the parent ----------------------------------------------------------------------------------------------------

_current: PreparedParent | None = None
_owner = -1


def _parent() -> PreparedParent | None:
    """That of this process; ``None`` if it has none."""
    global _current, _owner
    if sys.platform != "linux":
        return None
    if _current is None and "pytest" in sys.modules:
        mine, theirs = _pair()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        server = _Popen(
            [sys.executable, __file__],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            env={**environment, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()
        # On a busy machine it takes longer than a fork ever may.
        mine.recv(1)
        _current, _owner = PreparedParent(mine), os.getpid()
        atexit.register(server.wait, 10)
        atexit.register(_current.close)
    # A fork of this process by others has none.
    return _current if _owner == os.getpid() else None


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _serve(connection: socket.socket) -> NoReturn:
    """Forks a process for each request, until nobody can ask any more."""
    _run(Parent(connection).serve())


def run_in_this_process(command: Sequence[str]) -> NoReturn:
    """Runs another program in this one, which a prepared parent has forked, and ends with it."""
    program = Program.of(command)
    assert program is not None
    _run(program)


def _run(program: Program) -> NoReturn:
    """Runs a program in this process, which has imported everything."""
    if "-u" in program.flags or os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if program.kind != "-c" and program.path is not None:
        sys.path.insert(0, program.path)
    # A worker starts nothing, and what forks workers forks itself.
    if "LIGHTNING_SCAR_STORE" not in os.environ and program.what != FORKS_WORKERS:
        _get_a_parent()
    os.execv = _exec  # type: ignore[assignment]
    run_program(program)


def _get_a_parent() -> None:
    global _current, _owner
    mine, theirs = _pair()
    if not os.fork():
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        mine.close()
        _serve(theirs)
    theirs.close()
    _current, _owner = PreparedParent(mine), os.getpid()
    subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]


def _exec(path: str, command: Sequence[str]) -> None:
    """Stands for ``os.execv``: what the program would become runs as its child, and ends it."""
    process = PreparedPopen(command)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    """Runs a prepared parent."""
    # Whoever is imported by a program is another module than this one.
    this = importlib.import_module("prepared")
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent]
    with watched():
        for module in MODULES:
            importlib.import_module(module)
    gc.freeze()
    connection = socket.socket(fileno=os.dup(0))
    connection.send(b"!")
    this._serve(connection)


if __name__ == "__main__":
    main()
