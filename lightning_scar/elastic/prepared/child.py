"""What makes a fork of a prepared parent a process like any other."""

import atexit
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from lightning_scar.elastic.prepared.environment import PLACE, become_spare, set_ranks
from lightning_scar.elastic.prepared.program import Program

_PR_SET_PDEATHSIG = 1
#: What measures coverage in every process starts in a worker, not in the process that forks it.
COVERAGE = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
#: The kernel makes an orphan somebody else's child in microseconds.
_ADOPTION_SECONDS = 10.0
_OWN_FOLDER = os.path.dirname(__file__)


def become(request: Mapping[str, Any], streams: Sequence[int], told: int) -> None:
    """Make this fork a process of its own.

    Args:
        request: Its ``environment``, its working directory ``cwd``, and the process whose child it becomes, ``parent``.
        streams: Its standard input, output and error, and over what a spare gets its place.
        told: Whoever waits for its number reads it from this pipe, once it can be treated as any other.

    """
    _become_child_of(request["parent"])
    os.setsid()
    os.write(told, str(os.getpid()).encode())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number >= len(streams):
            with suppress(OSError):
                os.close(number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _renew_modules()
    if len(streams) > PLACE:
        become_spare()


def _become_child_of(parent: int) -> None:
    # It has asked the kernel to get orphans, and waits for the number.
    deadline = time.monotonic() + _ADOPTION_SECONDS
    while os.getppid() != parent and time.monotonic() < deadline:
        os.sched_yield()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _renew_modules() -> None:
    """Do again what modules do differently in each process when they are imported."""
    importlib.invalidate_caches()
    multiprocessing.current_process().authkey = os.urandom(32)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    set_ranks()
    _set_blas_threads()
    if any(name in os.environ for name in COVERAGE):
        importlib.import_module("coverage").process_startup()


def _set_blas_threads() -> None:
    """Let OpenBLAS have the threads that it would have started when it was loaded; the parent keeps it at one."""
    wanted = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    count = int(wanted) if wanted.isdecimal() else os.cpu_count() or 1
    if count == 1:
        return
    maps = Path("/proc/self/maps").read_text().splitlines()
    for path in {line.split()[-1] for line in maps if "openblas" in line}:
        library = ctypes.CDLL(path)
        for name in ("openblas_set_num_threads", "scipy_openblas_set_num_threads"):
            for function in (getattr(library, name + end, None) for end in ("", "64_")):
                if function is not None:
                    function(count)


def run(program: Program) -> NoReturn:
    """Run a program, and end this process as Python does, but for one thing: modules are not torn down.

    That would copy all the memory that this process shares with its parent, only to free it.
    """
    code = _code_of(program)
    # In the order in which the interpreter does it.
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


def _code_of(program: Program) -> int:
    """Run a program. Return its exit code, negative for the signal that is to end it."""
    try:
        program.run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        # Nothing of this package is seen in the traceback.
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OWN_FOLDER):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0
