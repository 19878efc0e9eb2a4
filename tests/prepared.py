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
import ctypes
import gc
import importlib
import inspect
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import psutil

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
_SUBREAPER, _DEATH_SIGNAL = 36, 1
_STREAMS = 3
_DIE_WITH_PARENT = "die_with_parent.py"
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
    program = _Program.of(call["args"]) if is_plain and isinstance(call["args"], list | tuple) else None
    parent = _parent() if program is not None else None
    if parent is None:
        _EXECUTE_CHILD(self, *args)
        return
    streams = [call[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    request = {
        "program": program,
        "environment": dict(os.environ if call["env"] is None else call["env"]),
        "cwd": os.path.abspath(call["cwd"] or os.getcwd()),
        "ignored": [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN],
        "session": call["start_new_session"],
        "asker": os.getpid(),
    }
    self.pid = parent.ask(request, [own if stream == -1 else stream for own, stream in enumerate(streams)])
    self._child_created = True
    self._close_pipe_fds(
        *(call[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
    )


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


def in_one_program(command: Sequence[str]) -> list[str]:
    """The same for where no prepared parent is, such as another host: workers do not start anew, but what starts them.

    Args:
        command: Python and what it is to run.

    """
    return [sys.executable, __file__, "run", *command]


def kill_all(pid: int) -> None:
    """Kills a process and what it started."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in [first, *first.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


# -- the program ---------------------------------------------------------------------------------------------------


class _Program:
    """What is to run, taken from a command line of Python.

    Args:
        kind: ``"-m"``, ``"-c"`` or ``"script"``.
        what: The module, the code, or the path.
        arguments: What follows.
        command: All of it.

    """

    def __init__(self, kind: str, what: str, arguments: list[str], command: list[str]) -> None:
        self.kind, self.what, self.arguments = kind, what, arguments
        self.command = command
        self.is_unbuffered = False

    @classmethod
    def of(cls, command: Sequence[Any]) -> "_Program | None":
        """``None`` if it is none of Python's, or one with options that a fork cannot give it."""
        words = [os.fspath(word) for word in command]
        words = [word.decode() if isinstance(word, bytes) else word for word in words]
        # Every fork dies with its parent, too.
        if words[0] == sys.executable and words[1:3] == ["-I", "-S"] and Path(words[3]).name == _DIE_WITH_PARENT:
            words = words[5:]
        if words[0] != sys.executable or len(words) < 2:
            return None
        rest, is_unbuffered = words[1:], False
        while rest and rest[0] == "-u":
            rest, is_unbuffered = rest[1:], True
        if not rest:
            return None
        if rest[0] in ("-m", "-c"):
            program = cls(rest[0], rest[1], rest[2:], words)
        elif rest[0].startswith("-"):
            return None
        else:
            program = cls("script", rest[0], rest[1:], words)
        program.is_unbuffered = is_unbuffered
        return program

    def run(self) -> None:
        """Runs it as ``__main__``."""
        sys.orig_argv = list(self.command)
        sys.argv = ["-c" if self.kind == "-c" else self.what, *self.arguments]
        if self.kind == "-m":
            sys.path.insert(0, os.getcwd())
            runpy.run_module(self.what, run_name="__main__", alter_sys=True)
            return
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        if self.kind == "-c":
            sys.path.insert(0, "")
            text, name = self.what, "<string>"
        else:
            name = os.path.abspath(self.what)
            sys.path.insert(0, os.path.dirname(name))
            text = Path(name).read_bytes()  # type: ignore[assignment]
            main.__file__ = name
        exec(compile(text, name, "exec"), vars(main))


# -- the parent ----------------------------------------------------------------------------------------------------


class _Parent:
    """The end of a connection to a prepared parent.

    Args:
        connection: To it.

    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self.owner = os.getpid()

    def ask(self, request: dict[str, Any], streams: list[int]) -> int:
        """The number of a new process, a child of this one."""
        with self._lock:
            # An orphan goes to this process instead of to init.
            _prctl(_SUBREAPER, 1)
            try:
                _send(self._connection, pickle.dumps(request), streams)
                answer, _ = _receive(self._connection)
            finally:
                _prctl(_SUBREAPER, 0)
        return int(answer)


_current: _Parent | None = None


def _parent() -> _Parent | None:
    """That of this process; ``None`` if it has none."""
    global _current
    if sys.platform != "linux":
        return None
    if _current is not None and _current.owner == os.getpid():
        return _current
    if "pytest" not in sys.modules:
        return None  # A fork of a prepared process, which has to start everything anew.
    mine, theirs = socket.socketpair()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    command = [sys.executable, __file__, str(theirs.fileno()), str(os.getpid())]
    server = subprocess.Popen(
        command,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    theirs.close()
    _current = _Parent(mine)
    atexit.register(_end, mine, server)
    return _current


def _end(connection: socket.socket, server: "subprocess.Popen[bytes]") -> None:
    connection.close()
    server.wait(10)


def _serve(connection: socket.socket) -> NoReturn:
    """Forks a process for each request, until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            message, streams = _receive(connection)
        except EOFError:
            os._exit(0)
        heard, told = os.pipe()
        between = os.fork()
        if not between:
            if not os.fork():
                os.close(heard)
                connection.close()
                _become(pickle.loads(message), streams, told)
            os._exit(0)
        os.close(told)
        # Its child is an orphan then, and goes to whoever asked for it.
        os.waitpid(between, 0)
        _send(connection, os.read(heard, 20), [])
        for descriptor in (*streams, heard):
            os.close(descriptor)


def _become(request: dict[str, Any], streams: list[int], told: int) -> NoReturn:
    """Makes this fork a process of its own and ends it.

    Args:
        request: What is to run, and how.
        streams: Its standard input, output and error.
        told: Who waits for the process gets its number here, once it can be sent signals as any other.

    """
    program: _Program = request["program"]
    while os.getppid() != request["asker"]:
        if not os.path.exists(f"/proc/{request['asker']}"):
            os._exit(0)
        os.sched_yield()
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != request["asker"]:
        os._exit(0)
    if request["session"]:
        os.setsid()
    for number in signal.valid_signals():
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.write(told, str(os.getpid()).encode())
    global _current
    # A worker starts nothing.
    _current = None if "LIGHTNING_SCAR_STORE" in request["environment"] else _a_parent_of_its_own()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(_STREAMS, _current._connection.fileno() if _current else 1 << 16)
    if _current:
        os.closerange(_current._connection.fileno() + 1, 1 << 16)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in more if path and path not in sys.path]
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    _run(program)


def _start(program: _Program) -> NoReturn:
    """Runs a program in this process, which has imported everything."""
    global _current
    _current = _a_parent_of_its_own()
    _run(program)


def _run(program: _Program) -> NoReturn:
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent]
    if program.is_unbuffered or os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if _current:
        subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]
    os.execv = _exec  # type: ignore[assignment]
    _end_with(program.run)


def _a_parent_of_its_own() -> _Parent:
    mine, theirs = socket.socketpair()
    owner = os.getpid()
    if not os.fork():
        mine.close()
        _prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != owner:
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(_STREAMS):
            os.dup2(null, number)
        os.dup2(theirs.fileno(), _STREAMS)
        os.closerange(_STREAMS + 1, 1 << 16)
        theirs.detach()
        _serve(socket.socket(fileno=_STREAMS))
    theirs.close()
    return _Parent(mine)


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


def _end_with(main: Callable[[], None]) -> NoReturn:
    """Ends this process as the interpreter does when a program is over."""
    if any(name.startswith("COVERAGE_PROCESS") for name in os.environ):
        importlib.import_module("coverage").process_startup()
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code == 1 and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        # Without the frames of this module.
        own = error.__traceback__
        while own is not None and own.tb_next is not None and own.tb_frame.f_code.co_filename == __file__:
            own = own.tb_next
        sys.excepthook(type(error), error.with_traceback(own), own)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


# -- messages ------------------------------------------------------------------------------------------------------


def _send(connection: socket.socket, content: bytes, descriptors: Sequence[int]) -> None:
    socket.send_fds(connection, [len(content).to_bytes(8, "big")], descriptors)
    connection.sendall(content)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    head, descriptors, _, _ = socket.recv_fds(connection, 8, _STREAMS)
    if not head:
        raise EOFError
    size, content = int.from_bytes(head, "big"), b""
    while len(content) < size:
        chunk = connection.recv(size - len(content))
        if not chunk:
            raise EOFError
        content += chunk
    return content, list(descriptors)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)


def main() -> None:
    """Runs a prepared parent, or a program that has one.

    Arguments are the parent's connection and the process that it belongs to, or ``run`` and a command.
    """
    # Whoever unpickles a request knows this module by its name.
    this = importlib.import_module("prepared")
    is_program = sys.argv[1] == "run"
    if not is_program:
        _prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != int(sys.argv[2]):
            return
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()
    if is_program:
        this._start(this._Program.of(sys.argv[2:]))
    else:
        this._serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
